"""Who gets the credit: rewards, returns and advantages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from oracles.reduce import Mask, Row, counted


def token_rewards(scores: Row, kl: Sequence[Row], mask: Sequence[Mask], kl_coef: float) -> list[list[float]]:
    """−β·kl at every counted token; the score on the last of them."""
    out = [[0.0] * len(row) for row in kl]
    for b in range(len(kl)):
        for t in counted(mask[b]):
            out[b][t] = -kl_coef * kl[b][t]
            if t == counted(mask[b])[-1]:
                out[b][t] += scores[b]
    return out


def gae(rewards: Row, values: Row, mask: Mask, gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016 eq. 16: A_k = Σ_l (γλ)^l δ_{k+l} over the counted tokens; V is 0 after the last."""
    at = counted(mask)
    r, v = [rewards[t] for t in at], [values[t] for t in at] + [0.0]
    out = [0.0] * len(mask)
    for k, t in enumerate(at):
        for m in range(k, len(at)):
            out[t] += (gamma * lam) ** (m - k) * (r[m] + gamma * v[m + 1] - v[m])
    return out


def rewards_to_go(rewards: Row, mask: Mask, gamma: float) -> list[float]:
    """G_k = Σ_l γ^l r_{k+l} over the counted tokens."""
    at = counted(mask)
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


def baseline_advantages(scores: Row, group_size: int, baseline: str, scale: str) -> list[float]:
    """Score less what it is compared with, over the sample standard deviation plus 1e-4 (a deviation of 0: over 1)."""
    out = []
    for i, score in enumerate(scores):
        start = i - i % group_size
        group = list(scores[start : start + group_size])
        others = [scores[j] for j in range(start, start + group_size) if j != i]
        against = {
            "group": sum(group) / len(group),
            "leave_one_out": sum(others) / len(others) if others else score,
            "batch": sum(scores) / len(scores),
            "none": 0.0,
        }[baseline]
        whose = {"group": group, "batch": list(scores), "none": []}[scale]
        deviation = statistics.stdev(whose) if len(whose) > 1 else 0.0
        out.append((score - against) / (deviation + 1e-4) if deviation > 0 else score - against)
    return out


def step_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], mask: Sequence[Mask], group_size: int, scale: str
) -> list[list[float]]:
    """DeepSeekMath §4.1.3; ``steps[b]`` holds (index of the last token, score) of each step of response b."""
    out = []
    for b in range(len(steps)):
        start = b - b % group_size
        group = [score for row in steps[start : start + group_size] for _, score in row]
        batch = [score for row in steps for _, score in row]
        whose = {"group": group, "batch": batch, "none": []}[scale]
        deviation = statistics.stdev(whose) if len(whose) > 1 else 0.0
        divisor = deviation + 1e-4 if deviation > 0 else 1.0
        row = [0.0] * len(mask[b])
        for t in counted(mask[b]):
            for end, score in steps[b]:
                if end >= t:
                    row[t] += (score - statistics.fmean(group)) / divisor
        out.append(row)
    return out


def gdpo(scores: Sequence[Row], weights: Row, group_size: int) -> list[float]:
    """GDPO §3: every reward normalised in its group, weighted and summed, normalised over the batch."""
    columns = [group_advantages([row[r] for row in scores], group_size, "group") for r in range(len(weights))]
    mixed = [sum(w * column[i] for w, column in zip(weights, columns, strict=True)) for i in range(len(scores))]
    deviation = statistics.stdev(mixed) if len(mixed) > 1 else 0.0
    return [(x - sum(mixed) / len(mixed)) / (deviation + 1e-4) for x in mixed]
