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

from lit_rlhf.objectives import (
    best_of_k_loss,
    calibration_error,
    centering_loss,
    group_mean,
    pairwise_loss,
    ranking_loss,
)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensor(x: list[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


@harness.FEW
@given(harness.numbers(4), harness.numbers(4), harness.numbers(4, bound=3.0))
def test_pairwise_loss_is_bradley_terry(chosen: list[float], rejected: list[float], margin: list[float]) -> None:
    expected = [oracles.bradley_terry(*pair) for pair in zip(chosen, rejected, strict=True)]
    close(pairwise_loss(tensor(chosen), tensor(rejected)), expected)
    expected = [oracles.bradley_terry(*pair) for pair in zip(chosen, rejected, margin, strict=True)]
    close(pairwise_loss(tensor(chosen), tensor(rejected), margin=tensor(margin)), expected)


@harness.FEW
@given(harness.numbers(3), harness.numbers(3), st.floats(-5, 5))
def test_comparisons_do_not_see_a_common_shift_and_centering_does(
    chosen: list[float], rejected: list[float], shift: float
) -> None:
    a, b = tensor(chosen), tensor(rejected)
    close(pairwise_loss(a + shift, b + shift), pairwise_loss(a, b))
    close(centering_loss(a, b), [(x + y) ** 2 for x, y in zip(chosen, rejected, strict=True)])
    close(centering_loss(a - (a + b) / 2, b - (a + b) / 2), [0.0] * 3)


def test_pairwise_gradient_is_the_chance_of_being_wrong() -> None:
    chosen, rejected = tensor([1.0, -2.0]).requires_grad_(), tensor([0.5, 1.0]).requires_grad_()
    grads = torch.autograd.grad(pairwise_loss(chosen, rejected).sum(), (chosen, rejected))
    wrong = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-3.0))]
    close(grads[0], [-p for p in wrong])
    close(grads[1], wrong)


@harness.FEW
@given(st.lists(st.integers(2, 5), min_size=1, max_size=3), st.data())
def test_ranking_loss_is_the_k_wise_oracle(sizes: list[int], data: st.DataObject) -> None:
    """Prompts with different numbers of responses, their rows interleaved."""
    scores = [data.draw(harness.numbers(size)) for size in sizes]
    rows = [(k, p, s) for p, prompt in enumerate(scores) for k, s in enumerate(prompt)]
    for order in (sorted(rows), sorted(rows, key=lambda row: row[1])):
        groups = torch.tensor([p for _, p, _ in order])
        actual = ranking_loss(tensor([s for *_, s in order]), groups)
        close(actual, [oracles.k_wise(prompt) for prompt in scores])


def test_ranking_two_responses_is_a_pair_and_k_is_the_mean_of_its_pairs() -> None:
    scores = torch.randn(8, dtype=torch.float64)
    close(ranking_loss(scores, torch.arange(8) // 2), pairwise_loss(scores[::2], scores[1::2]))
    better, worse = torch.tensor(list(itertools.combinations(range(4), 2))).T
    losses = torch.cat(
        [pairwise_loss(scores[better], scores[worse]), pairwise_loss(scores[4 + better], scores[4 + worse])]
    )
    close(ranking_loss(scores, torch.arange(8) // 4), group_mean(losses, torch.arange(12) // 6))


def test_a_prompt_with_one_response_has_nothing_to_compare() -> None:
    scores = tensor([1.0, 0.0, 5.0, 7.0])
    alone = ranking_loss(scores, torch.tensor([1, 1, 0, 2]))
    close(alone, [0.0, oracles.bradley_terry(1.0, 0.0), 0.0])
    close(ranking_loss(scores[:1], torch.tensor([0])), [0.0])
    assert ranking_loss(scores[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)


@harness.FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_best_of_k_loss_is_cross_entropy_with_the_first_as_its_class(sizes: list[int], data: st.DataObject) -> None:
    """Rows of prompts interleaved; K may be 1, which is no question."""
    scores = [data.draw(harness.numbers(size)) for size in sizes]
    expected = [math.log(sum(math.exp(s) for s in prompt)) - prompt[0] for prompt in scores]
    rows = sorted((k, p, s) for p, prompt in enumerate(scores) for k, s in enumerate(prompt))
    close(best_of_k_loss(tensor([s for *_, s in rows]), torch.tensor([p for _, p, _ in rows])), expected)


def test_best_of_two_is_a_pair_large_scores_are_finite_and_the_gradient_is_softmax_less_one() -> None:
    scores = tensor([1.0, -2.0, 900.0, 1000.0]).requires_grad_()
    losses = best_of_k_loss(scores, torch.tensor([0, 0, 1, 1]))
    close(losses.detach(), pairwise_loss(scores[::2], scores[1::2]).detach())
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    wrong = 1 / (1 + math.exp(3.0))
    close(gradient, [-wrong, wrong, -1.0, 1.0])


def test_smoothed_labels_ask_for_a_finite_lead() -> None:
    """At the lead whose odds are those of the label, log((1 − ε) / ε), the gradient is 0."""
    lead = tensor([math.log(0.9 / 0.1)]).requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise_loss(lead, tensor([0.0]), label_smoothing=0.1).sum(), lead)
    close(gradient, [0.0])


@pytest.mark.parametrize("bins", [1, 4, 10])
@harness.FEW
@given(margins=st.lists(st.floats(-6, 6), min_size=1, max_size=12))
def test_calibration_error_is_the_oracle(margins: list[float], bins: int) -> None:
    close(calibration_error(tensor(margins), bins), oracles.calibration_error(margins, bins), 1e-7)


def test_calibration_of_known_judges() -> None:
    """Leads of log 3 that win three times in four are honest, sure and always wrong is 1, ties are honest."""
    lead = math.log(3)
    close(calibration_error(tensor([lead, lead, lead, -lead])), 0.0)
    close(calibration_error(tensor([lead, -lead])), 0.25)
    close(calibration_error(tensor([-100.0, -100.0])), 1.0)
    close(calibration_error(tensor([100.0])), 0.0)
    close(calibration_error(tensor([0.0])), 0.0)
    close(calibration_error(tensor([])), 0.0)
    assert not calibration_error(tensor([1.0]).requires_grad_()).requires_grad


def test_bins_keep_opposite_errors_apart() -> None:
    """Too sure at one confidence and not sure enough at another cancel in one bin, not in ten."""
    margins = tensor(
        [math.log(1.5), math.log(1.5), math.log(9), -math.log(9)]
    )  # .6 right twice, .9 right half the time
    close(calibration_error(margins, 1), 0.0)
    close(calibration_error(margins, 10), 0.4)
