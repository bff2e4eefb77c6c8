"""Train the demo's four stages, with the DataModules, stages and Trainer that users use."""

from __future__ import annotations

import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.data import PreferenceData, PromptData, SFTData
from lit_rlhf.rewards import MissingEOS, RewardModel
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Advantages, Optim, RewardModeling, Updates

from .judge import gold, words_used
from .measure import SAMPLING

SHOWN = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "rewards/reward_model/mean": "proxy",
    "rewards/words_used/mean": "words",
    "rewards/gold/mean": "gold",
    "objective/kl": "KL",
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything the demo makes and trains."""

    stories: int = 6000
    sft_steps: int = 2000
    pairs: int = 3000
    reward_steps: int = 300
    prompts: int = 2000
    rl_steps: int = 60
    held_out: int = 256


class Lines(Callback):
    """Print a line now and then: two runs side by side cannot share a progress bar.

    Args:
        name: Of the run.
        count: Lines a run.
    """

    def __init__(self, name: str, count: int = 6) -> None:
        self.name, self.count = name, count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print where the run stands, ``count`` times in equal distances."""
        step, steps = trainer.global_step, int(trainer.max_steps)
        if step * self.count // steps == (step - 1) * self.count // steps:
            return
        seen = trainer.callback_metrics
        metrics = [f"{name} {float(seen[key]):.2f}" for key, name in SHOWN.items() if key in seen]
        seconds = time.perf_counter() - self.started
        print(f"  {self.name:<6} {step:>5}/{steps}  {seconds:4.0f} s  {'  '.join(metrics)}", flush=True)


def settle() -> None:
    """Prepare this process: one thread, no network, and quiet libraries."""
    torch.set_num_threads(1)  # two threads wait for each other longer than a small model computes
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def fit(name: str, stage: LightningModule, data: LightningDataModule, logs: Path, steps: int) -> Trainer:
    """Train a stage for a number of steps on one CPU thread; its metrics go to ``logs``/metrics.csv."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1 if steps < 500 else 10,
        logger=CSVLogger(logs, name="", version=""),
        callbacks=[Lines(name)],
        check_val_every_n_epoch=10**6,  # held-out data is measured once, at the end
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage, data)
    return trainer


def train_sft(run: Path, sizes: Sizes, seed: int) -> dict[str, float]:
    """Imitate the stories; returns the held-out metrics."""
    schedule = Optim(lr=6e-3, schedule="cosine", warmup_steps=30, final_fraction=0.02)
    stage = SFT(str(run / "base"), optim=schedule, sample_prompts=0, seed=seed)
    data = SFTData(str(run / "data/stories.jsonl"), batch_size=8, val_batch_size=128, max_length=128, seed=seed)
    return _finish(fit("SFT", stage, data, run / "logs/sft", sizes.sft_steps), stage, data, run / "sft")


def train_reward(run: Path, sizes: Sizes, seed: int) -> dict[str, float]:
    """Learn from the labelled pairs which story is better; returns the held-out metrics."""
    schedule = Optim(lr=2e-3, schedule="cosine", warmup_steps=10, final_fraction=0.05)
    stage = RewardModeling(str(run / "sft"), optim=schedule, seed=seed)
    data = PreferenceData(
        str(run / "data/pairs.jsonl"), val_fraction=0.15, batch_size=16, val_batch_size=64, max_length=128, seed=seed
    )
    return _finish(fit("reward", stage, data, run / "logs/reward", sizes.reward_steps), stage, data, run / "reward")


def _finish(trainer: Trainer, stage: Any, data: LightningDataModule, folder: Path) -> dict[str, float]:
    (metrics,) = trainer.validate(stage, data, verbose=False)
    stage.export(str(folder))
    return {key: float(value) for key, value in metrics.items()}


def train_ppo(run: Path, sizes: Sizes, seed: int) -> None:
    """Maximise the reward model's score, with a KL penalty to the SFT policy; gold is logged, at weight 0."""
    settle()
    stage = PPO(
        str(run / "sft"),
        rewards=[RewardModel(str(run / "reward"), normalize=True, batch_size=64), gold],
        reward_weights=[1.0, 0.0],
        critic=str(run / "reward"),
        missing_eos=MissingEOS(penalty=3.0),
        sampling=SAMPLING,
        optim=Optim(lr=7e-4, eps=1e-5, schedule="linear", warmup_steps=5),
        updates=Updates(epochs=4),
        kl=KL(coef=0.05),
        seed=seed,
    )
    data = PromptData(str(run / "data/prompts.jsonl"), val_fraction=0, batch_size=64, seed=seed)
    fit("PPO", stage, data, run / "logs/ppo", sizes.rl_steps)
    stage.export(str(run / "ppo"))


def train_grpo(run: Path, sizes: Sizes, seed: int) -> None:
    """Maximise a rule (the story uses the words asked for) and the reward model's score together; gold is logged."""
    settle()
    stage = GRPO(
        str(run / "sft"),
        rewards=[words_used, RewardModel(str(run / "reward"), normalize=True, batch_size=64), gold],
        reward_weights=[0.5, 1.0, 0.0],
        missing_eos=MissingEOS(penalty=3.0),
        sampling=SAMPLING,
        optim=Optim(lr=3e-4, schedule="linear"),
        advantages=Advantages(scale="none"),
        group_size=8,
        updates=Updates(epochs=2, minibatches=2),
        kl=KL(coef=0.2, estimator="k3", place="loss"),
        seed=seed,
    )
    data = PromptData(str(run / "data/prompts.jsonl"), val_fraction=0, batch_size=12, seed=seed)
    fit("GRPO", stage, data, run / "logs/grpo", sizes.rl_steps)
    stage.export(str(run / "grpo"))
