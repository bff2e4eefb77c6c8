from __future__ import annotations

import harness
import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import generalized_advantages, rewards_to_go, token_rewards

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
