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
    accuracy_by_margin,
    best_of_k_loss,
    calibration_error,
    centering_loss,
    group_mean,
    pairwise_loss,
    ranking_loss,
    score_length_correlation,
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


@harness.FEW
@given(harness.numbers(3), harness.numbers(3), st.floats(0, 0.5))
def test_smoothed_labels_are_the_oracle(chosen: list[float], rejected: list[float], wrong: float) -> None:
    rows = zip(chosen, rejected, strict=True)
    actual = pairwise_loss(tensor(chosen), tensor(rejected), label_smoothing=wrong)
    close(actual, [oracles.smoothed_bradley_terry(*row, wrong) for row in rows], 1e-7)


def test_smoothing_stops_at_the_honest_lead() -> None:
    """A tenth labelled wrong: a lead of log 9 has no gradient, a greater one is pulled back; a margin shifts it."""
    lead = tensor([math.log(9), 3.0, math.log(9) + 1]).requires_grad_()
    loss = pairwise_loss(lead, torch.zeros(3), label_smoothing=0.1, margin=tensor([0.0, 0.0, 1.0]))
    grad = torch.autograd.grad(loss.sum(), lead)[0]
    close(grad[[0, 2]], [0.0, 0.0])
    assert grad[1] > 0
    close(pairwise_loss(tensor([1e4]), tensor([0.0]), label_smoothing=0.1), [1e3])


@harness.FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_best_of_k_is_the_oracle(sizes: list[int], data: st.DataObject) -> None:
    """Prompts with different numbers of responses, their rows interleaved or not."""
    scores = [data.draw(harness.numbers(size)) for size in sizes]
    rows = [(k, p, s) for p, prompt in enumerate(scores) for k, s in enumerate(prompt)]
    for order in (sorted(rows), sorted(rows, key=lambda row: row[1])):
        groups = torch.tensor([p for _, p, _ in order])
        actual = best_of_k_loss(tensor([s for *_, s in order]), groups)
        close(actual, [oracles.best_of_k(prompt) for prompt in scores], 1e-7)


def test_best_of_two_is_a_pair_and_gaps_are_nothing() -> None:
    scores = torch.randn(8, dtype=torch.float64)
    close(best_of_k_loss(scores, torch.arange(8) // 2), pairwise_loss(scores[::2], scores[1::2]))
    close(
        best_of_k_loss(scores[:3], torch.tensor([2, 2, 0])), [0.0, 0.0, pairwise_loss(scores[:1], scores[1:2]).item()]
    )
    assert best_of_k_loss(scores[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("bins", [1, 4, 10])
@harness.FEW
@given(margins=st.lists(st.floats(-6, 6), min_size=1, max_size=12))
def test_reliability_is_the_oracle(margins: list[float], bins: int) -> None:
    actual = accuracy_by_margin(tensor(margins), bins)
    counts, accuracy, confidence = zip(*oracles.reliability(margins, bins), strict=True)
    assert actual.counts.tolist() == list(counts)
    close(actual.accuracy, accuracy, 1e-7)
    close(actual.confidence, confidence, 1e-7)
    close(actual.edges, [0.5 + 0.5 * i / bins for i in range(bins + 1)])
    assert actual.counts.sum() == len(margins)


def test_reliability_by_hand() -> None:
    """A tie, a lead of log 3 (sure to three quarters) that wins and one that loses, in bins of a quarter."""
    lead = math.log(3) + 1e-6
    edges, counts, accuracy, confidence = accuracy_by_margin(tensor([0.0, lead, -lead]), 2)
    assert counts.tolist() == [1, 2]
    close(accuracy, [0.5, 0.5])
    close(confidence, [0.5, 0.75], 1e-5)
    close(edges, [0.5, 0.75, 1.0])
    assert accuracy_by_margin(tensor([]), 3).counts.tolist() == [0, 0, 0]


@harness.FEW
@given(harness.numbers(5), st.lists(st.integers(1, 200), min_size=5, max_size=5))
def test_length_correlation_is_the_oracle(scores: list[float], lengths: list[int]) -> None:
    actual = score_length_correlation(tensor(scores), torch.tensor(lengths))
    if max(scores) - min(scores) > 1e-3 or max(scores) == min(scores):
        close(actual, oracles.correlation(scores, lengths), 1e-6)


def test_length_correlation_of_known_judges() -> None:
    lengths = torch.tensor([3, 900, 41, 7])
    close(score_length_correlation(2.0 * lengths - 1, lengths), 1.0, 1e-6)
    close(score_length_correlation(-lengths.double(), lengths), -1.0, 1e-6)
    close(score_length_correlation(tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1, 1, 2, 2])), 0.0)
    constant = torch.full((7,), 1e4 / 3)  # its mean is off by a rounding: not to be taken for what two constants share
    for scores, of in ((constant, torch.arange(7)), (torch.randn(7), torch.full((7,), 9)), (constant, constant)):
        assert score_length_correlation(scores, of) == 0
    assert score_length_correlation(tensor([]), torch.tensor([])) == 0
    assert score_length_correlation(tensor([1.0]), torch.tensor([4])) == 0
