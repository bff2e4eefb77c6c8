"""Rewards: what judges a response, from a one-line rule to a learned model, and their weighted sum."""

from lit_rlhf.rewards.adapter import RewardAdapter
from lit_rlhf.rewards.combine import Rewards
from lit_rlhf.rewards.learned import RewardModel
from lit_rlhf.rewards.missing_eos import MissingEOS
from lit_rlhf.rewards.numbers import extract_number
from lit_rlhf.rewards.overlong import SoftOverlong
from lit_rlhf.rewards.patient import Patient
from lit_rlhf.rewards.protocol import Reward, RewardError, RowError
from lit_rlhf.rewards.rules import ContainsWords, ExactMatch, LengthBounds, NumericMatch, RegexFormat, Repetition
from lit_rlhf.rewards.sentiment import VaderSentiment
from lit_rlhf.rewards.served import HTTPReward
from lit_rlhf.rewards.steps import Steps

__all__ = [
    "ContainsWords",
    "ExactMatch",
    "HTTPReward",
    "LengthBounds",
    "MissingEOS",
    "NumericMatch",
    "Patient",
    "RegexFormat",
    "Repetition",
    "Reward",
    "RewardAdapter",
    "RewardError",
    "RewardModel",
    "Rewards",
    "RowError",
    "SoftOverlong",
    "Steps",
    "VaderSentiment",
    "extract_number",
]
