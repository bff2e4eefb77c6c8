"""Assign credit over time: from scores of whole responses to rewards, returns and advantages of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Turn a response's score and its tokens' KL into one reward a token.

    r_t = −β·kl_t + [t is the last counted token]·score.

    Args:
        scores: Judgement of each whole response, [B].
        kl: Estimated KL(π‖π_ref) at each token of the sampled response, [B, T].
        mask: Tokens of the response, bool [B, T]; a row without any gets no reward.
        kl_coef: β, the price of a nat.

    Returns:
        [B, T], 0 where nothing counts.

    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 2, spread over tokens as in its code; Stiennon et al. 2020
    (arXiv 2009.01325) §3.4. Unlike there the score stands on the last token of the response (its EOS), not on the last
    column.

    >>> token_rewards(torch.tensor([5.0]), torch.ones(1, 3), torch.tensor([[True, True, False]]), kl_coef=0.5)
    tensor([[-0.5000,  4.5000,  0.0000]])
    """
    later = mask.flip(1).cumsum(1).flip(1)  # counted tokens from t on
    last = mask & (later == 1)
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores.unsqueeze(1), 0.0)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate each token's advantage as a discounted sum of TD errors (GAE).

    δ_t = r_t + γ·V_{t+1} − V_t;  A_t = δ_t + γλ·A_{t+1};  returns R_t = A_t + V_t.

    Args:
        rewards: Reward for token t of the sampled response, [B, T].
        values: Critic's value of the state before token t, by the critic as it was when sampling, [B, T].
        mask: Tokens of the response, bool [B, T]. t + 1 means the next counted token; the state after the last one is
            terminal, V = A = 0 there, also for a response that was cut off.
        gamma: Discount γ a token; 1 for responses.
        lam: λ, from 0 (one step, leans on the critic) to 1 (whole response, does not).

    Returns:
        Advantages [B, T] and returns [B, T], both 0 where nothing counts.

    Sources: Schulman et al. 2016 (arXiv 1506.02438) eq. 16; Schulman et al. 2017 (PPO, arXiv 1707.06347) eq. 11–12.
    Unlike there nothing is bootstrapped past the last token. With λ = 1 it is REINFORCE with the critic as baseline:
    A_t = ``rewards_to_go`` − V_t.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> generalized_advantages(rewards, values, torch.tensor([[True, True]]), gamma=1.0, lam=1.0)
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    next_value = next_advantage = torch.zeros_like(rewards[:, :1]).squeeze(1)
    columns = []
    for reward, value, counts in reversed(list(zip(rewards.unbind(1), values.unbind(1), mask.unbind(1), strict=True))):
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        columns.append(torch.where(counts, advantage, 0.0))
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, value, next_value)
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Sum the discounted rewards from each token to the end of its response.

    R_t = r_t + γ·R_{t+1}: generalized advantages with λ = 1 and a critic that says 0.

    Args:
        rewards: Reward for token t of the sampled response, [B, T].
        mask: Tokens of the response, bool [B, T]; t + 1 means the next counted token.
        gamma: Discount γ a token.

    Returns:
        [B, T], 0 where nothing counts.

    Source: Sutton & Barto 2018, eq. 3.9 (G_t; there R_{t+1} is the reward for the action at t).

    >>> rewards_to_go(torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]), gamma=0.5)
    tensor([[0.5000, 1.0000, 0.0000]])
    """
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]
