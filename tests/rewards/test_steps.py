"""Rewards that judge steps: what they return, and what is made of it."""

from __future__ import annotations

import pytest
import torch

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards import RewardError, Rewards, Steps


def rollout() -> Rollout:
    """Two responses, of three tokens and of two; the second's last column is padding."""
    return Rollout(
        prompt_ids=torch.tensor([[1], [1]]),
        prompt_mask=torch.tensor([[True], [True]]),
        response_ids=torch.tensor([[5, 6, 7], [8, 9, 0]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        ended=torch.tensor([True, True]),
        prompts=("first", "second"),
        completions=("a b c", "d e"),
    )


def judging(*said, name="judge"):
    """A reward that says this of the two responses."""

    def judge(prompts, completions, **columns):
        return list(said)

    judge.__name__ = name
    return judge


def test_the_score_is_the_sum_of_the_steps_and_the_steps_are_kept() -> None:
    judged = Rewards([judging(Steps([1.0, 0.5], [0, 2]), Steps([0.25], [1]))]).judge(rollout())
    assert judged.scores.tolist() == [1.5, 0.25]
    assert judged.parts["judge"].tolist() == [1.5, 0.25]
    assert judged.outcomes.tolist() == [0.0, 0.0]  # nothing was said of a response as a whole
    assert judged.step_scores.tolist() == [[1.0, 0.5], [0.25, 0.0]]
    assert judged.step_ends.tolist() == [[0, 2], [1, -1]]


def test_what_others_say_of_the_whole_response_stays_apart() -> None:
    judged = Rewards([judging(Steps([1.0], [0]), Steps([], [])), judging(3.0, 4.0, name="whole")]).judge(rollout())
    assert judged.scores.tolist() == [4.0, 4.0]
    assert judged.outcomes.tolist() == [3.0, 4.0]
    assert judged.step_ends.tolist() == [[0], [-1]]


def test_without_steps_a_rollout_gains_no_fields_of_steps() -> None:
    judged = Rewards([judging(1.0, 2.0)]).judge(rollout())
    assert (judged.outcomes, judged.step_scores, judged.step_ends) == (None, None, None)


def test_a_weight_counts_for_every_step() -> None:
    judged = Rewards([judging(Steps([1.0, 0.5], [0, 2]), Steps([0.25], [1]))], [2.0]).judge(rollout())
    assert judged.scores.tolist() == [3.0, 0.5]
    assert judged.step_scores.tolist() == [[2.0, 1.0], [0.5, 0.0]]
    assert judged.parts["judge"].tolist() == [1.5, 0.25]  # logged before weighting


def test_steps_of_a_reward_that_is_only_logged_credit_nothing() -> None:
    rewards = [judging(Steps([9.0], [0]), Steps([9.0], [0])), judging(1.0, 2.0, name="whole")]
    judged = Rewards(rewards, [0.0, 1.0]).judge(rollout())
    assert judged.step_scores is None
    assert judged.scores.tolist() == [1.0, 2.0]
    assert judged.parts["judge"].tolist() == [9.0, 9.0]


def test_the_steps_of_two_rewards_stand_side_by_side() -> None:
    one = judging(Steps([1.0], [2]), Steps([1.0], [0]), name="one")
    two = judging(Steps([0.5, 0.25], [0, 1]), Steps([4.0], [1]), name="two")
    judged = Rewards([one, two], [1.0, 2.0]).judge(rollout())
    assert judged.scores.tolist() == [2.5, 9.0]
    assert judged.step_scores.tolist() == [[1.0, 1.0, 0.5], [1.0, 8.0, 0.0]]
    assert judged.step_ends.tolist() == [[2, 0, 1], [0, 1, -1]]


def test_a_reward_may_judge_the_steps_of_some_rows_and_the_whole_of_none() -> None:
    """None = does not apply to this row."""
    judged = Rewards([judging(Steps([1.0], [1]), None), judging(0.0, 2.0, name="whole")]).judge(rollout())
    assert judged.scores.tolist() == [1.0, 2.0]
    assert judged.step_ends.tolist() == [[1], [-1]]


def test_an_asynchronous_reward_judges_steps_too() -> None:
    async def slow(prompts, completions, completion_ids):
        return [Steps([float(len(ids))], [len(ids) - 1]) for ids in completion_ids]

    judged = Rewards([slow]).judge(rollout())
    assert judged.step_scores.tolist() == [[3.0], [2.0]]
    assert judged.step_ends.tolist() == [[2], [1]]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Steps([1.0, 2.0], [0]), "2 step scores and 1 ends"),
        (Steps([], [0]), "0 step scores and 1 ends"),
        (Steps([1.0], [2]), "a step ends at token 2 of a response that has tokens 0 to 1"),  # padding stands there
        (Steps([1.0], [-1]), "a step ends at token -1"),
        (Steps([float("nan")], [0]), "expected a number finite in float32"),
    ],
)
def test_what_does_not_fit_a_response_names_the_reward_and_the_row(said: Steps, message: str, slow: bool) -> None:
    async def judge(prompts, completions):
        return [Steps([1.0], [0]), said]

    reward = judge if slow else judging(Steps([1.0], [0]), said)
    with pytest.raises(RewardError, match=message) as error:
        Rewards([reward]).judge(rollout())
    assert "'judge'" in str(error.value)
    assert "second" in str(error.value)
