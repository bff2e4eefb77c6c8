from __future__ import annotations

import itertools
import math

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import importance_weights

LEVELS, BOUNDS = ("token", "sequence"), ("truncate", "mask")


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
@harness.FEW
@given(batch=harness.batches(2, bound=1.0), low=st.none() | st.floats(0.1, 0.9), high=st.floats(1.1, 5))
def test_weights_are_the_oracle(
    level: str, how: str, batch: tuple[list[Tensor], Tensor], low: float | None, high: float
) -> None:
    (logprobs, sampler), mask = batch
    actual, metrics = importance_weights(logprobs, sampler, mask, level=level, how=how, low=low, high=high)
    raw, bounded = [], 0
    for b in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        ratios = [math.exp(logprobs[b, t]) / math.exp(sampler[b, t]) for t in at]
        for k, t in enumerate(at):
            close(actual[b, t], oracles.importance_weight(ratios, k, level, how, low, high), 1e-7)
            raw.append(math.prod(ratios) if level == "sequence" else ratios[k])
            bounded += raw[-1] > high or (low is not None and raw[-1] < low)
    assert (actual[~mask] == 0).all()
    close(metrics["weight_mean"], sum(raw) / len(raw), 1e-7)
    close(metrics["bounded_fraction"], bounded / len(raw), 1e-7)


def test_truncated_and_masked_by_hand() -> None:
    """Weights 1/4, 1 and 8: TIS at 2, IcePop between .5 and 5; their product is 2."""
    logprobs, mask = torch.tensor([[0.25, 1.0, 8.0]]).log().requires_grad_(), torch.ones(1, 3) > 0
    for level, how, low, high, expected, fraction in (
        ("token", "truncate", None, 2.0, [0.25, 1.0, 2.0], 1 / 3),
        ("token", "truncate", 0.5, 2.0, [0.5, 1.0, 2.0], 2 / 3),
        ("token", "mask", 0.5, 5.0, [0.0, 1.0, 0.0], 2 / 3),
        ("sequence", "truncate", None, 1.5, [1.5] * 3, 1.0),
        ("sequence", "mask", None, 1.5, [0.0] * 3, 1.0),
        ("sequence", "mask", None, 3.0, [2.0] * 3, 0.0),
    ):
        actual, metrics = importance_weights(
            logprobs, torch.zeros(1, 3), mask, level=level, how=how, low=low, high=high
        )
        close(actual, [expected], 1e-6)
        close(metrics["bounded_fraction"], fraction, 1e-6)
        assert not actual.requires_grad


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
def test_where_sampler_and_trainer_agree_every_weight_is_one(level: str, how: str) -> None:
    logprobs = torch.randn(6, 5)
    actual, metrics = importance_weights(
        logprobs, logprobs.clone(), harness.MASK, level=level, how=how, low=0.5, high=5
    )
    close(actual, harness.MASK.float(), 0)
    assert {name: value.item() for name, value in metrics.items()} == {"weight_mean": 1.0, "bounded_fraction": 0.0}


def test_sequence_weights_make_expectations_unbiased_and_token_weights_do_not() -> None:
    """All 25 responses of two tokens over a vocabulary of five, drawn by one policy and judged for another."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    first, after = logits[:, 0].log_softmax(-1), logits[:, 1:].log_softmax(-1)  # after[who, first token]
    pairs = torch.tensor(list(itertools.product(range(5), repeat=2)))
    trainer, sampler = (torch.stack([first[w, pairs[:, 0]], after[w][pairs[:, 0], pairs[:, 1]]], 1) for w in (0, 1))
    judged = torch.randn(25, 2, generator=generator, dtype=torch.float64)
    wanted = (trainer.sum(1).exp().unsqueeze(1) * judged).sum()
    for level, unbiased in (("sequence", True), ("token", False)):
        weights, _ = importance_weights(
            trainer, sampler, torch.ones(25, 2) > 0, level=level, how="truncate", low=None, high=1e6
        )
        actual = (sampler.sum(1).exp().unsqueeze(1) * weights * judged).sum()
        assert (abs(actual - wanted) < 1e-9) == unbiased


def test_unknown_words_are_refused() -> None:
    one = torch.ones(1, 1)
    settings = {"low": None, "high": 2.0}
    with pytest.raises(ValueError, match="level is 'word'; expected 'token' or 'sequence'"):
        importance_weights(one, one, one > 0, level="word", how="mask", **settings)
    with pytest.raises(ValueError, match="how is 'clip'; expected 'truncate' or 'mask'"):
        importance_weights(one, one, one > 0, level="token", how="clip", **settings)
