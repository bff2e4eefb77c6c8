from __future__ import annotations

import harness
import oracles
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lit_rlhf.objectives import aggregate, group_mean, masked_mean, masked_whiten

HOW = ("token_mean", "sequence_mean", "fixed_length")


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=1e-9)


@harness.FEW
@given(harness.batches())
def test_masked_mean_is_the_oracle(batch: tuple[list[Tensor], Tensor]) -> None:
    (x,), mask = batch
    close(masked_mean(x, mask), oracles.mean(x.tolist(), mask.tolist()))
    rows = [oracles.mean([row], [counts]) for row, counts in zip(x.tolist(), mask.tolist(), strict=True)]
    close(masked_mean(x, mask, dim=1), rows)


@pytest.mark.parametrize("center", [True, False])
@harness.FEW
@given(batch=harness.batches())
def test_whiten_is_the_oracle(batch: tuple[list[Tensor], Tensor], center: bool) -> None:
    (x,), mask = batch
    close(masked_whiten(x, mask, center=center), oracles.whiten(x.tolist(), mask.tolist(), center))


@harness.FEW
@given(harness.batches())
def test_whitened_entries_have_variance_one_and_the_promised_mean(batch: tuple[list[Tensor], Tensor]) -> None:
    (x,), mask = batch
    x = torch.where(mask, x + torch.linspace(0, 1, x.numel()).reshape(x.shape), torch.nan)
    kept = x[mask]
    centered, kept_mean = masked_whiten(x, mask)[mask], masked_whiten(x, mask, center=False)[mask]
    close(centered.mean(), 0.0)
    close(kept_mean.mean(), kept.mean())
    if kept.var(correction=0) > 1e-3:
        for whitened in (centered, kept_mean):
            torch.testing.assert_close(whitened.var(correction=0).item(), 1.0, rtol=1e-4, atol=0)
    close(masked_whiten(x, mask), masked_whiten(x + 3.0, mask))


@pytest.mark.parametrize("how", HOW)
@harness.FEW
@given(batch=harness.batches())
def test_aggregate_is_the_oracle(batch: tuple[list[Tensor], Tensor], how: str) -> None:
    (x,), mask = batch
    close(aggregate(x, mask, how), oracles.aggregate(x.tolist(), mask.tolist(), how))


@pytest.mark.parametrize(("how", "expected"), [("token_mean", 2.2), ("sequence_mean", 2.35), ("fixed_length", 1.65)])
def test_aggregation_values_of_the_rlhf_book(how: str, expected: float) -> None:
    """Token losses [1, 1, 1, 1, 10] and [1 x 9, 10]."""
    columns, lengths = torch.arange(10), torch.tensor([[5], [10]])
    losses, mask = torch.where(columns == lengths - 1, 10.0, 1.0), columns < lengths
    close(aggregate(losses, mask, how), expected)


@pytest.mark.parametrize("how", HOW)
def test_a_denominator_from_outside_divides_the_sum(how: str) -> None:
    mask = torch.tensor([[True, True], [True, False]])
    losses = torch.tensor([[2.0, 4.0], [6.0, torch.nan]])
    total = 9.0 if how == "sequence_mean" else 12.0
    close(aggregate(losses, mask, how, 5.0), total / 5)
    close(aggregate(losses, mask, how, torch.tensor(5)), total / 5)
    close(aggregate(losses, mask, how, 0.5), total / 0.5)
    close(aggregate(losses, mask, how, torch.tensor(0.5)), total / 0.5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("denominator", [None, 0.0, torch.tensor(0.0), torch.tensor(0), 7.0])
def test_nothing_to_count_is_zero(how: str, denominator: float | Tensor | None) -> None:
    """Also when the whole optimizer step holds no token."""
    losses = torch.full((2, 3), torch.nan, requires_grad=True)
    total = aggregate(losses, torch.zeros(2, 3, dtype=torch.bool), how, denominator)
    total.backward()
    assert total.item() == 0.0
    assert (losses.grad == 0).all()


@pytest.mark.parametrize(("how", "left", "kept"), [("token_mean", 3, 7), ("sequence_mean", 2, 3)])
def test_a_response_that_was_cut_off_can_be_left_out(how: str, left: int, kept: int) -> None:
    """Its row of False adds nothing and is not counted, unless the denominator from outside counts it."""
    mask = torch.arange(4) < torch.tensor([[2], [4], [1]])
    losses = torch.randn(3, 4, requires_grad=True)
    without = mask & torch.tensor([[True], [False], [True]])
    close(aggregate(losses, without, how), aggregate(losses[[0, 2]], mask[[0, 2]], how))
    close(aggregate(losses, without, how) * left, aggregate(losses, without, how, float(kept)) * kept)
    assert (torch.autograd.grad(aggregate(losses, without, how), losses)[0][1] == 0).all()


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="how is 'mean'; expected 'token_mean', 'sequence_mean' or 'fixed_length'"):
        aggregate(torch.ones(1, 1), torch.ones(1, 1) > 0, "mean")


def test_group_mean_takes_groups_in_any_order_and_gives_zero_to_empty_ones() -> None:
    close(group_mean(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, 2, 0])), [2.0, 0.0, 5.0])
    assert group_mean(torch.ones(0), torch.ones(0, dtype=torch.long)).shape == (0,)
