from __future__ import annotations

import math

import harness
import oracles
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lit_rlhf.objectives import entropy_from_logits, next_token_loss


def close(actual: Tensor, expected: object) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@harness.FEW
@given(harness.batches())
def test_next_token_loss_is_the_mean_surprise_of_counted_tokens(batch: tuple[list[Tensor], Tensor]) -> None:
    (logprobs,), mask = batch
    close(next_token_loss(logprobs, mask), -oracles.mean(logprobs.tolist(), mask.tolist()))
    total = sum(-x for x in logprobs[mask].tolist())
    close(next_token_loss(logprobs, mask, 40.0), total / 40)
    close(next_token_loss(logprobs, mask, torch.tensor(40)), total / 40)


def test_next_token_loss_is_cross_entropy() -> None:
    """What torch computes from logits and labels, padding ignored."""
    logits, labels = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.where(mask, labels, -100).flatten(), ignore_index=-100
    )
    logprobs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    close(next_token_loss(logprobs, mask), expected)


@harness.FEW
@given(harness.numbers(5))
def test_entropy_is_the_oracle(logits: list[float]) -> None:
    x = torch.tensor([logits, logits], dtype=torch.float64)
    close(entropy_from_logits(x), [oracles.entropy(logits)] * 2)
    close(entropy_from_logits(x + 3.0), entropy_from_logits(x))


def test_entropy_of_known_distributions() -> None:
    close(entropy_from_logits(torch.zeros(2, 3, 8)), torch.full((2, 3), math.log(8)))
    close(entropy_from_logits(torch.tensor([1e4, 0.0, -1e4])), 0.0)


@pytest.mark.parametrize("low", [-math.inf, -1e4, -1e30])
def test_tokens_that_cannot_occur_add_nothing_and_get_no_gradient(low: float) -> None:
    logits = torch.tensor([0.0, 1.0, low], requires_grad=True)
    short = torch.tensor([0.0, 1.0], requires_grad=True)
    close(entropy_from_logits(logits), entropy_from_logits(short).item())
    grads = [torch.autograd.grad(entropy_from_logits(x), x)[0] for x in (logits, short)]
    close(grads[0][:2], grads[1])
    assert grads[0][2] == 0
