"""Run by test_two_ranks.py as each of two processes: train stages under DDP and leave their weights for comparison.

usage: LOCAL_RANK=… MASTER_PORT=… two_ranks.py MODEL_FOLDER OUT STAGE …
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import arena
import lightning as L
import torch

from lit_rlhf.models import Lora, Network
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.rewards import RewardAdapter, Steps
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Advantages, Optim, Shaping, Updates, Value

ADAM = Optim(lr=1e-3, eps=1e-5)


class OnceInfinite(SFT):
    """Its first loss on rank 1 is infinite, and no gradient is."""

    def read(self, batch, noise=None):
        logprobs, correct, learned = super().read(batch, noise)
        infinite = float("-inf") if self.global_rank == 1 and self.global_step == 0 else 0.0
        return logprobs + infinite, correct, learned


class OnceFull(GRPO):
    """Its memory runs out once, on rank 1 alone, in the last microbatch of the second step."""

    spared = True

    def loss(self, part):
        found = super().loss(part)
        if self.global_rank == 1 and self.updates.step == 1 and not self.updates.more and self.spared:
            self.spared = False
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found


def shares(whole: Any) -> list:
    """Every second row for each of two ranks, as RankSampler shares them out."""
    rows = [torch.arange(start, len(whole), 2) for start in (0, 1)]
    parts = [whole.select(own) for own in rows]
    texts = getattr(whole, "pretraining", None)
    if texts is None:
        return parts
    return [part.with_(pretraining=texts.select(torch.arange(i, len(texts), 2))) for i, part in enumerate(parts)]


def silent(which: str):
    """A reward that says nothing of some prompts, by number."""

    def judge(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[float]:
        return [
            0.5 if p.removeprefix("prompt ") in which else sum(ids) / 1000
            for p, ids in zip(prompts, completion_ids, strict=True)
        ]

    return judge


def some_steps(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[Any]:
    """Judges two steps of an answer to an odd prompt, or a late one, and other answers as a whole."""
    return [
        Steps([ids[0] / 100, ids[-1] / 100], [0, len(ids) - 1]) if number % 2 or number > 10 else sum(ids) / 1000
        for number, ids in zip((int(p.split()[1]) for p in prompts), completion_ids, strict=True)
    ]


def ppo_whole(folder: str):
    """Everything of PPO that is a matter of all processes: whitening, running shaping, KL steering, texts, average."""
    stage = PPO(
        folder,
        rewards=[arena.low_ids],
        sampling=arena.SHORT,
        optim=ADAM,
        updates=Updates(epochs=2, micro_batch_tokens=40),
        shaping=Shaping(running=True),
        whiten_rewards=True,
        kl=KL(0.1, target=0.5, horizon=20),
        value=Value(shared=True),
        ptx_coef=0.5,
        ema=0.5,
    )
    return stage, [arena.prompts(8, seed=i).with_(pretraining=arena.examples(5 + i, seed=i)) for i in (0, 1)]


def roles(folder: str, judge: str):
    """Policy, critic, reward and reference on one base."""
    return PPO(
        folder,
        rewards=[RewardAdapter(judge, batch_size=3)],
        network=Network(lora=Lora(r=2)),
        sampling=arena.SHORT,
        optim=ADAM,
        updates=Updates(epochs=2, micro_batch_tokens=40),
        value=Value(adapter=True, lr=2e-3),
        ema=0.5,
    )


def build(name: str, folder: str, devices: int) -> tuple[L.LightningModule, list, list[list]]:
    """The stage, the batches of one process, and those of each of two ranks."""
    both = {"sampling": arena.SHORT, "group_size": 2, "optim": ADAM}
    loop = {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 12}
    whole = [arena.prompts(8)] * 2
    if name in ("ppo", "grpo"):  # other prompts on each rank, and shuffled minibatches: no process has the same alone
        parts = [[arena.prompts(4, seed=rank)] * 2 for rank in (0, 1)]
        if name == "ppo":
            updates = Updates(**loop, target_kl=0.5)
            return PPO(folder, [arena.low_ids], sampling=arena.SHORT, updates=updates), whole, parts
        return GRPO(folder, [arena.low_ids], **both, updates=Updates(**loop)), whole, parts
    if name == "sft_skip":
        stage = OnceInfinite(folder, optim=Optim(lr=1e-3, nonfinite="skip"))
        return stage, [arena.examples(4)] * 2, [[arena.examples(4)] * 2] * 2
    updates = Updates(epochs=2, micro_batch_tokens=40)
    if name == "sft":
        stage, whole = SFT(folder, optim=Optim(lr=1e-3)), [arena.examples(8)] * 2
    elif name == "ppo_roles":
        stage = roles(folder, f"{folder}_judge")
    elif name == "ppo_whole":
        stage, whole = ppo_whole(folder)
    elif name == "grpo_batch":
        # In the first batch no answer of rank 0 is judged by its steps, in the second half of them are.
        whole = [arena.prompts(8).with_(prompts=tuple(f"prompt {first + i}" for i in range(8))) for first in (0, 6)]
        advantages, kl = Advantages("batch", "batch", whiten=True), KL(0.1, "k1", "reward")
        stage = GRPO(folder, [some_steps], **both, updates=updates, advantages=advantages, kl=kl)
    elif name == "grpo_groups":  # one silent prompt on each rank in the first batch, two on the first in the second
        batches = [arena.prompts(8).with_(prompts=tuple(f"prompt {tag}{i}" for i in range(8))) for tag in "ab"]
        stage, whole = GRPO(folder, [silent("a0 a1 b0 b2")], **both, updates=updates, groups=4 // devices), batches
    elif name == "grpo_full":
        stage = OnceFull(folder, [arena.low_ids], **both, updates=Updates(1, 2, 40, halve_on_oom=True))
    else:
        stage = GRPO(folder, [arena.low_ids], **both, updates=updates)
    return stage, whole, [list(own) for own in zip(*map(shares, whole), strict=True)]


class Kept(arena.Log):
    """Metrics and weights after every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *more: Any) -> None:
        super().on_train_batch_end(trainer, stage, *more)
        self.weights.append(
            torch.cat([arena.weights(stage), *(b.flatten() for n, b in stage.named_buffers() if "average" in n)])
        )


def train(name: str, folder: str, devices: int, rank: int = 0) -> Kept:
    """Train on all batches, or on this rank's part of them."""
    stage, whole, parts = build(name, folder, devices)
    log = Kept()
    strategy = "ddp" if devices == 2 else "auto"
    run = arena.trainer(strategy=strategy, devices=devices, callbacks=[log], use_distributed_sampler=False)
    # A pass costs next to nothing, so that prompts are shared.
    with patch.dict(PASS_TOKENS, {"cpu": 1} if name == "grpo_shared" else {}):
        run.fit(stage, arena.loader(parts[rank] if devices == 2 else whole))
    return log


def main(folder: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    for name in names:
        log = train(name, folder, 2, rank)
        torch.save((log.weights, log.rows), Path(out) / f"{name}_{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
