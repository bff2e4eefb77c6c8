"""A list of rewards as a YAML names it: functions by dotted path, rules by class_path and init_args."""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import pytest
import some_rewards
import yaml

from lit_rlhf.rewards import ContainsWords, LengthBounds, MissingEOS, NumericMatch, RegexFormat, Reward, Rewards


class Stage:
    """Takes rewards as the stages do."""

    def __init__(
        self, rewards: list[Reward], weights: list[float] | None = None, missing_eos: MissingEOS | None = None
    ):
        self.rewards, self.missing_eos = Rewards(rewards, weights), missing_eos


def parse(text: str) -> Stage:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Stage, "stage")
    config = parser.parse_object({"stage": yaml.safe_load(text)})
    again = parser.parse_string(parser.dump(config))  # what a run keeps as its config must mean the same
    assert again == config
    return parser.instantiate(again).stage


def test_functions_and_rules_stand_in_one_list() -> None:
    stage = parse(
        """
        rewards:
          - some_rewards.shortness
          - some_rewards.patience
          - lit_rlhf.rewards.NumericMatch
          - class_path: lit_rlhf.rewards.ContainsWords
            init_args: {words: [cat, dog], name: animals}
          - class_path: lit_rlhf.rewards.LengthBounds
            init_args: {min: 2, unit: tokens}
          - class_path: lit_rlhf.rewards.RegexFormat
            init_args: {pattern: '^<think>'}
        weights: [1, 0.5, 0, 1, 1, 1]
        missing_eos: {penalty: 2, how: subtract}
        """
    )
    assert stage.rewards.rewards == [
        some_rewards.shortness,
        some_rewards.patience,
        NumericMatch(),
        ContainsWords(words=["cat", "dog"], name="animals"),
        LengthBounds(min=2, unit="tokens"),
        RegexFormat("^<think>"),
    ]
    assert stage.missing_eos == MissingEOS(2.0, "subtract")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("some_rewards.shortnes", "shortnes"),
        ("{class_path: lit_rlhf.rewards.LengthBounds, init_args: {mim: 2}}", "mim"),
        ("{class_path: lit_rlhf.rewards.LengthBounds, init_args: {unit: lines}}", "lines"),
        ("{class_path: lit_rlhf.rewards.RegexFormat}", "pattern"),
    ],
)
def test_a_wrong_entry_is_named(entry: str, message: str) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        parse(f"rewards: [{entry}]")


def test_a_reward_model_is_named_like_a_rule(reward_folder: Path) -> None:
    stage = parse(
        f"rewards: [{{class_path: lit_rlhf.rewards.RewardModel, init_args: {{model: {reward_folder}, batch_size: 2}}}}]"
    )
    (model,) = stage.rewards.rewards
    assert (model.batch_size, model.name) == (2, "reward_model")
