"""The price of length, by hand from DAPO's eq. 13."""

from __future__ import annotations

import pytest
import torch

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards import Rewards, SoftOverlong


def price(longest: int, cache: int, *lengths: int) -> list[float]:
    return SoftOverlong(longest, cache)(completion_ids=[[7] * length for length in lengths])


def test_the_line_at_its_edges() -> None:
    """L_max 10, L_cache 4: nothing up to 6 tokens, then ((10 − 4) − |y|) / 4, and −1 past 10."""
    assert price(10, 4, 0, 5, 6, 7, 8, 9, 10, 11, 100) == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_the_papers_numbers() -> None:
    """Free up to 16,384; half-way at 18,432; 20,480 at most."""
    assert price(20_480, 4_096, 16_384, 16_385, 18_432, 20_480, 20_481) == [0, -1 / 4096, -0.5, -1, -1]


def test_a_cache_as_long_as_the_limit_prices_every_token() -> None:
    assert price(4, 4, 0, 1, 4) == [0, -0.25, -1]


@pytest.mark.parametrize(("longest", "cache"), [(10, 0), (10, -1), (10, 11), (0, 0)])
def test_a_cache_that_does_not_fit_is_refused(longest: int, cache: int) -> None:
    with pytest.raises(ValueError, match=rf"cache is {cache}, expected 1 to longest={longest} tokens"):
        SoftOverlong(longest, cache)


def test_among_rewards_it_counts_the_tokens_of_the_response_and_no_padding() -> None:
    rollout = Rollout(
        prompt_ids=torch.tensor([[1], [1]]),
        prompt_mask=torch.tensor([[True], [True]]),
        response_ids=torch.tensor([[5, 6, 7, 9], [8, 9, 0, 0]]),
        mask=torch.tensor([[True, True, True, True], [True, True, False, False]]),
        ended=torch.tensor([True, True]),
        prompts=("a", "b"),
        completions=("", ""),
    )
    scores, parts = Rewards([SoftOverlong(longest=4, cache=2)], [3.0])(rollout)
    assert scores.tolist() == [-3.0, 0.0]
    assert list(parts) == ["soft_overlong"]
