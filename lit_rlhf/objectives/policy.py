"""Improve a policy on responses it sampled a little while ago."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.objectives.reduce import masked_mean

RatioLevel = Literal["token", "sequence"]

_MAX_LOG_RATIO = 20.0  # exp(20) ≈ 5e8: far past any healthy ratio, far below overflow


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

    ρ_t = π(y_t) / π_old(y_t), or for ``sequence`` ρ_t = (π(y) / π_old(y))^(1/|y|) at every token;
    ℓ_t = −min(ρ_t·A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high)·A_t), and where A_t < 0 at most −c·A_t for dual clip c.

    Args:
        logprobs: log π of the sampled tokens under the policy being trained, [B, T]; the gradient flows through these.
        old_logprobs: The same under the policy as it was before the first update on this rollout, [B, T].
        advantages: Advantage of each token, [B, T]; the response's own at every token if it has only one.
        mask: Tokens of the response, bool [B, T].
        clip_low: How far below 1 a ratio still counts; None = no bound.
        clip_high: How far above 1 a ratio still counts; None = no bound. Larger than ``clip_low``: DAPO's clip-higher.
        ratio: Whether every ``token`` has its own ratio (PPO, GRPO) or all tokens of a ``sequence`` share one (GSPO).
        dual_clip: c > 1, cap on the ratio of tokens with a negative advantage; None = no cap.

    Returns:
        Per-token losses [B, T], 0 where nothing counts, and metrics over counted tokens, detached scalars:
        ``approx_kl`` ½·mean((log π − log π_old)²), ``clip_fraction`` share of tokens where a bound decides,
        ``ratio_mean`` and ``ratio_var`` of ρ.

    Raises:
        ValueError: If ``ratio`` is neither of the two.

    Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347) eq. 7; two bounds Yu et al. 2025 (DAPO, arXiv 2503.14476)
    eq. 10; dual clip Ye et al. 2020 (arXiv 1912.09729), "Dual-clip PPO"; sequence ratio Zheng et al. 2025 (GSPO, arXiv
    2507.18071) eq. 7, whose loss is this one under ``aggregate(…, "sequence_mean")``. Unlike there log ρ stops at 20,
    where ρ would soon overflow, and sends no gradient beyond.

    >>> zero, mask = torch.zeros(1, 1), torch.tensor([[True]])
    >>> clipped_policy_loss(zero, zero - 1, zero + 1, mask, clip_low=0.2, clip_high=0.25)[0]
    tensor([[-1.2500]])
    """
    token_log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if ratio == "token":
        log_ratio = token_log_ratio
    elif ratio == "sequence":
        log_ratio = masked_mean(token_log_ratio, mask, dim=1).unsqueeze(1).expand_as(mask)
    else:
        raise ValueError(f"ratio is {ratio!r}; expected 'token' or 'sequence'")
    ratios = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages, 0.0)

    lower = -math.inf if clip_low is None else 1.0 - clip_low
    upper = math.inf if clip_high is None else 1.0 + clip_high
    free = ratios * advantages
    objective = torch.minimum(free, ratios.clamp(lower, upper) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)

    with torch.no_grad():
        ratio_mean = masked_mean(ratios, mask)
        metrics = {
            "approx_kl": masked_mean(token_log_ratio.square(), mask) / 2,
            "clip_fraction": masked_mean((objective != free).to(ratios.dtype), mask),
            "ratio_mean": ratio_mean,
            "ratio_var": masked_mean((ratios - ratio_mean).square(), mask),
        }
    return torch.where(mask, -objective, 0.0), metrics
