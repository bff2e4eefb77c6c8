"""Metrics of a whole validation set: however it is cut into batches and ranks, the value is that of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rlhf.metrics import (
    CalibrationError,
    ComparisonBins,
    Correlation,
    PairAccuracy,
    Perplexity,
    ScoreMoments,
    TokenAccuracy,
)

NAN = float("nan")


class ThreeBins(ComparisonBins):
    """With its number of bins, as the tests below make every metric without arguments."""

    def __init__(self) -> None:
        super().__init__(3)


def batches() -> dict[type[Metric], list[tuple[Tensor, ...]]]:
    """Batches of very different sizes for each metric; log-probabilities under a False mask are NaN."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(50, generator=generator) * 2 + 0.5
    margins[7] = 0.0
    lengths = torch.randint(1, 500, (9,), generator=generator)
    mask = torch.rand(9, 6, generator=generator) < 0.6
    logprobs = (-torch.rand(9, 6, generator=generator) * 3).masked_fill(~mask, NAN)
    correct = torch.rand(9, 6, generator=generator) < 0.7

    def cut(*whole: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(part.split([1, 6, 2]) for part in whole), strict=True))

    return {
        PairAccuracy: [(part,) for part in margins.split([1, 40, 9])],
        CalibrationError: [(part,) for part in margins.split([1, 40, 9])],
        ScoreMoments: [(part,) for part in margins.split([1, 40, 9])],
        Correlation: cut(margins[:9], lengths),
        ThreeBins: cut(margins[:9], torch.tensor([0, 1, 2] * 3)),
        Perplexity: cut(logprobs, mask),
        TokenAccuracy: cut(correct, mask),
    }


def accuracy(margins: Tensor) -> float:
    wins = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins.tolist()]
    return sum(wins) / len(wins)


def calibration(margins: Tensor) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    error = 0.0
    for lower in [0.5 + 0.05 * i for i in range(10)]:
        inside = [m for m in margins.tolist() if lower <= 1 / (1 + torch.e ** -abs(m)) < lower + 0.05]
        if inside:
            right = accuracy(torch.tensor(inside))
            confidence = sum(1 / (1 + torch.e ** -abs(m)) for m in inside) / len(inside)
            error += len(inside) / len(margins) * abs(right - confidence)
    return error


def perplexity(logprobs: Tensor, mask: Tensor) -> float:
    return torch.exp(-logprobs[mask].double().mean()).item()


def share(correct: Tensor, mask: Tensor) -> float:
    return correct[mask].double().mean().item()


def moments(scores: Tensor) -> tuple[float, float]:
    return scores.double().mean().item(), scores.double().std(correction=0).item()


def pearson(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


def binned(margins: Tensor, bins: Tensor) -> list[list[float]]:
    inside = [margins[bins == i] for i in range(3)]
    return [[len(m), accuracy(m) if len(m) else NAN, m.abs().sigmoid().mean().item()] for m in inside]


def near(expected: Any) -> Any:
    """Approximately equal; of a table, row by row."""
    if isinstance(expected, list):
        return [pytest.approx(row, rel=1e-5) for row in expected]
    return pytest.approx(expected, rel=1e-5)


CASES: list[tuple[type[Metric], Callable[..., Any]]] = [
    (PairAccuracy, accuracy),
    (CalibrationError, calibration),
    (Perplexity, perplexity),
    (TokenAccuracy, share),
    (ScoreMoments, moments),
    (Correlation, pearson),
    (ThreeBins, binned),
]


@pytest.mark.parametrize(("metric", "whole"), CASES, ids=lambda case: case.__name__)
def test_batches_add_up_to_the_whole(metric: type[Metric], whole: Callable[..., Any]) -> None:
    parts = batches()[metric]
    measured = metric()
    for part in parts:
        measured.update(*part)
    expected = whole(*(torch.cat(column) for column in zip(*parts, strict=True)))
    assert torch.as_tensor(measured.compute()).tolist() == near(expected)
    measured.reset()
    measured.update(*parts[1])
    assert torch.as_tensor(measured.compute()).tolist() == near(whole(*parts[1]))


@pytest.mark.parametrize(("metric", "whole"), CASES, ids=lambda case: case.__name__)
def test_ranks_add_up_to_the_whole(metric: type[Metric], whole: Callable[..., Any]) -> None:
    first, second, third = batches()[metric]
    here, there = metric(), metric()
    here.update(*first)
    there.update(*second)
    there.update(*third)
    here.merge_state(there)
    expected = whole(*(torch.cat(column) for column in zip(first, second, third, strict=True)))
    assert torch.as_tensor(here.compute()).tolist() == near(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("metric", [case[0] for case in CASES])
def test_bfloat16_and_gradients_are_taken(metric: type[Metric], dtype: torch.dtype) -> None:
    measured = metric()
    for part in batches()[metric]:
        measured.update(*(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in part))
    states = [
        part for state in measured.metric_state.values() for part in (state if isinstance(state, list) else [state])
    ]
    assert not any(part.requires_grad for part in states)  # a graph per batch would be kept until the epoch ends
    value = torch.as_tensor(measured.compute())
    assert value.dtype == torch.float32
    assert value.isfinite().all()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_seen_is_not_a_number_and_no_crash() -> None:
    assert CalibrationError().compute() == 0
    for metric in (PairAccuracy(), Perplexity(), TokenAccuracy(), ScoreMoments(), Correlation()):
        assert torch.as_tensor(metric.compute()).isnan().all()
    assert ComparisonBins(2).compute()[:, 0].tolist() == [0, 0]
    assert ComparisonBins(2).compute()[:, 1:].isnan().all()


def test_what_never_changes_correlates_with_nothing() -> None:
    measured = Correlation()
    measured.update(torch.full((7,), 0.1), torch.arange(7))
    assert measured.compute().isnan()


def test_the_moments_of_large_scores_are_exact() -> None:
    """Sums of squares would cancel in float32."""
    measured = ScoreMoments()
    for scores in (torch.arange(100.0) + 1e5).split(7):
        measured.update(scores)
    assert measured.compute()[1].item() == pytest.approx(28.866, rel=1e-3)


def test_bins_count() -> None:
    margins = torch.tensor([0.1, 0.3, -0.2, 3.0])
    values = []
    for bins in (1, 10):
        measured = CalibrationError(bins=bins)
        measured.update(margins)
        values.append(measured.compute().item())
    assert values[0] != values[1]
    with pytest.raises(ValueError, match="bins is 0"):
        CalibrationError(bins=0)
