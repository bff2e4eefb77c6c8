from __future__ import annotations

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import (
    baseline_advantages,
    group_advantages,
    leave_one_out_advantages,
    masked_whiten,
    normalize_then_sum,
    step_advantages,
)

BASELINES, SCALES = ("group", "leave_one_out", "batch", "none"), ("group", "batch", "none")


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


scores_of_groups = st.integers(1, 3).flatmap(
    lambda size: st.integers(1, 3).flatmap(
        lambda groups: st.tuples(st.just(size + 1), harness.numbers((size + 1) * groups))
    )
)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@harness.FEW
@given(drawn=scores_of_groups)
def test_group_advantages_are_the_oracle(scale: str, drawn: tuple[int, list[float]]) -> None:
    size, scores = drawn
    actual = group_advantages(torch.tensor(scores, dtype=torch.float64), size, scale=scale)
    close(actual, oracles.group_advantages(scores, size, scale), 1e-8)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@harness.FEW
@given(drawn=scores_of_groups, shift=st.integers(-50, 50))
def test_group_advantages_sum_to_zero_and_are_blind_to_shift(
    scale: str, drawn: tuple[int, list[float]], shift: int
) -> None:
    size, scores = drawn[0], torch.tensor(drawn[1], dtype=torch.float64)
    advantages = group_advantages(scores, size, scale=scale)
    close(advantages.reshape(-1, size).sum(1), torch.zeros(len(scores) // size), 1e-7)
    close(group_advantages(scores + shift, size, scale=scale), advantages, 1e-6)


@pytest.mark.parametrize(("scale", "factor"), [("group", 1.0), ("batch", 1.0), ("none", 1000.0)])
def test_scaled_group_advantages_are_blind_to_scale(scale: str, factor: float) -> None:
    """Up to the 1e-4; unscaled ones grow with the scores."""
    scores = torch.tensor([1.0, 2.0, 4.0, -1.0, 0.0, 7.0])
    small, large = (group_advantages(s, 3, scale=scale) for s in (scores, 1000 * scores))
    close(large, factor * small, 1e-3)


def test_whose_standard_deviation_divides() -> None:
    """Two groups of unlike spread: each by its own, or both by the batch's."""
    scores = torch.tensor([0.0, 2.0, 10.0, 30.0])
    close(group_advantages(scores, 2), [-0.70710, 0.70710, -0.70710, 0.70710], 1e-4)
    close(group_advantages(scores, 2, scale="batch"), [-1 / 13.7, 1 / 13.7, -10 / 13.7, 10 / 13.7], 1e-3)
    close(group_advantages(scores, 2, scale="none"), [-1.0, 1.0, -10.0, 10.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("score", [0.1, 1e4 / 3])
def test_equal_scores_and_lone_responses_get_exactly_nothing(scale: str, score: float) -> None:
    """Seven times 10000/3 has a mean that is off by 2e-4; divided by almost 0 that would be an advantage of .7."""
    assert (group_advantages(torch.full((14,), score), 7, scale=scale) == 0).all()
    assert (group_advantages(torch.tensor([1.0, score]), 1, scale=scale) == 0).all()
    assert (group_advantages(torch.tensor([score]), 1, scale=scale) == 0).all()
    assert (leave_one_out_advantages(torch.full((14,), score), 7) == 0).all()
    assert (leave_one_out_advantages(torch.tensor([1.0, score]), 1) == 0).all()


def test_group_size_must_divide_and_scale_must_be_known() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size 5"):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(RuntimeError, match="invalid for input of size 5"):
        leave_one_out_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="scale is 'std'; expected 'group', 'batch' or 'none'"):
        group_advantages(torch.zeros(4), 2, scale="std")


@harness.FEW
@given(scores_of_groups)
def test_leave_one_out_is_the_oracle_and_a_stretched_group_advantage(drawn: tuple[int, list[float]]) -> None:
    size, scores = drawn[0], torch.tensor(drawn[1], dtype=torch.float64)
    advantages = leave_one_out_advantages(scores, size)
    close(advantages, oracles.leave_one_out(drawn[1], size))
    close(advantages, size / (size - 1) * group_advantages(scores, size, scale="none"))
    close(advantages.reshape(-1, size).sum(1), torch.zeros(len(scores) // size), 1e-7)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@harness.FEW
@given(drawn=scores_of_groups)
def test_every_baseline_and_scale_is_the_oracle(baseline: str, scale: str, drawn: tuple[int, list[float]]) -> None:
    size, scores = drawn
    actual = baseline_advantages(torch.tensor(scores, dtype=torch.float64), size, baseline=baseline, scale=scale)
    close(actual, oracles.baseline_advantages(scores, size, baseline, scale), 1e-8)


def test_baselines_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 11.0])
    for baseline, expected in (
        ("group", [-1, 1, -3, 3]),
        ("leave_one_out", [-2, 2, -6, 6]),
        ("batch", [-4, -2, 0, 6]),
        ("none", [1, 3, 5, 11]),
    ):
        close(baseline_advantages(scores, 2, baseline=baseline, scale="none"), expected, 1e-6)
    close(baseline_advantages(scores, 4, baseline="batch", scale="batch"), group_advantages(scores, 4), 0)
    close(baseline_advantages(torch.ones(4), 2, baseline="none", scale="batch"), torch.ones(4), 0)  # 0 does not divide
    with pytest.raises(ValueError, match="baseline is 'mean'; expected 'group', 'leave_one_out', 'batch' or 'none'"):
        baseline_advantages(scores, 2, baseline="mean")


def test_a_score_that_is_no_number_shows() -> None:
    """A judge that fails is not passed over in silence; it spoils its own group only."""
    actual = group_advantages(torch.tensor([torch.nan, 1.0, 0.0, 2.0]), 2)
    assert actual[:2].isnan().all()
    assert actual[2:].isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_two_processes_know_the_batch_of_both(baseline: str, scale: str) -> None:
    scores = torch.randn(12, dtype=torch.float64) * 3 + 100
    settings = {"baseline": baseline, "scale": scale}
    both = harness.on_two_ranks(lambda x, add: baseline_advantages(x, 3, **settings, over_ranks=add), scores.split(6))
    close(torch.cat(both), baseline_advantages(scores, 3, **settings))
    if scale == "batch" and baseline == "group":
        shorthand = harness.on_two_ranks(
            lambda x, add: group_advantages(x, 3, scale="batch", over_ranks=add), scores.split(6)
        )
        close(torch.cat(shorthand), torch.cat(both), 0)


def test_equal_scores_on_two_processes_get_next_to_nothing() -> None:
    """The mean of 21 equal numbers need not be that number; an advantage of .7 would come of it."""
    parts = [torch.full((n,), 1e4 / 7) for n in (7, 14)]
    for part in harness.on_two_ranks(
        lambda x, add: baseline_advantages(x, 7, baseline="batch", scale="batch", over_ranks=add), parts
    ):
        assert part.abs().max() < 1e-5


@st.composite
def supervised(draw_: st.DrawFn) -> tuple[list[list[tuple[int, float]]], list[list[bool]], int]:
    """Responses of up to 6 tokens in up to 3 steps, in groups of 2 or 3."""
    size, groups = draw_(st.integers(2, 3)), draw_(st.integers(1, 2))
    steps, masks = [], []
    for _ in range(size * groups):
        length = draw_(st.integers(1, 6))
        ends = draw_(st.lists(st.integers(0, length - 1), unique=True, max_size=3))
        steps.append([(end, draw_(harness.numbers(1))[0]) for end in ends])
        masks.append([t < length for t in range(6)])
    steps[0] = steps[0] or [(0, 1.0)]
    for start in range(0, len(steps), size):  # the mean of no steps is not defined: the oracle wants one in a group
        steps[start] = steps[start] or [(0, 1.0)]
    return steps, masks, size


@pytest.mark.parametrize("scale", SCALES)
@harness.FEW
@given(drawn=supervised())
def test_step_advantages_are_the_oracle(
    scale: str, drawn: tuple[list[list[tuple[int, float]]], list[list[bool]], int]
) -> None:
    steps, masks, size = drawn
    scores, ends = torch.full((len(steps), 3), torch.nan, dtype=torch.float64), torch.full((len(steps), 3), -1)
    for b, row in enumerate(steps):
        for j, (end, score) in enumerate(row):
            scores[b, j], ends[b, j] = score, end
    actual = step_advantages(scores, ends, torch.tensor(masks), size, scale=scale)
    close(actual, oracles.step_advantages(steps, masks, size, scale), 1e-7)


def test_one_step_at_the_end_is_outcome_supervision() -> None:
    """DeepSeekMath says so: the score of the whole at its last token gives every token the group advantage."""
    scores, mask = torch.randn(6, 1), torch.arange(5) < torch.tensor([[5], [2], [1], [4], [3], [5]])
    for scale in SCALES:
        actual = step_advantages(scores, mask.sum(1, keepdim=True) - 1, mask, 3, scale=scale)
        close(actual, torch.where(mask, group_advantages(scores[:, 0], 3, scale=scale).unsqueeze(1), 0.0), 1e-5)


def test_steps_by_hand() -> None:
    """Steps of -1, 0, 1 and 2 have mean .5; a group without a step, and tokens after the last one, get nothing."""
    scores = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [9.0, 9.0], [9.0, 9.0]])
    ends = torch.tensor([[1, 2], [2, 0], [-1, -1], [-1, -1]])
    expected = [[-1.0, -1.0, 0.5, 0], [1.0, -0.5, -0.5, 0], [0] * 4, [0] * 4]
    close(step_advantages(scores, ends, torch.ones(4, 4) > 0, 2, scale="none"), expected)
    spread = (5 / 3) ** 0.5 + 1e-4
    close(step_advantages(scores, ends, torch.ones(4, 4) > 0, 2)[0], [-1 / spread, -1 / spread, 0.5 / spread, 0], 1e-6)


@harness.FEW
@given(drawn=scores_of_groups, weights=harness.numbers(2, bound=3.0), data=st.data())
def test_normalize_then_sum_is_the_oracle(
    drawn: tuple[int, list[float]], weights: list[float], data: st.DataObject
) -> None:
    size, first = drawn
    rows = list(zip(first, data.draw(harness.numbers(len(first))), strict=True))
    actual = normalize_then_sum(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64), size
    )
    close(actual, oracles.gdpo(rows, weights, size), 1e-6)


