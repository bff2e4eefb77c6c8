"""What a policy and its critic are trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from oracles.reduce import Mask, Row, counted


def clipped_policy(ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """PPO's objective by cases (Schulman et al. 2017, figure 1), as a loss."""
    if advantage >= 0:
        return -advantage * (1 + high if ratio > 1 + high else ratio)
    if ratio < 1 - low:
        ratio = 1 - low
    if dual is not None and ratio > dual:
        ratio = dual
    return -advantage * ratio


def sequence_ratio(logprobs: Row, old_logprobs: Row, mask: Mask) -> float:
    """GSPO eq. 7: (π(y) / π_old(y))^(1/|y|), from products of probabilities."""
    new = math.prod(math.exp(logprobs[t]) for t in counted(mask))
    old = math.prod(math.exp(old_logprobs[t]) for t in counted(mask))
    return (new / old) ** (1 / len(counted(mask)))


def clipped_value(value: float, old: float, target: float, clip: float) -> float:
    """Value clip by cases: inside the band the plain error; outside it the larger of the plain and the band edge's."""
    if old - clip <= value <= old + clip:
        return 0.5 * (value - target) ** 2
    edge = old + clip if value > old else old - clip
    return 0.5 * max((value - target) ** 2, (edge - target) ** 2)


def explained_variance(values: Row, returns: Row) -> float:
    errors = [r - v for v, r in zip(values, returns, strict=True)]
    return 1 - statistics.pvariance(errors) / statistics.pvariance(returns)


def adaptive_kl(coef: float, kls: Sequence[float], target: float, horizon: float, samples: int) -> list[float]:
    """Ziegler et al. 2019 §2.2 with K_β = samples / horizon, the coefficient after each rollout."""
    out = []
    for kl in kls:
        error = (kl - target) / target
        if error > 0.2:
            error = 0.2
        if error < -0.2:
            error = -0.2
        coef = coef + coef * error * samples / horizon
        out.append(coef)
    return out


def truncated_policy_weight(ratio: float, advantage: float, low: float | None, high: float) -> float:
    """CISPO (MiniMax-M1 eq. 4-5): what multiplies the gradient of the token's log-likelihood, as a loss."""
    if ratio > 1 + high:
        ratio = 1 + high
    if low is not None and ratio < 1 - low:
        ratio = 1 - low
    return -ratio * advantage


def penalized_policy(new: float, old: float, advantage: float, penalty: float) -> float:
    """PPO with a KL penalty (Schulman et al. 2017 eq. 8) for one token of probability ``new``, once ``old``."""
    surprise = math.log(old) - math.log(new)
    return -(new / old * advantage - penalty * (surprise + new / old - 1))


def adaptive_penalty(penalty: float, kls: Sequence[float], target: float) -> list[float]:
    """Schulman et al. 2017 §4, the penalty after each rollout."""
    out = []
    for kl in kls:
        if kl < target / 1.5:
            penalty = penalty / 2
        elif kl > target * 1.5:
            penalty = penalty * 2
        out.append(penalty)
    return out


def importance_weight(ratios: Sequence[float], t: int, level: str, how: str, low: float | None, high: float) -> float:
    """Weight of the t-th counted token, from the trainer's over the sampler's probabilities of all counted tokens."""
    weight = math.prod(ratios) if level == "sequence" else ratios[t]
    too_low, too_high = low is not None and weight < low, weight > high
    if how == "mask":
        return 0.0 if too_low or too_high else weight
    return high if too_high else low if too_low and low is not None else weight
