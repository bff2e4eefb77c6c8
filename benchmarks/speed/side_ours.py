"""This project's stages on fixed work, as a process that the driver (peers.py) starts: side_ours.py WORK FOLDER."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from gate import Gate
from torch.utils.data import DataLoader
from work import PAD, CountingReward, Work, end_by_position, pairs, prompts, sequences

from lit_rlhf.data import PreferenceData, PromptData, SFTData
from lit_rlhf.data.preference import Ranked
from lit_rlhf.rewards import RewardModel
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Advantages, Optim, RewardModeling, Updates

PHASES = {"time/rollout": "generate", "time/score": "score", "time/update": "update"}


class Steps(L.Callback):
    """Passes the gate after every step."""

    def __init__(self, gate: Gate, work: Work) -> None:
        self.gate, self.work, self.tokens = gate, work, 0

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Everything is loaded."""
        self.gate.ready("lightning")

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step has been made."""
        if self.work.task in ("sft", "reward", "loop_sft"):
            self.gate.done(int(batch.mask.sum()))
        else:
            before, self.tokens = self.tokens, int(stage.tokens)
            seconds = {short: float(trainer.callback_metrics[name]) for name, short in PHASES.items()}
            self.gate.done(self.tokens - before, **seconds)


def rl_stage(work: Work, folder: Path) -> Any:
    """PPO, or GRPO, whose baseline makes it RLOO."""
    settings: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=work.response_tokens),
        "optim": Optim(lr=work.lr),
        "updates": Updates(epochs=work.epochs, minibatches=work.minibatches),
    }
    if work.task == "ppo":
        settings["kl"] = KL(coef=work.kl_coef)
        judge = RewardModel(str(folder / "reward"))
        stage: Any = PPO(str(folder / "policy"), [judge], critic=str(folder / "reward"), **settings)
    else:
        baseline, scale = ("leave_one_out", "none") if work.task == "rloo" else ("group", "group")
        settings |= {"group_size": work.group, "advantages": Advantages(baseline=baseline, scale=scale)}
        settings["kl"] = KL(coef=work.kl_coef, estimator="k3", place="loss")
        stage = GRPO(str(folder / "policy"), [CountingReward()], **settings)
    end_by_position(stage.policy, work)
    end_by_position(stage.reference.frozen, work)
    return stage


def prepare(work: Work, folder: Path) -> tuple[Any, DataLoader[Any]]:
    """The stage and its batches, which come from encoded rows through the project's own collation."""
    collate: Any
    rows: list[Any]
    if work.task in ("sft", "loop_sft"):
        stage: Any = SFT(str(folder / "policy"), optim=Optim(lr=work.lr))
        rows = [(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in sequences(work)]
        collate = SFTData.collate
    elif work.task == "reward":
        stage = RewardModeling(str(folder / "reward"), optim=Optim(lr=work.lr))
        both = zip(*pairs(work), strict=True)
        rows = [
            Ranked([np.asarray(ids, dtype=np.int32) for ids in pair], [len(ids) for ids in pair], [(0, 1)], None)
            for pair in both
        ]
        collate = PreferenceData.collate
    else:
        stage = rl_stage(work, folder)
        rows = [(" ".join(f"w{i}" for i in ids), np.asarray(ids, dtype=np.int32), {}) for ids in prompts(work)]
        collate = PromptData.collate
    return stage, DataLoader(rows, batch_size=work.rows, collate_fn=partial(collate, pad=PAD))


def train(work: Work, folder: Path, gate: Gate) -> None:
    """Train for as long as the driver lets us."""
    stage, batches = prepare(work, folder)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps(gate, work)],
    )
    trainer.fit(stage, batches)


if __name__ == "__main__":
    work = Work(**json.loads(sys.argv[1]))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(work.threads)
    train(work, Path(sys.argv[2]), Gate(work.burst))
