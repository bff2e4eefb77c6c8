"""What held-out comparisons say of a reward model: metrics of the whole set, and two tables for people."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_rlhf.batch import Pairs
from lit_rlhf.metrics import CalibrationError, ComparisonBins, Correlation, PairAccuracy, ScoreMoments

BINS = 10  # of equal width over the confidence, ½ to 1
LENGTHS = ("shorter", "as long", "longer")  # the preferred response, beside the other one


class HeldOut(nn.Module):
    """Metrics of a reward model on held-out comparisons, exact over unequal batches and over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy, self.calibration = MeanMetric(), PairAccuracy(), CalibrationError(BINS)
        self.scores, self.best = ScoreMoments(), ScoreMoments()
        self.length_correlation = Correlation()
        self.by_confidence, self.by_length = ComparisonBins(BINS), ComparisonBins(len(LENGTHS))

    def update(self, batch: Pairs, losses: Tensor, scores: Tensor) -> None:
        """Add a batch: the loss of each prompt and the score [N] of each response; only prompts that count."""
        lengths = batch.mask.sum(dim=1) if batch.lengths is None else batch.lengths
        better, worse = batch.better, batch.worse
        rows = torch.ones_like(batch.best) if batch.counts is None else batch.counts
        if batch.counts is not None:
            better, worse = better[rows[better]], worse[rows[worse]]
            losses = losses[batch.groups[rows[batch.better]].unique()]
        margins = scores[better] - scores[worse]
        self.loss.update(losses)
        for metric in (self.accuracy, self.calibration):
            metric.update(margins)
        self.scores.update(scores[rows])
        self.best.update(scores[batch.best & rows])
        self.length_correlation.update(scores[rows], lengths[rows])
        sure = margins.detach().float().abs().sigmoid()
        self.by_confidence.update(margins, ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1))
        self.by_length.update(margins, (lengths[better] - lengths[worse]).sign() + 1)

    def compute(self) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
        """The metrics by name, and the rows of the tables ``calibration`` and ``length_bias``; all begin anew."""
        (mean, std), by_length = self.scores.compute(), self.by_length.compute()
        metrics = {
            "loss": self.loss.compute(),
            "accuracy": self.accuracy.compute(),
            "calibration_error": self.calibration.compute(),
            "score_mean": mean,
            "score_std": std,
            "best_mean": self.best.compute()[0],
            "score_length_correlation": self.length_correlation.compute(),
            "accuracy_shorter": by_length[0, 1],
            "accuracy_longer": by_length[2, 1],
        }
        edges = [0.5 + 0.5 * i / BINS for i in range(BINS + 1)]
        confidence = [
            {"confidence_from": low, "confidence_to": high, "lead_from": round(math.log(low / (1 - low)), 3)}
            for low, high in itertools.pairwise(edges)
        ]
        tables = {
            "calibration": _filled(confidence, self.by_confidence.compute()),
            "length_bias": _filled([{"preferred_is": length} for length in LENGTHS], by_length),
        }
        for metric in self.children():
            metric.reset()  # type: ignore[operator]
        return metrics, tables


def _filled(rows: list[dict[str, Any]], bins: Tensor) -> list[dict[str, Any]]:
    """Put count, accuracy and confidence [rows, 3] into the rows; None where there is nothing to average."""
    for row, (count, *means) in zip(rows, bins.tolist(), strict=True):
        accuracy, confidence = (None if math.isnan(mean) else round(mean, 4) for mean in means)
        row |= {"count": int(count), "accuracy": accuracy, "confidence": confidence}
    return rows
