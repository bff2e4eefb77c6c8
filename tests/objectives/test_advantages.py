from __future__ import annotations

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_to_go,
    token_rewards,
)

unit = st.floats(0, 1)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@harness.FEW
@given(harness.batches(2), unit, unit)
def test_gae_is_the_double_sum_of_the_paper(batch: tuple[list[Tensor], Tensor], gamma: float, lam: float) -> None:
    (rewards, values), mask = batch
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)
    close(advantages, [oracles.gae(r, v, m, gamma, lam) for r, v, m in rows])
    close(returns, torch.where(mask, advantages + values, 0.0))


def test_gae_hand_example() -> None:
    """Gamma 1, lambda .95, score 2 on the last of three tokens; a padded copy of the row equals it."""
    rewards, values = torch.tensor([[0.1, -0.1, 2.0, 9.0]]), torch.tensor([[0.5, 0.6, 0.7, 9.0]])
    third = 2.0 - 0.7
    second = -0.1 + 0.7 - 0.6 + 0.95 * third
    first = 0.1 + 0.6 - 0.5 + 0.95 * second
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    close(advantages, [[first, second, third, 0.0]], 1e-6)
    close(returns, [[first + 0.5, second + 0.6, 2.0, 0.0]], 1e-6)


@harness.FEW
@given(harness.batches(2), unit)
def test_gae_at_lambda_zero_is_the_td_error(batch: tuple[list[Tensor], Tensor], gamma: float) -> None:
    (rewards, values), _ = batch
    mask = torch.ones_like(rewards, dtype=torch.bool)
    after = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
    close(generalized_advantages(rewards, values, mask, gamma=gamma, lam=0.0)[0], rewards + gamma * after - values)


@harness.FEW
@given(harness.batches(2), unit)
def test_gae_at_lambda_one_is_returns_less_values(batch: tuple[list[Tensor], Tensor], gamma: float) -> None:
    (rewards, values), mask = batch
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=1.0)
    later = rewards_to_go(rewards, mask, gamma=gamma)
    close(advantages, torch.where(mask, later - values, 0.0))
    close(returns, later)


@harness.FEW
@given(harness.batches(), unit)
def test_rewards_to_go_is_the_oracle(batch: tuple[list[Tensor], Tensor], gamma: float) -> None:
    (rewards,), mask = batch
    rows = zip(rewards.tolist(), mask.tolist(), strict=True)
    close(rewards_to_go(rewards, mask, gamma=gamma), [oracles.rewards_to_go(r, m, gamma) for r, m in rows])


@harness.FEW
@given(harness.batches(2), unit)
def test_token_rewards_is_the_oracle(batch: tuple[list[Tensor], Tensor], kl_coef: float) -> None:
    (kl, other), mask = batch
    scores = other[:, 0]
    expected = oracles.token_rewards(scores.tolist(), kl.tolist(), mask.tolist(), kl_coef)
    close(token_rewards(scores, kl, mask, kl_coef=kl_coef), expected)


def test_score_stands_on_the_last_token_of_each_response() -> None:
    """Full row, right-padded row, left-padded row, one-token row, row with nothing."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]) > 0
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan])
    expected = [[0, 0, 1.0], [0, 2.0, 0], [0, 0, 3.0], [4.0, 0, 0], [0, 0, 0]]
    close(token_rewards(scores, torch.zeros(5, 3), mask, kl_coef=1.0), expected)


def test_rewards_of_a_response_add_up_to_the_penalised_score() -> None:
    kl, mask = torch.tensor([[0.5, 0.25, torch.nan]]), torch.tensor([[True, True, False]])
    close(token_rewards(torch.tensor([2.0]), kl, mask, kl_coef=0.1).sum(), 2.0 - 0.1 * 0.75, 1e-6)


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
