"""The other two forms of the policy loss (truncated weights, KL penalty), and GSPO's gradients."""

from __future__ import annotations

import math

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import (
    adapt_kl_penalty,
    aggregate,
    clipped_policy_loss,
    penalized_policy_loss,
    truncated_policy_loss,
)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@harness.FEW
@given(harness.batches(3, bound=2.0), st.none() | st.floats(0.05, 0.9), st.floats(0.05, 5))
def test_truncated_gradient_is_the_oracle(batch: tuple[list[Tensor], Tensor], low: float | None, high: float) -> None:
    (logprobs, old, advantages), mask = batch
    logprobs.requires_grad_()
    losses, metrics = truncated_policy_loss(logprobs, old, advantages, mask, low=low, high=high)
    actual = torch.autograd.grad(losses.sum(), logprobs)[0]
    outside = 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t].item() - old[b, t].item())
        expected = oracles.truncated_policy_weight(ratio, advantages[b, t].item(), low, high)
        close(actual[b, t], expected, 1e-7)
        close(losses[b, t], expected * logprobs[b, t].item(), 1e-7)
        outside += ratio > 1 + high or (low is not None and ratio < 1 - low)
    assert (actual[~mask] == 0).all()
    close(metrics["clip_fraction"], outside / mask.sum().item(), 1e-7)


def test_where_a_clip_silences_a_token_truncation_holds_its_weight() -> None:
    """Ratios 1/2, 1 and 4, advantages of both signs, bounds .8 and 1.3."""
    old, mask = torch.zeros(2, 3), torch.ones(2, 3) > 0
    logprobs = torch.tensor([[0.5, 1.0, 4.0]] * 2).log().requires_grad_()
    advantages = torch.tensor([[2.0] * 3, [-2.0] * 3])
    clipped, _ = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3)
    truncated, _ = truncated_policy_loss(logprobs, old, advantages, mask, low=0.2, high=0.3)
    close(torch.autograd.grad(clipped.sum(), logprobs)[0], [[-1.0, -2.0, 0.0], [0.0, 2.0, 8.0]], 1e-6)
    close(torch.autograd.grad(truncated.sum(), logprobs)[0], [[-1.6, -2.0, -2.6], [1.6, 2.0, 2.6]], 1e-6)


def test_truncation_that_never_binds_is_the_gradient_of_the_plain_ratio() -> None:
    """The ratio times the score-function gradient, which is the gradient of the ratio itself."""
    logprobs, old, advantages = torch.randn(3, 6, 5, dtype=torch.float64)
    logprobs.requires_grad_()
    truncated, metrics = truncated_policy_loss(logprobs, old, advantages, harness.MASK, low=None, high=1e6)
    by_hand = -torch.where(harness.MASK, advantages * (logprobs - old).exp(), 0.0).sum()
    close(torch.autograd.grad(truncated.sum(), logprobs)[0], torch.autograd.grad(by_hand, logprobs)[0])
    assert metrics["clip_fraction"] == 0


def test_the_three_forms_report_the_same_metrics() -> None:
    logprobs, old, advantages = torch.randn(3, 6, 5)
    tensors = (logprobs, old, advantages, harness.MASK)
    clipped = clipped_policy_loss(*tensors, clip_low=None, clip_high=None)[1]
    truncated = truncated_policy_loss(*tensors, low=None, high=1e6)[1]
    penalized = penalized_policy_loss(*tensors, kl_penalty=1.0)[1]
    assert truncated == clipped
    assert {**penalized, "old_kl": 0} == {**clipped, "old_kl": 0}
    ratios = (logprobs - old).exp()[harness.MASK]
    close(penalized["old_kl"], (ratios - 1 - ratios.log()).mean(), 1e-5)


@harness.FEW
@given(harness.batches(3, bound=2.0), st.floats(0, 5))
def test_penalized_loss_is_the_oracle(batch: tuple[list[Tensor], Tensor], penalty: float) -> None:
    (logprobs, old, advantages), mask = batch
    actual, metrics = penalized_policy_loss(logprobs, old, advantages, mask, kl_penalty=penalty)
    for b, t in mask.nonzero().tolist():
        new, before = math.exp(logprobs[b, t]), math.exp(old[b, t])
        close(actual[b, t], oracles.penalized_policy(new, before, advantages[b, t].item(), penalty), 1e-7)
    assert (actual[~mask] == 0).all()
    assert metrics["clip_fraction"] == 0


