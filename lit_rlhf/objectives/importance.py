"""Correct for responses that another program, or an older policy, drew."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.objectives.kl import MAX_LOG_RATIO
from lit_rlhf.objectives.reduce import masked_mean

WeightLevel = Literal["token", "sequence"]
WeightBound = Literal["truncate", "mask"]


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel,
    how: WeightBound,
    low: float | None,
    high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh tokens by how much likelier the trainer finds them than the sampler that drew them did.

    w_t = π(y_t) / μ(y_t), or for ``sequence`` w_t = Π_s π(y_s) / μ(y_s) over the response, at every token.
    ``truncate``: clip(w, low, high); ``mask``: w if low ≤ w ≤ high, else 0. Multiply the per-token losses by them.
    Only the product is unbiased, and it spreads the more the longer the response; a token's own weight ignores that
    the tokens before it were drawn by μ too, which matters little while every w is near 1.

    Args:
        logprobs: log π of the sampled tokens under the policy that the loss takes for the one that sampled (its
            ``old_logprobs``), [B, T].
        sampler_logprobs: log μ of the same tokens as reported by what drew them, [B, T].
        mask: Tokens of the response, bool [B, T].
        level: Whether every ``token`` has its own weight or all tokens of a ``sequence`` share one.
        how: Whether a weight out of bounds is pulled to the bound (``truncate``: TIS) or dropped (``mask``: IcePop,
            MIS). A dropped token still counts in ``aggregate``, unless that is given ``mask & (weights > 0)``.
        low: Smallest weight, itself, not its distance from 1; None = no bound (TIS). IcePop: 0.5.
        high: Largest weight, itself. TIS: 2; IcePop: 5.

    Returns:
        Weights [B, T], detached, 0 where nothing counts, and metrics over counted tokens: ``weight_mean`` of w before
        the bounds, near 1 if the two agree; ``bounded_fraction`` share of tokens that the bounds truncated or dropped.

    Raises:
        ValueError: If ``level`` or ``how`` is neither of its two.

    Sources: TIS Ionides 2008, for sampler and trainer Yao et al. 2025 (https://fengyao.notion.site/off-policy-rl);
    dropping by token Ling Team 2025 (IcePop, arXiv 2510.18855), by sequence Liu et al. 2025
    (https://richardli.xyz/rl-collapse). Sequence level means the product in verl and TRL too. Log w stops at 20.

    >>> logprobs, sampler = torch.tensor([[0.5, 0.9, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.4]]).log()
    >>> importance_weights(logprobs, sampler, logprobs < 0, level="token", how="mask", low=0.5, high=5.0)[0]
    tensor([[1., 3., 0.]])
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected 'token' or 'sequence'")
    if how not in ("truncate", "mask"):
        raise ValueError(f"how is {how!r}; expected 'truncate' or 'mask'")
    with torch.no_grad():
        log_weights = torch.where(mask, logprobs - sampler_logprobs, 0.0)
        if level == "sequence":
            log_weights = log_weights.sum(1, keepdim=True).expand_as(mask)
        weights = log_weights.clamp(max=MAX_LOG_RATIO).exp()
        bounded = weights.clamp(low, high)
        outside = (bounded != weights).to(weights.dtype)
        metrics = {"weight_mean": masked_mean(weights, mask), "bounded_fraction": masked_mean(outside, mask)}
        if how == "mask":
            bounded = torch.where(outside > 0, 0.0, weights)
        return torch.where(mask, bounded, 0.0), metrics
