"""Means, whitening, aggregation, distributions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Row = Sequence[float]
Mask = Sequence[bool]


def counted(mask: Mask) -> list[int]:
    return [t for t, counts in enumerate(mask) if counts]


def mean(x: Sequence[Row], mask: Sequence[Mask]) -> float:
    kept = [x[b][t] for b in range(len(x)) for t in counted(mask[b])]
    return sum(kept) / len(kept) if kept else 0.0


def whiten(x: Sequence[Row], mask: Sequence[Mask], center: bool) -> list[list[float]]:
    """Ziegler et al. 2019, over counted entries: subtract the mean, divide by √(population variance + 1e-8)."""
    kept = [x[b][t] for b in range(len(x)) for t in counted(mask[b])]
    out = [[0.0] * len(row) for row in x]
    for b in range(len(x)):
        for t in counted(mask[b]):
            middle = sum(kept) / len(kept)
            z = (x[b][t] - middle) / math.sqrt(statistics.pvariance(kept) + 1e-8)
            out[b][t] = z if center else z + middle
    return out


def aggregate(losses: Sequence[Row], mask: Sequence[Mask], how: str) -> float:
    """GRPO: mean of the responses' means. DAPO: mean of all tokens. Dr. GRPO: over a constant, here rows · columns."""
    rows = [[losses[b][t] for t in counted(mask[b])] for b in range(len(losses))]
    if how == "sequence_mean":
        means = [sum(row) / len(row) for row in rows if row]
        return sum(means) / len(means) if means else 0.0
    total = sum(sum(row) for row in rows)
    if how == "token_mean":
        return total / max(sum(len(row) for row in rows), 1)
    return total / (len(losses) * len(losses[0]))


def softmax(logits: Row) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def entropy(logits: Row) -> float:
    """Shannon: −Σ p·log p, every token of the vocabulary enumerated."""
    return -sum(p * math.log(p) for p in softmax(logits))


def exact_kl(p: Row, q: Row) -> float:
    """KL(p‖q) = Σ_v p_v·log(p_v / q_v), every token of the vocabulary enumerated."""
    return sum(pv * math.log(pv / qv) for pv, qv in zip(p, q, strict=True))