def test_without_a_penalty_nothing_is_left_but_the_ratio() -> None:
    logprobs, old, advantages = torch.randn(3, 6, 5)
    tensors = (logprobs.requires_grad_(), old, advantages, harness.MASK)
    losses = penalized_policy_loss(*tensors, kl_penalty=0.0)[0]
    unclipped = clipped_policy_loss(*tensors, clip_low=None, clip_high=None)[0]
    close(losses, unclipped, 0)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], torch.autograd.grad(unclipped.sum(), logprobs)[0], 0)


@harness.FEW
@given(harness.numbers(5, bound=2.0), harness.numbers(5, bound=2.0))
def test_the_penalty_and_its_gradient_are_those_of_the_kl(new: list[float], old: list[float]) -> None:
    """All five tokens drawn with the chance that the old policy gives them: KL(old to new), the paper's direction."""
    logits = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    p, q = torch.tensor(old, dtype=torch.float64).log_softmax(0), logits.log_softmax(0)
    mask = torch.ones(1, 5) > 0
    losses, _ = penalized_policy_loss(q[None], p[None], torch.zeros(1, 5), mask, kl_penalty=1.0)
    expected = (p.exp() * losses[0]).sum()
    exact = (p.exp() * (p - q)).sum()
    close(expected, oracles.exact_kl(oracles.softmax(old), oracles.softmax(new)), 1e-7)
    close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, exact)), 1e-7)


@harness.FEW
@given(kls=st.lists(st.floats(0, 1), min_size=1, max_size=6), target=st.floats(0.01, 0.3))
def test_penalty_follows_the_recursion(kls: list[float], target: float) -> None:
    penalty, out = 0.5, []
    for kl in kls:
        penalty = adapt_kl_penalty(penalty, kl, target=target)
        out.append(penalty)
    assert out == oracles.adaptive_penalty(0.5, kls, target)


def test_penalty_by_hand() -> None:
    """Target 3: below 2 half, above 4.5 double, and exactly there neither."""
    assert [adapt_kl_penalty(1.0, kl, target=3.0) for kl in (1.9, 2.0, 3.0, 4.5, 4.6)] == [0.5, 1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_gspo_gradient_is_that_of_the_paper(ratio: str) -> None:
    """Eq. 10: (1 / B)·s·A·(1 / |y|) at each token of a response whose ratio s no bound stops, nothing elsewhere."""
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    old = torch.randn(3, 5, dtype=torch.float64)
    logprobs = (old + 0.1 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64).expand(3, 5)
    losses, _ = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=1.0, clip_high=1.0, ratio=ratio)
    actual = torch.autograd.grad(aggregate(losses, mask, "sequence_mean"), logprobs)[0]
    for b, length in enumerate((5, 2, 1)):
        s = oracles.sequence_ratio(logprobs[b].tolist(), old[b].tolist(), mask[b].tolist())
        expected = [-s * advantages[b, 0].item() / length / 3 if t < length else 0.0 for t in range(5)]
        close(actual[b], expected)
        close(losses[b, 0], -s * advantages[b, 0].item())


def test_gspo_token_sends_each_token_its_own_advantage() -> None:
    """GSPO-token eq. 14: the value is the sequence's, the gradient of token t is s·A_t and none of the others'."""
    logprobs = torch.tensor([[0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    mask, advantages = torch.ones(1, 2) > 0, torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    settings = {"clip_low": 1.0, "clip_high": 1.0}
    own, metrics = clipped_policy_loss(
        logprobs, torch.zeros(1, 2), advantages, mask, ratio="sequence_token", **settings
    )
    shared, _ = clipped_policy_loss(logprobs, torch.zeros(1, 2), advantages, mask, ratio="sequence", **settings)
    s = math.exp(0.3)
    close(own, [[-s, 3 * s]])
    close(torch.autograd.grad(own.sum(), logprobs)[0], [[-s, 3 * s]])
    close(torch.autograd.grad(shared.sum(), logprobs)[0], [[s, s]])
    close(metrics["ratio_mean"], s)
