"""Rewards: what judges a response, from a one-line rule to a learned model, and their weighted sum."""

from lit_rlhf.rewards.combine import Rewards
from lit_rlhf.rewards.learned import RewardModel
from lit_rlhf.rewards.missing_eos import MissingEOS
from lit_rlhf.rewards.numbers import extract_number
from lit_rlhf.rewards.overlong import SoftOverlong
from lit_rlhf.rewards.protocol import Reward, RewardError, RowError
from lit_rlhf.rewards.rules import ContainsWords, ExactMatch, LengthBounds, NumericMatch, RegexFormat, Repetition
from lit_rlhf.rewards.sentiment import VaderSentiment
from lit_rlhf.rewards.steps import Steps

__all__ = [
    "ContainsWords",
    "ExactMatch",
    "LengthBounds",
    "MissingEOS",
    "NumericMatch",
    "RegexFormat",
    "Repetition",
    "Reward",
    "RewardError",
    "RewardModel",
    "Rewards",
    "RowError",
    "SoftOverlong",
    "Steps",
    "VaderSentiment",
    "extract_number",
]
