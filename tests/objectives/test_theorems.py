"""What the methods have to do with each other. The other side of each equation is computed here, from the paper."""

from __future__ import annotations

import itertools

import harness
import pytest
import torch
from torch import Tensor

from lit_rlhf.objectives import (
    aggregate,
    baseline_advantages,
    clipped_policy_loss,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_whiten,
    rewards_to_go,
    token_rewards,
    truncated_policy_loss,
)

VOCABULARY = 5
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def logits() -> Tensor:
    return torch.tensor([0.3, -0.5, 1.2, 0.0, -1.0], dtype=torch.float64, requires_grad=True)


def expected_gradient(policy: Tensor, baseline: str, size: int) -> Tensor:
    """Of the mean of −A·log π over ``size`` one-token responses, every way to draw them weighed by its chance."""
    logprobs = policy.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(range(VOCABULARY), repeat=size):
        rows = torch.tensor(draw)
        advantages = baseline_advantages(SCORES[rows], size, baseline=baseline, scale="none")
        chance = logprobs[rows].sum().exp().detach()
        total = total - chance * (advantages * logprobs[rows]).mean()
    return torch.autograd.grad(total, policy)[0]


@pytest.mark.parametrize(
    ("baseline", "factor"), [("leave_one_out", 1.0), ("none", 1.0), ("group", 2 / 3), ("batch", 2 / 3)]
)
def test_leaving_one_out_is_unbiased_and_a_mean_that_includes_oneself_shrinks(baseline: str, factor: float) -> None:
    """RLOO and bare REINFORCE give the gradient of the expected score; GRPO without scale (G − 1) / G of it."""
    policy = logits()
    exact = torch.autograd.grad(-(policy.softmax(0) * SCORES).sum(), policy)[0]
    close(expected_gradient(policy, baseline, 3), factor * exact)


def test_grpo_of_two_without_scale_is_half_of_rloo() -> None:
    scores = torch.randn(8)
    close(group_advantages(scores, 2, scale="none"), leave_one_out_advantages(scores, 2) / 2, 1e-6)


def test_grpo_of_two_is_a_contest() -> None:
    """With its own standard deviation each pair is ±1/√2, however close the two are."""
    scores = torch.randn(8, dtype=torch.float64)
    signs = torch.sign(scores.reshape(4, 2) - scores.reshape(4, 2).flip(1)).reshape(-1)
    close(group_advantages(scores, 2), signs / 2**0.5, 1e-2)


def test_dapo_with_equal_bounds_is_the_clip_of_ppo() -> None:
    """Schulman et al. 2017 eq. 7, the mean over all tokens."""
    logprobs, old, advantages = torch.randn(3, 6, 5, dtype=torch.float64)
    losses, _ = clipped_policy_loss(logprobs, old, advantages, harness.MASK, clip_low=0.2, clip_high=0.2)
    ratio = torch.exp(logprobs - old)[harness.MASK]
    advantage = advantages[harness.MASK]
    ppo = -torch.minimum(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage).mean()
    close(aggregate(losses, harness.MASK, "token_mean"), ppo)


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_gspo_of_one_token_is_grpo(ratio: str) -> None:
    logprobs, old, advantages = torch.randn(3, 8, 1, dtype=torch.float64)
    logprobs.requires_grad_()
    out = []
    for level in ("token", ratio):
        losses, metrics = clipped_policy_loss(
            logprobs, old, advantages, torch.ones(8, 1) > 0, clip_low=0.2, clip_high=0.3, ratio=level
        )
        out.append([losses, torch.autograd.grad(losses.sum(), logprobs)[0], metrics["clip_fraction"]])
    torch.testing.assert_close(*out)


def test_cispo_on_policy_is_reinforce() -> None:
    logprobs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, 5, dtype=torch.float64)
    losses, _ = truncated_policy_loss(logprobs, logprobs.detach(), advantages, harness.MASK, low=0.0, high=0.0)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], torch.where(harness.MASK, -advantages, 0.0))


def test_ppo_at_lambda_one_is_reinforce_with_the_critic_as_baseline() -> None:
    """Return (the sum of the rewards from here on) less value, summed by hand."""
    rewards, values = torch.randn(2, 6, 5, dtype=torch.float64)
    advantages, returns = generalized_advantages(rewards, values, harness.MASK, gamma=1.0, lam=1.0)
    for b, t in harness.MASK.nonzero().tolist():
        later = rewards[b, t:][harness.MASK[b, t:]].sum()
        close(advantages[b, t], later - values[b, t])
        close(returns[b, t], later)
        close(rewards_to_go(rewards, harness.MASK, gamma=1.0)[b, t], later)


def test_reinforce_plus_plus_from_its_parts() -> None:
    """Hu et al. 2025: score less the KL still to come, normalised over all tokens of the batch."""
    scores, kl, mask = torch.randn(6, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64), harness.MASK
    advantages = rewards_to_go(token_rewards(scores, kl, mask, kl_coef=0.1), mask, gamma=1.0)
    flat = []
    for b, t in mask.nonzero().tolist():
        flat.append(scores[b] - 0.1 * kl[b, t:][mask[b, t:]].sum())
        close(advantages[b, t], flat[-1])
    whole = torch.stack(flat)
    close(masked_whiten(advantages, mask)[mask], (whole - whole.mean()) / whole.std(correction=0), 1e-6)


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k2", False), ("k3", False)])
def test_only_k1_in_the_score_gives_the_gradient_of_the_kl(estimator: str, exact: bool) -> None:
    """Detached and multiplied by the score-function gradient; k3 misses it by the gradient of the other direction."""
    policy, reference = logits(), torch.tensor([1.0, 0.0, -0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    p = policy.log_softmax(0)
    price = kl_estimate(p, reference, estimator).detach()
    actual = torch.autograd.grad((p.exp().detach() * price * p).sum(), policy, retain_graph=True)[0]
    forward = torch.autograd.grad((p.exp() * (p - reference)).sum(), policy, retain_graph=True)[0]
    reverse = torch.autograd.grad((reference.exp() * (reference - p)).sum(), policy)[0]
    assert torch.allclose(actual, forward) == exact
    if estimator == "k3":
        close(actual, forward - reverse)
