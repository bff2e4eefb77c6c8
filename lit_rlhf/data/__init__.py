"""Data for the stages: rows from anywhere, checked at the door, encoded once, served with an exact place to resume."""

from lit_rlhf.data.files import DataError
from lit_rlhf.data.preference import PreferenceData
from lit_rlhf.data.prompts import PromptData
from lit_rlhf.data.sft import SFTData

__all__ = ["DataError", "PreferenceData", "PromptData", "SFTData"]
