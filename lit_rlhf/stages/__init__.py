"""The four stages, each one LightningModule that reads top to bottom."""

from lit_rlhf.stages.grpo import GRPO
from lit_rlhf.stages.optim import Optim
from lit_rlhf.stages.ppo import PPO
from lit_rlhf.stages.reward import RewardModeling
from lit_rlhf.stages.sft import SFT
from lit_rlhf.stages.updates import Updates

__all__ = ["GRPO", "PPO", "SFT", "Optim", "RewardModeling", "Updates"]