def test_rewards_normalised_apart_keep_mixtures_apart() -> None:
    """The example of the paper: with two rewards of 0 or 1, (0, 1) and (0, 2) get different advantages."""
    one = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    summed = group_advantages(one.sum(1), 2)
    close(summed[1], summed[3], 1e-3)
    apart = normalize_then_sum(one, torch.ones(2), 2)
    close(apart[3] / apart[1], 2.0, 1e-3)


def test_a_reward_that_does_not_apply_takes_no_part() -> None:
    """In the first group the second reward judges two of three responses; in the second none."""
    nan = torch.nan
    scores = torch.tensor([[1.0, 4.0], [2.0, nan], [3.0, 6.0], [1.0, nan], [0.0, nan], [0.0, nan]])
    actual = normalize_then_sum(scores, torch.tensor([0.0, 1.0]), 3)
    assert actual.isfinite().all()
    close(actual, [-(2.5**0.5), 0.0, 2.5**0.5, 0.0, 0.0, 0.0], 1e-3)


def test_normalize_then_sum_on_two_processes() -> None:
    scores, weights = torch.randn(12, 3, dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    both = harness.on_two_ranks(lambda x, add: normalize_then_sum(x, weights, 3, over_ranks=add), scores.split(6))
    close(torch.cat(both), normalize_then_sum(scores, weights, 3))


@pytest.mark.parametrize("center", [True, False])
def test_whitening_on_two_processes_is_whitening_the_whole(center: bool) -> None:
    x, mask = torch.randn(6, 5, dtype=torch.float64) + 2, harness.MASK
    parts = list(zip(x.split([1, 5]), mask.split([1, 5]), strict=True))
    both = harness.on_two_ranks(lambda part, add: masked_whiten(*part, center=center, over_ranks=add), parts)
    close(torch.cat(both), masked_whiten(x, mask, center=center))
