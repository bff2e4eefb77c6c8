"""Scores from comparisons."""

from __future__ import annotations

import itertools
import math
import statistics

from oracles.reduce import Row


def bradley_terry(chosen: float, rejected: float, margin: float = 0.0) -> float:
    """−log of the chance e^chosen / (e^chosen + e^(rejected + margin))."""
    return -math.log(math.exp(chosen) / (math.exp(chosen) + math.exp(rejected + margin)))


def k_wise(scores: Row) -> float:
    """InstructGPT eq. 1 for one prompt, scores best first: mean Bradley–Terry loss of all C(K, 2) pairs."""
    pairs = list(itertools.combinations(scores, 2))
    return sum(bradley_terry(better, worse) for better, worse in pairs) / len(pairs)


def smoothed_bradley_terry(chosen: float, rejected: float, wrong: float) -> float:
    """Cross-entropy when a share ``wrong`` of the labels is the wrong way round."""
    return (1 - wrong) * bradley_terry(chosen, rejected) + wrong * bradley_terry(rejected, chosen)


def best_of_k(scores: Row) -> float:
    """Ziegler et al. 2019 eq. 1 for one prompt, the chosen response first."""
    return -math.log(math.exp(scores[0]) / sum(math.exp(score) for score in scores))


def reliability(margins: Row, bins: int) -> list[tuple[int, float, float]]:
    """Comparisons, share of them right, mean confidence, bin by bin."""
    rows = []
    for i in range(bins):
        lower, upper = 0.5 + 0.5 * i / bins, 0.5 + 0.5 * (i + 1) / bins
        inside = []
        for m in margins:
            confidence = 1 / (1 + math.exp(-abs(m)))
            if lower <= confidence < upper or (i == bins - 1 and confidence >= upper):
                inside.append((confidence, 1.0 if m > 0 else 0.5 if m == 0 else 0.0))
        n = len(inside)
        rows.append((n, sum(a for _, a in inside) / n if n else 0.0, sum(c for c, _ in inside) / n if n else 0.0))
    return rows


def correlation(x: Row, y: Row) -> float:
    """Pearson, by the definition; 0 if one of the two does not vary."""
    if max(x) == min(x) or max(y) == min(y):
        return 0.0
    return statistics.covariance(x, y) / (statistics.stdev(x) * statistics.stdev(y))


def calibration_error(margins: Row, bins: int) -> float:
    """Guo et al. 2017 eq. 3, bin by bin."""
    rows = reliability(margins, bins)
    return sum(n / len(margins) * abs(accuracy - confidence) for n, accuracy, confidence in rows)
