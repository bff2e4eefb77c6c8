"""Estimate how far the policy is from its reference, and steer the price of that distance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0  # exp(20) ≈ 5e8: far past any healthy ratio, far below overflow


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(π‖π_ref) at each token, for tokens drawn from π.

    With d = log π_ref − log π:  k1 = −d,  k2 = d² / 2,  k3 = eᵈ − 1 − d.

    k1 and k3 are unbiased; k1 may be negative, k2 (biased) and k3 never are. As part of a loss that is differentiated:
    k1 has a gradient of mean zero and so does nothing, k2 has the gradient of KL(π‖π_ref) while the policy is the one
    that sampled, k3 that of KL(π_ref‖π). As a detached number that the score-function gradient multiplies (in a reward
    or a score): k1 gives the gradient of KL(π‖π_ref), k3 that less the gradient of KL(π_ref‖π), k2 neither. Hence k1 in
    the reward, k2 or k3 in the loss.

    Args:
        logprobs: log π of the sampled tokens under the policy that sampled them, [B, T]; in a loss, under the present
            policy.
        ref_logprobs: log π_ref of the same tokens under the frozen reference, [B, T].
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        [B, T]. There is no mask: each entry depends on the same entry of the inputs only, so mask what comes out.

    Raises:
        ValueError: If ``estimator`` is none of the three.

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html; k3 also Shao et al.
    2024 (DeepSeekMath, arXiv 2402.03300) eq. 4. Unlike there d stops at 20 in k3, where eᵈ would soon overflow.

    >>> d = kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k1")
    >>> d, kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k2")
    (tensor([[2.]]), tensor([[2.]]))
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(difference) - difference
    raise ValueError(f"estimator is {estimator!r}; expected 'k1', 'k2' or 'k3'")


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """Move the KL coefficient so that the KL drifts towards its target.

    e = clip(kl / target − 1, −0.2, 0.2);  β ← β·(1 + e·samples / horizon).

    Args:
        coef: β that priced the KL of this rollout.
        kl: Mean over responses of the KL summed over their tokens (nats), measured on this rollout.
        target: The KL wanted, in the same unit.
        horizon: Responses after which an error at its bound has moved β by about a fifth; large = slow.
        samples: Responses in this rollout, over all ranks.

    Returns:
        β for the next rollout. It stays positive as long as samples < 5·horizon.

    Source: Ziegler et al. 2019 (arXiv 1909.08593) §2.2, with samples / horizon for its K_β = 0.1, as in its code
    (``AdaptiveKLController``, lm_human_preferences/train_policy.py, cbfd210).

    >>> adapt_kl_coef(0.1, kl=12.0, target=6.0, horizon=10_000, samples=500)
    0.101
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * samples / horizon)


def adapt_kl_penalty(penalty: float, kl: float, *, target: float) -> float:
    """Double or halve the price of leaving the policy that sampled, so that the KL stays near its target.

    β ← β / 2 if KL < target / 1.5;  β ← 2·β if KL > 1.5·target;  else β stays.

    Args:
        penalty: β that ``penalized_policy_loss`` paid during these updates.
        kl: KL(π_old‖π) a token (nats), measured when the updates on a rollout are done.
        target: The KL wanted, in the same unit.

    Returns:
        β for the next rollout.

    Source: Schulman et al. 2017 (PPO, arXiv 1707.06347) §4.

    >>> [adapt_kl_penalty(1.0, kl, target=0.01) for kl in (0.006, 0.01, 0.016)]
    [0.5, 1.0, 2.0]
    """
    if kl < target / 1.5:
        return penalty / 2
    return penalty * 2 if kl > target * 1.5 else penalty
