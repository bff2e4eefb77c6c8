from __future__ import annotations

import math

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import aggregate, clipped_policy_loss

bounds = st.floats(0.05, 0.9)


def loss(*tensors: Tensor, **settings) -> Tensor:
    return clipped_policy_loss(*tensors, **{"clip_low": 0.2, "clip_high": 0.2, **settings})[0]


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@harness.FEW
@given(harness.batches(3, bound=2.0), bounds, bounds, st.none() | st.floats(1.5, 3))
def test_token_loss_is_the_oracle(
    batch: tuple[list[Tensor], Tensor], low: float, high: float, dual: float | None
) -> None:
    (logprobs, old, advantages), mask = batch
    actual = loss(logprobs, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=dual)
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t] - old[b, t])
        close(actual[b, t], oracles.clipped_policy(ratio, advantages[b, t].item(), low, high, dual), 1e-7)
    assert (actual[~mask] == 0).all()


@harness.FEW
@given(harness.batches(3, bound=2.0), bounds, bounds)
def test_sequence_loss_is_the_oracle(batch: tuple[list[Tensor], Tensor], low: float, high: float) -> None:
    """GSPO: one ratio a response, the geometric mean of its tokens' ratios, clipped as one."""
    (logprobs, old, advantages), mask = batch
    actual = loss(logprobs, old, advantages, mask, clip_low=low, clip_high=high, ratio="sequence")
    for b, t in mask.nonzero().tolist():
        ratio = oracles.sequence_ratio(logprobs[b].tolist(), old[b].tolist(), mask[b].tolist())
        close(actual[b, t], oracles.clipped_policy(ratio, advantages[b, t].item(), low, high), 1e-7)
    assert (actual[~mask] == 0).all()


def test_sequence_ratio_of_one_token_is_its_token_ratio() -> None:
    logprobs, old, advantages = torch.randn(3, 8, 4)
    mask = torch.arange(4) == torch.arange(8).unsqueeze(1) % 4
    for dual in (None, 1.5):
        token, sequence = (
            clipped_policy_loss(
                logprobs, old, advantages, mask, clip_low=0.1, clip_high=0.3, ratio=ratio, dual_clip=dual
            )
            for ratio in ("token", "sequence")
        )
        torch.testing.assert_close(token, sequence)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "fixed_length"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(ratio: str, how: str) -> None:
    """Ratio 1: the loss is -A, its gradient that of -A log pi, and no clip is active (also at clip 0)."""
    mask = harness.MASK
    advantages = torch.randn(6, 1, dtype=torch.float64).expand(6, 5)
    logprobs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(aggregate(-advantages * logprobs, mask, how), logprobs)[0]
    for clip in (0.2, 0.0):
        per_token, metrics = clipped_policy_loss(
            logprobs, logprobs.detach(), advantages, mask, clip_low=clip, clip_high=clip, ratio=ratio
        )
        close(per_token, torch.where(mask, -advantages, 0.0))
        if ratio == "token" or how == "sequence_mean":
            close(torch.autograd.grad(aggregate(per_token, mask, how), logprobs, retain_graph=True)[0], expected)
        values = {name: value.item() for name, value in metrics.items()}
        assert values == {"approx_kl": 0.0, "clip_fraction": 0.0, "ratio_mean": 1.0, "ratio_var": 0.0}


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_no_clip_is_a_clip_that_never_binds(ratio: str) -> None:
    logprobs, old, advantages = torch.randn(3, 6, 5)
    outs = [
        clipped_policy_loss(logprobs, old, advantages, harness.MASK, clip_low=low, clip_high=high, ratio=ratio)
        for low, high in ((None, None), (1e6, 1e6))
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert outs[0][1]["clip_fraction"] == 0
    log_ratio = torch.where(harness.MASK, logprobs - old, 0.0)
    if ratio == "token":
        close(outs[0][0], torch.where(harness.MASK, -advantages * log_ratio.exp(), 0.0), 1e-6)


def test_each_bound_is_its_own_and_none_frees_one_side() -> None:
    """Clip-higher: an advantage > 0 meets only the upper bound, one < 0 only the lower."""
    logprobs, old = torch.tensor([[3.0, 0.3]]).log(), torch.zeros(1, 2)
    advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2) > 0
    for low, high, expected in (
        (0.2, 0.28, [-1.28, 0.8]),
        (0.4, 0.5, [-1.5, 0.6]),
        (None, 0.5, [-1.5, 0.3]),
        (0.4, None, [-3.0, 0.6]),
    ):
        close(loss(logprobs, old, advantages, mask, clip_low=low, clip_high=high), [expected], 1e-6)
    close(loss(logprobs, old, -advantages, mask), [[3.0, -0.3]], 1e-6)  # moving the wrong way is never clipped


