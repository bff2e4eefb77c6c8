"""Improve a policy on responses it sampled a little while ago."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.objectives.kl import MAX_LOG_RATIO, kl_estimate
from lit_rlhf.objectives.reduce import masked_mean

RatioLevel = Literal["token", "sequence", "sequence_token"]


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    ratio: RatioLevel = "token",
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh each token's advantage by how much likelier the token has become, within bounds.

    ρ_t = π(y_t) / π_old(y_t), or for ``sequence`` ρ_t = (π(y) / π_old(y))^(1/|y|) at every token, or for
    ``sequence_token`` ρ_t = sg[(π(y) / π_old(y))^(1/|y|)]·π(y_t) / sg[π(y_t)], sg = no gradient;
    ℓ_t = −min(ρ_t·A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high)·A_t), and where A_t < 0 at most −c·A_t for dual clip c.

    Args:
        logprobs: log π of the sampled tokens under the policy being trained, [B, T]; the gradient flows through these.
        old_logprobs: The same under the policy as it was before the first update on this rollout, [B, T].
        advantages: Advantage of each token, [B, T]; the response's own at every token if it has only one.
        mask: Tokens of the response, bool [B, T].
        clip_low: How far below 1 a ratio still counts; None = no bound.
        clip_high: How far above 1 a ratio still counts; None = no bound. Larger than ``clip_low``: DAPO's clip-higher.
        ratio: Whether every ``token`` has its own ratio (PPO, GRPO) or all tokens of a ``sequence`` share one (GSPO);
            ``sequence_token`` shares the value and gives every token its own gradient, for advantages that differ from
            token to token (GSPO-token).
        dual_clip: c > 1, cap on the ratio of tokens with a negative advantage; None = no cap.

    Returns:
        Per-token losses [B, T], 0 where nothing counts, and metrics over counted tokens, detached scalars:
        ``approx_kl`` ½·mean((log π − log π_old)²), ``clip_fraction`` share of tokens where a bound decides,
        ``ratio_mean`` and ``ratio_var`` of ρ.

    Raises:
        ValueError: If ``ratio`` is none of the three.

    Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347) eq. 7; two bounds Yu et al. 2025 (DAPO, arXiv 2503.14476)
    eq. 10; dual clip Ye et al. 2020 (arXiv 1912.09729), "Dual-clip PPO"; sequence ratio Zheng et al. 2025 (GSPO, arXiv
    2507.18071) eq. 7, whose loss is this one under ``aggregate(…, "sequence_mean")``, and eq. 13–14 (GSPO-token).
    Unlike there log ρ stops at 20, where ρ would soon overflow, and sends no gradient beyond.

    >>> zero, mask = torch.zeros(1, 1), torch.tensor([[True]])
    >>> clipped_policy_loss(zero, zero - 1, zero + 1, mask, clip_low=0.2, clip_high=0.25)[0]
    tensor([[-1.2500]])
    """
    token_log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratios = _ratios(token_log_ratio, mask, ratio)
    advantages = torch.where(mask, advantages, 0.0)

    lower = -math.inf if clip_low is None else 1.0 - clip_low
    upper = math.inf if clip_high is None else 1.0 + clip_high
    free = ratios * advantages
    objective = torch.minimum(free, ratios.clamp(lower, upper) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return torch.where(mask, -objective, 0.0), _metrics(token_log_ratio, ratios, objective != free, mask)


def truncated_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float | None,
    high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh each token's log-likelihood by its advantage and its truncated ratio, so that every token teaches (CISPO).

    ρ_t = π(y_t) / π_old(y_t);  ℓ_t = −sg[clip(ρ_t, 1 − low, 1 + high)]·A_t·log π(y_t), sg = no gradient. Where a
    clipped loss silences a token whose ratio is out of bounds, here its weight is only held at the bound.

    Args:
        logprobs: log π of the sampled tokens under the policy being trained, [B, T]; the gradient flows through these.
        old_logprobs: The same under the policy as it was before the first update on this rollout, [B, T].
        advantages: Advantage of each token, [B, T]; the response's own at every token if it has only one.
        mask: Tokens of the response, bool [B, T].
        low: How far below 1 the weight may fall; None = no bound, as the paper runs it.
        high: How far above 1 the weight may rise.

    Returns:
        Per-token losses [B, T], 0 where nothing counts (only their gradient means something), and the metrics of
        ``clipped_policy_loss``; ``clip_fraction`` is the share of tokens whose ratio is out of bounds.

    Source: MiniMax 2025 (MiniMax-M1, arXiv 2506.13585) eq. 4–5, aggregated there by ``token_mean``. Unlike there log ρ
    stops at 20. Where others give the largest weight itself (TRL, ScaleRL: 5), ``high`` is that less 1.

    >>> logprobs, mask = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[True]])
    >>> loss, _ = truncated_policy_loss(logprobs, logprobs.detach() - 3, torch.ones(1, 1), mask, low=None, high=1.0)
    >>> torch.autograd.grad(loss, logprobs)[0]
    tensor([[-2.]])
    """
    token_log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    ratios = _ratios(token_log_ratio, mask, "token")
    weights = ratios.clamp(None if low is None else 1.0 - low, 1.0 + high)
    losses = -weights * torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)
    return torch.where(mask, losses, 0.0), _metrics(token_log_ratio, ratios, weights != ratios, mask)


def penalized_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kl_penalty: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh each token's advantage by how much likelier the token has become, at a price for moving (PPO with KL).

    ρ_t = π(y_t) / π_old(y_t);  ℓ_t = −(ρ_t·A_t − β·k_t),  k_t = ρ_t − 1 − log ρ_t.

    k_t estimates KL(π_old‖π) from a token drawn from π_old. Its value is unbiased, for E[ρ] = 1 and E[−log ρ] is the
    KL; so is its gradient, for the draw does not depend on π: ∇ρ has mean 0, and −∇log ρ that of the KL. The part ρ − 1
    leaves both means alone, makes k_t ≥ 0 and 0 at ρ = 1, and takes away most of the noise.

    Args:
        logprobs: log π of the sampled tokens under the policy being trained, [B, T]; the gradient flows through these.
        old_logprobs: The same under the policy as it was before the first update on this rollout, [B, T].
        advantages: Advantage of each token, [B, T]; the response's own at every token if it has only one.
        mask: Tokens of the response, bool [B, T].
        kl_penalty: β ≥ 0, the price of a nat; ``adapt_kl_penalty`` moves it after each rollout.

    Returns:
        Per-token losses [B, T], 0 where nothing counts, and the metrics of ``clipped_policy_loss``, ``clip_fraction``
        being 0, and ``old_kl`` the mean of k, in nats a token, which ``adapt_kl_penalty`` takes.

    Source: Schulman et al. 2017 (PPO, arXiv 1707.06347) eq. 8. The paper sums the KL over all actions; here it is
    estimated from the sampled token. Unlike there log ρ stops at 20, and sends no gradient beyond.

    >>> zero, mask = torch.zeros(1, 1), torch.tensor([[True]])
    >>> penalized_policy_loss(zero, zero - 1, zero + 1, mask, kl_penalty=2.0)[0]  # −e + 2·(e − 2)
    tensor([[-1.2817]])
    """
    token_log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratios = _ratios(token_log_ratio, mask, "token")
    kl = kl_estimate(torch.zeros_like(token_log_ratio), token_log_ratio, "k3")
    losses = kl_penalty * kl - ratios * torch.where(mask, advantages, 0.0)
    metrics = _metrics(token_log_ratio, ratios, torch.zeros_like(mask), mask)
    return torch.where(mask, losses, 0.0), {**metrics, "old_kl": masked_mean(kl.detach(), mask)}


def _ratios(token_log_ratio: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """Each token's ratio ρ, [B, T]."""
    if level == "token":
        return token_log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    shared = masked_mean(token_log_ratio, mask, dim=1).unsqueeze(1).expand_as(mask)
    if level == "sequence":
        return shared.clamp(max=MAX_LOG_RATIO).exp()
    if level == "sequence_token":
        return (shared.detach() + (token_log_ratio - token_log_ratio.detach())).clamp(max=MAX_LOG_RATIO).exp()
    raise ValueError(f"ratio is {level!r}; expected 'token', 'sequence' or 'sequence_token'")


def _metrics(token_log_ratio: Tensor, ratios: Tensor, bounded: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the policy has moved, over counted tokens."""
    with torch.no_grad():
        ratio_mean = masked_mean(ratios, mask)
        return {
            "approx_kl": masked_mean(token_log_ratio.square(), mask) / 2,
            "clip_fraction": masked_mean(bounded.to(ratios.dtype), mask),
            "ratio_mean": ratio_mean,
            "ratio_var": masked_mean((ratios - ratio_mean).square(), mask),
        }
