"""What the papers say, literally and slowly: Python numbers, loops and cases. Never imports the code it judges.

Rows are lists of floats, masks are lists of bools (True = counts). Results per token are 0 where nothing counts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

Row = Sequence[float]
Mask = Sequence[bool]


def _counted(mask: Mask) -> list[int]:
    return [t for t, counts in enumerate(mask) if counts]


def mean(x: Sequence[Row], mask: Sequence[Mask]) -> float:
    kept = [x[b][t] for b in range(len(x)) for t in _counted(mask[b])]
    return sum(kept) / len(kept) if kept else 0.0


def whiten(x: Sequence[Row], mask: Sequence[Mask], center: bool) -> list[list[float]]:
    """Ziegler et al. 2019, over counted entries: subtract the mean, divide by √(population variance + 1e-8)."""
    kept = [x[b][t] for b in range(len(x)) for t in _counted(mask[b])]
    out = [[0.0] * len(row) for row in x]
    for b in range(len(x)):
        for t in _counted(mask[b]):
            middle = sum(kept) / len(kept)
            z = (x[b][t] - middle) / math.sqrt(statistics.pvariance(kept) + 1e-8)
            out[b][t] = z if center else z + middle
    return out


def aggregate(losses: Sequence[Row], mask: Sequence[Mask], how: str) -> float:
    """GRPO: mean of the responses' means. DAPO: mean of all tokens. Dr. GRPO: over a constant, here rows · columns."""
    rows = [[losses[b][t] for t in _counted(mask[b])] for b in range(len(losses))]
    if how == "sequence_mean":
        means = [sum(row) / len(row) for row in rows if row]
        return sum(means) / len(means) if means else 0.0
    total = sum(sum(row) for row in rows)
    if how == "token_mean":
        return total / max(sum(len(row) for row in rows), 1)
    return total / (len(losses) * len(losses[0]))


def exact_kl(p: Row, q: Row) -> float:
    """KL(p‖q) = Σ_v p_v·log(p_v / q_v), every token of the vocabulary enumerated."""
    return sum(pv * math.log(pv / qv) for pv, qv in zip(p, q, strict=True))


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


def token_rewards(scores: Row, kl: Sequence[Row], mask: Sequence[Mask], kl_coef: float) -> list[list[float]]:
    """−β·kl at every counted token; the score on the last of them."""
    out = [[0.0] * len(row) for row in kl]
    for b in range(len(kl)):
        for t in _counted(mask[b]):
            out[b][t] = -kl_coef * kl[b][t]
            if t == _counted(mask[b])[-1]:
                out[b][t] += scores[b]
    return out


def gae(rewards: Row, values: Row, mask: Mask, gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016 eq. 16: A_k = Σ_l (γλ)^l δ_{k+l} over the counted tokens; V is 0 after the last."""
    at = _counted(mask)
    r, v = [rewards[t] for t in at], [values[t] for t in at] + [0.0]
    out = [0.0] * len(mask)
    for k, t in enumerate(at):
        for m in range(k, len(at)):
            out[t] += (gamma * lam) ** (m - k) * (r[m] + gamma * v[m + 1] - v[m])
    return out


def rewards_to_go(rewards: Row, mask: Mask, gamma: float) -> list[float]:
    """G_k = Σ_l γ^l r_{k+l} over the counted tokens."""
    at = _counted(mask)
    out = [0.0] * len(mask)
    for k, t in enumerate(at):
        out[t] = sum(gamma**m * rewards[at[k + m]] for m in range(len(at) - k))
    return out


def group_advantages(scores: Row, group_size: int, scale: str) -> list[float]:
    """DeepSeekMath §4.1.2, Dr. GRPO or Lite PPO; sample standard deviation plus 1e-4."""
    out = []
    for start in range(0, len(scores), group_size):
        group = list(scores[start : start + group_size])
        for score in group:
            advantage = score - sum(group) / len(group)
            if scale == "group":
                advantage /= (statistics.stdev(group) if len(group) > 1 else 0.0) + 1e-4
            if scale == "batch":
                advantage /= (statistics.stdev(scores) if len(scores) > 1 else 0.0) + 1e-4
            out.append(advantage)
    return out


def leave_one_out(scores: Row, group_size: int) -> list[float]:
    """Each score less the mean of the other scores of its group."""
    out = []
    for i, score in enumerate(scores):
        start = i - i % group_size
        others = [scores[j] for j in range(start, start + group_size) if j != i]
        out.append(score - sum(others) / len(others))
    return out


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
    new = math.prod(math.exp(logprobs[t]) for t in _counted(mask))
    old = math.prod(math.exp(old_logprobs[t]) for t in _counted(mask))
    return (new / old) ** (1 / len(_counted(mask)))


def clipped_value(value: float, old: float, target: float, clip: float) -> float:
    """Value clip by cases: inside the band the plain error; outside it the larger of the plain and the band edge's."""
    if old - clip <= value <= old + clip:
        return 0.5 * (value - target) ** 2
    edge = old + clip if value > old else old - clip
    return 0.5 * max((value - target) ** 2, (edge - target) ** 2)


def explained_variance(values: Row, returns: Row) -> float:
    errors = [r - v for v, r in zip(values, returns, strict=True)]
    return 1 - statistics.pvariance(errors) / statistics.pvariance(returns)


def bradley_terry(chosen: float, rejected: float, margin: float = 0.0) -> float:
    """−log of the chance e^chosen / (e^chosen + e^(rejected + margin))."""
    return -math.log(math.exp(chosen) / (math.exp(chosen) + math.exp(rejected + margin)))


def k_wise(scores: Row) -> float:
    """InstructGPT eq. 1 for one prompt, scores best first: mean Bradley–Terry loss of all C(K, 2) pairs."""
    pairs = list(itertools.combinations(scores, 2))
    return sum(bradley_terry(better, worse) for better, worse in pairs) / len(pairs)


def calibration_error(margins: Row, bins: int) -> float:
    """Guo et al. 2017 eq. 3, bin by bin."""
    error = 0.0
    for i in range(bins):
        lower, upper = 0.5 + 0.5 * i / bins, 0.5 + 0.5 * (i + 1) / bins
        inside = []
        for m in margins:
            confidence = 1 / (1 + math.exp(-abs(m)))
            if lower <= confidence < upper or (i == bins - 1 and confidence >= upper):
                inside.append((confidence, 1.0 if m > 0 else 0.5 if m == 0 else 0.0))
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(a for _, a in inside) / len(inside)
            error += len(inside) / len(margins) * abs(accuracy - confidence)
    return error


def softmax(logits: Row) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def entropy(logits: Row) -> float:
    """Shannon: −Σ p·log p, every token of the vocabulary enumerated."""
    return -sum(p * math.log(p) for p in softmax(logits))