def test_where_a_bound_decides_there_is_no_gradient() -> None:
    """Ratios .5, 1.1, 2 with advantages of both signs, and a dual clip of 1.8."""
    logprobs = torch.tensor([[0.5, 1.1, 2.0], [0.5, 1.1, 2.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0] * 3, [-1.0] * 3]), torch.ones(2, 3) > 0
    for dual, expected, fraction in (
        (None, [[-0.5, -1.1, 0.0], [0.0, 1.1, 2.0]], 2 / 6),
        (1.8, [[-0.5, -1.1, 0.0], [0.0, 1.1, 0.0]], 3 / 6),
    ):
        per_token, metrics = clipped_policy_loss(
            logprobs, torch.zeros(2, 3), advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=dual
        )
        close(torch.autograd.grad(per_token.sum(), logprobs)[0], expected, 1e-6)
        close(metrics["clip_fraction"], fraction, 1e-6)


def test_dual_clip_leaves_positive_advantages_alone() -> None:
    logprobs, old, mask = torch.full((1, 2), 5.0).log(), torch.zeros(1, 2), torch.ones(1, 2) > 0
    advantages = torch.tensor([[1.0, -1.0]])
    close(loss(logprobs, old, advantages, mask, clip_high=None, dual_clip=3.0), [[-5.0, 3.0]], 1e-6)


def test_metrics_by_hand_over_counted_tokens() -> None:
    """Ratios 2 and 1/4 counted, garbage not."""
    logprobs = torch.tensor([[2.0, 0.25, 1.0]], requires_grad=True).log()
    old, mask = torch.tensor([[0.0, 0.0, torch.nan]]), torch.tensor([[True, True, False]])
    _, metrics = clipped_policy_loss(logprobs, old, torch.ones(1, 3), mask, clip_low=0.2, clip_high=0.2)
    half_log_two_squared = 0.5 * math.log(2) ** 2
    expected = {
        "approx_kl": (half_log_two_squared + 4 * half_log_two_squared) / 2,
        "clip_fraction": 0.5,
        "ratio_mean": 1.125,
        "ratio_var": 0.765625,
    }
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        close(value, expected[name], 1e-6)


def test_sequence_metrics_are_of_the_sequence_ratio_but_kl_of_tokens() -> None:
    logprobs, mask = torch.tensor([[4.0, 1.0]]).log(), torch.ones(1, 2) > 0
    _, metrics = clipped_policy_loss(
        logprobs, torch.zeros(1, 2), torch.ones(1, 2), mask, clip_low=0.2, clip_high=0.2, ratio="sequence"
    )
    expected = {"approx_kl": math.log(4) ** 2 / 4, "clip_fraction": 1.0, "ratio_mean": 2.0, "ratio_var": 0.0}
    for name, value in expected.items():
        close(metrics[name], value, 1e-6)


@pytest.mark.parametrize(
    ("how", "denominator", "short", "long"),
    [
        ("sequence_mean", None, 2 / 4 / 2, 2 / 7 / 2),
        ("fixed_length", None, 2 / 7 / 2, 2 / 7 / 2),
        ("token_mean", None, 2 / 11, 2 / 11),
        ("fixed_length", 7.0, 2 / 7, 2 / 7),
    ],
)
def test_weight_of_a_token_under_each_aggregation(
    how: str, denominator: float | None, short: float, long: float
) -> None:
    """Responses of 4 and 7 tokens, ratio 1, advantage 2: .25 and .1429, .1429 for both, 2/11 for both."""
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    logprobs = torch.zeros(2, 7, requires_grad=True)
    per_token = loss(logprobs, torch.zeros(2, 7), torch.full((2, 7), 2.0), mask)
    grad = torch.autograd.grad(aggregate(per_token, mask, how, denominator), logprobs)[0]
    close(grad, -torch.where(mask, torch.tensor([[short], [long]]), 0.0), 1e-6)


def test_an_unknown_ratio_is_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="ratio is 'word'; expected 'token', 'sequence' or 'sequence_token'"):
        loss(one, one, one, one > 0, ratio="word")
