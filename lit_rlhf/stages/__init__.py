"""The four stages, each one LightningModule that reads top to bottom."""

import lit_rlhf.strategies  # noqa: F401 - so that trainer.strategy: fsdp2 is known
from lit_rlhf.stages.grpo import GRPO
from lit_rlhf.stages.optim import Optim
from lit_rlhf.stages.ppo import PPO
from lit_rlhf.stages.reward import RewardModeling
from lit_rlhf.stages.settings import KL, Advantages, Clip, Correction, Entropy, Updates, Value
from lit_rlhf.stages.sft import SFT
from lit_rlhf.stages.shaping import Shaping

__all__ = [
    "GRPO",
    "KL",
    "PPO",
    "SFT",
    "Advantages",
    "Clip",
    "Correction",
    "Entropy",
    "Optim",
    "RewardModeling",
    "Shaping",
    "Updates",
    "Value",
]
