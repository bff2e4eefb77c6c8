"""Metrics of a whole validation set: torchmetrics shells, exact over unequal batches and over ranks.

Each is updated batch by batch; ``compute()`` gives what the function would give on all data at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_rlhf.objectives import calibration_error


class PairAccuracy(Metric):
    """Share of comparisons in which the preferred response has the higher score; a tie counts as half right."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, margins: Tensor) -> None:
        """Count ``margins`` [M], score of the preferred response less that of the other."""
        self.correct += ((margins.sign() + 1) / 2).sum()
        self.total += margins.numel()

    def compute(self) -> Tensor:
        """Accuracy, 0 to 1; NaN for no comparisons."""
        return self.correct / self.total


class CalibrationError(Metric):
    """Expected calibration error of the preferences that the scores imply, p = σ(margin) (Guo et al. 2017).

    Args:
        bins: equal bins over the confidence, from ½ to 1.
        kwargs: torchmetrics' own settings.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    margins: list[Tensor]

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"CalibrationError: bins is {bins}, expected 1 or more")
        self.bins = bins
        self.add_state("margins", [], dist_reduce_fx="cat")

    def update(self, margins: Tensor) -> None:
        """Keep ``margins`` [M], score of the preferred response less that of the other."""
        self.margins.append(margins.detach().float())

    def compute(self) -> Tensor:
        """Error, 0 to 1."""
        return calibration_error(_joined(self.margins, self.device), self.bins)


class Perplexity(Metric):
    """exp of the mean negative log-likelihood over all counted tokens, each token weighing the same."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logprobs: Tensor, mask: Tensor) -> None:
        """Add tokens by their log-probabilities [B, T]; only those under ``mask`` [B, T] count."""
        self.nll -= torch.where(mask, logprobs.float(), 0.0).sum()
        self.tokens += mask.sum()

    def compute(self) -> Tensor:
        """Perplexity, at least 1; NaN for no tokens."""
        return (self.nll / self.tokens).exp()


class TokenAccuracy(Metric):
    """Share of the counted tokens that the model ranked first."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor, mask: Tensor) -> None:
        """Add tokens: ``correct`` [B, T] bool, those under ``mask`` [B, T] count."""
        self.correct += (correct & mask).sum()
        self.tokens += mask.sum()

    def compute(self) -> Tensor:
        """Accuracy, 0 to 1; NaN for no tokens."""
        return self.correct / self.tokens


class ScoreMoments(Metric):
    """Mean and standard deviation of all scores, as they are saved with a reward model."""

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")  # not sums of squares: these cancel in float32

    def update(self, scores: Tensor) -> None:
        """Keep ``scores`` [N]."""
        self.scores.append(scores.detach().float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation; NaN for no scores."""
        scores = _joined(self.scores, self.device)
        return scores.mean(), (scores - scores.mean()).square().mean().sqrt()


class Correlation(Metric):
    """Pearson's correlation of two quantities, −1 to 1."""

    is_differentiable = False
    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("first", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Keep both quantities, [N] each."""
        self.first.append(first.detach().float())
        self.second.append(second.detach().float())

    def compute(self) -> Tensor:
        """Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)²·Σ(y − ȳ)²); NaN where one of them never changes."""
        pairs = torch.stack([_joined(self.first, self.device), _joined(self.second, self.device)])
        if not pairs.numel():
            return pairs.new_full((), torch.nan)
        x, y = pairs - pairs.mean(dim=1, keepdim=True)
        correlation = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
        changes = (pairs.amax(dim=1) > pairs.amin(dim=1)).all()
        return torch.where(changes, correlation, torch.nan)


class ComparisonBins(Metric):
    """Comparisons in bins: how many, how often the scores were right, and how sure they were, p = σ(|margin|).

    Args:
        bins: number of bins.
        kwargs: torchmetrics' own settings.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, bins: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(bins, 3), dist_reduce_fx="sum")

    def update(self, margins: Tensor, bins: Tensor) -> None:
        """Add ``margins`` [M], preferred less other score, to the ``bins`` [M] (long); a tie is half right."""
        margins = margins.detach().float()
        kinds = torch.stack([torch.ones_like(margins), (margins.sign() + 1) / 2, margins.abs().sigmoid()], dim=1)
        self.sums = self.sums.index_add(0, bins, kinds)

    def compute(self) -> Tensor:
        """Count, accuracy and mean confidence of each bin, [bins, 3]; the latter two NaN where it is empty."""
        return torch.cat([self.sums[:, :1], self.sums[:, 1:] / self.sums[:, :1]], dim=1)


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    # After a reduction over ranks the list is a tensor already; with no updates it is empty.
    return dim_zero_cat(parts) if len(parts) else torch.zeros(0, device=device)
