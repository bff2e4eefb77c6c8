"""The choice among N answers, and the bound on how far it moves a policy."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import arena
import pytest
import torch

from lit_rlhf.commands.best_of_n import best, kl_bound


def test_the_bound_is_the_divergence_where_no_answers_tie() -> None:
    """The best of N has density N·uᴺ⁻¹ over the quantile u of its score; ∫ f log f by the midpoint rule."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (2, 5, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float((density * density.log()).mean()), abs=1e-6)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 2), (8, 2), (8, 7), (16, 4)])
def test_one_of_the_best_k_is_within_the_bound(n: int, k: int) -> None:
    """One of the best k at random: the mean of their densities, those of order statistics."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = sum(n / k * math.comb(n - 1, j) * u ** (n - 1 - j) * (1 - u) ** j for j in range(k))
    exact = float((density * density.log()).mean())
    assert exact <= kl_bound(n, k) + 1e-6
    assert exact > kl_bound(n, k) / 3  # not far below it


def test_answers_that_sft_cannot_read_are_not_chosen() -> None:
    """Prompt 0: the best answer is blank, the next one cut off. Prompt 1 has blank ones only."""
    rollout = dataclasses.replace(
        arena.rollout([2] * 6),
        completions=(" ", "cut off", "whole", "", "\n", ""),
        prompts=("p",) * 3 + ("q",) * 3,
        ended=torch.tensor([True, False, True, True, True, True]),
    )
    scores = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    count: Counter[str] = Counter()
    (row,) = best(rollout, scores, 3, 1, False, count)
    wanted = {"prompt": "p", "completion": "cut off", "ended": False, "score": 3.0, "mean_score": 3.0, "samples": 3}
    assert row == wanted
    assert count == {"prompts": 1, "rows": 1, "left out": 1, "cut off": 1, "first": 4.0, "best": 3.0}
    assert [row["completion"] for row in best(rollout, scores, 3, 2, True, Counter())] == ["whole"]
