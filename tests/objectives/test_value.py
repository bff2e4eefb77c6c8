from __future__ import annotations

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import clipped_value_loss, explained_variance


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@harness.FEW
@given(harness.batches(3, bound=3.0), st.floats(0.05, 3))
def test_value_loss_is_the_oracle(batch: tuple[list[Tensor], Tensor], clip: float) -> None:
    (values, old, returns), mask = batch
    actual, _ = clipped_value_loss(values, old, returns, mask, clip=clip)
    for b, t in mask.nonzero().tolist():
        expected = oracles.clipped_value(values[b, t].item(), old[b, t].item(), returns[b, t].item(), clip)
        close(actual[b, t], expected)
    assert (actual[~mask] == 0).all()


def test_no_clip_is_half_the_squared_error_and_so_is_a_clip_that_never_binds() -> None:
    values, old, returns = torch.randn(3, 6, 5)
    expected = torch.where(harness.MASK, 0.5 * (values - returns) ** 2, 0.0)
    for clip in (None, 1e6):
        per_token, metrics = clipped_value_loss(values, old, returns, harness.MASK, clip=clip)
        close(per_token, expected, 1e-6)
        assert metrics["clip_fraction"] == 0


def test_cases_of_the_clip_by_hand() -> None:
    """Old value 0, clip .2, return 1: inside the band, past it, away from the return, beyond the return."""
    values = torch.tensor([[0.1, 0.5, -0.5, 3.0]], requires_grad=True)
    mask = torch.ones(1, 4) > 0
    per_token, metrics = clipped_value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask, clip=0.2)
    close(per_token, [[0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 1.5**2, 0.5 * 2**2]], 1e-6)
    close(torch.autograd.grad(per_token.sum(), values)[0], [[-0.9, 0.0, -1.5, 2.0]], 1e-6)
    close(metrics["clip_fraction"], 0.25)
    assert not metrics["clip_fraction"].requires_grad
    assert metrics["clip_fraction"].shape == ()


def test_clip_fraction_does_not_count_rounding() -> None:
    """Inside the band the two errors are the same number, to the last bit."""
    values, old = torch.rand(50, 20) / 10, torch.rand(50, 20)  # old + (value - old) is seldom the value again
    _, metrics = clipped_value_loss(values, old, torch.zeros(50, 20), torch.ones(50, 20) > 0, clip=1.5)
    assert metrics["clip_fraction"] == 0


def test_clip_fraction_is_a_share_of_counted_tokens() -> None:
    """One of the two counted tokens is clipped; the two that do not count are neither clipped nor unclipped."""
    values, returns = torch.tensor([[1.0, 0.1, 1.0, 0.1]]), torch.ones(1, 4)
    mask = torch.tensor([[True, True, False, False]])
    _, metrics = clipped_value_loss(values, torch.zeros(1, 4), returns, mask, clip=0.2)
    assert metrics["clip_fraction"] == 0.5


@harness.FEW
@given(harness.batches(2))
def test_explained_variance_is_the_oracle(batch: tuple[list[Tensor], Tensor]) -> None:
    (values, returns), mask = batch
    returns = returns + torch.arange(returns.numel()).reshape(returns.shape) / 3
    if returns[mask].var(correction=0) > 1e-2:
        expected = oracles.explained_variance(values[mask].tolist(), returns[mask].tolist())
        close(explained_variance(values, returns, mask), expected, 1e-7)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0, 6.0], 1.0), ([4.0, 5.0, 9.0], 1.0), ([7.0] * 3, 0.0), ([-1.0, -2.0, -6.0], -3.0)],
)
def test_explained_variance_of_known_critics(values: list[float], expected: float) -> None:
    """Perfect, perfect but for a constant, constant, upside down."""
    returns = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    actual = explained_variance(torch.tensor([values]), returns, torch.ones(1, 3) > 0)
    close(actual, expected, 1e-6)
    assert not actual.requires_grad


def test_returns_that_do_not_vary_have_nothing_to_explain() -> None:
    mask = torch.tensor([[True, True, False]])
    returns = torch.tensor([[2.0, 2.0, 5.0]])
    assert explained_variance(torch.tensor([[1.0, 3.0, 5.0]]), returns, mask) == 0
    assert explained_variance(returns, returns, mask) == 0
