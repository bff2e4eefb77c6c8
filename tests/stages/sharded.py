"""Run by test_sharded.py as each of two processes: train stages under FSDP2, leave weights and metrics for comparison.

usage: LOCAL_RANK=… MASTER_PORT=… sharded.py FOLDERS OUT CASE …
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import arena
import lightning as L
import torch
from stages.two_ranks import roles, shares

from lit_rlhf.batch import Pairs
from lit_rlhf.models import Lora, Network, is_sharded, without_weights
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.models.sharding import whole
from lit_rlhf.rewards import RewardAdapter, RewardModel
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Optim, RewardModeling, Shaping, Updates, Value

ADAM = Optim(lr=1e-3, eps=1e-5)
LORA = Network(lora=Lora(r=2))
LOOP = Updates(epochs=2, micro_batch_tokens=40)
RL: dict[str, Any] = {"sampling": arena.SHORT, "optim": ADAM, "updates": LOOP}
CLIP = {"gradient_clip_val": 0.1}
# Name → what is built, and the Trainer's settings.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (lambda m, r: SFT(m, optim=ADAM), {"accumulate_grad_batches": 2, **CLIP}),
    "sft_lora": (lambda m, r: SFT(m, network=LORA, optim=ADAM), {}),
    "reward": (lambda m, r: RewardModeling(m, optim=ADAM), CLIP),
    "reward_lora": (lambda m, r: RewardModeling(m, network=LORA, optim=ADAM), {"accumulate_grad_batches": 2}),
    "ppo": (lambda m, r: PPO(m, [arena.low_ids, RewardModel(r, batch_size=3)], **RL), CLIP),
    "ppo_trunk": (
        lambda m, r: PPO(
            m, [RewardModel(r)], value=Value(shared=True), shaping=Shaping(running=True), ptx_coef=0.5, ema=0.5, **RL
        ),
        CLIP,
    ),
    "ppo_lora": (lambda m, r: PPO(m, [RewardModel(r)], network=LORA, **RL), {}),
    "grpo": (
        lambda m, r: GRPO(m, [arena.low_ids], group_size=2, kl=KL(0.1), refresh_reference=1, ema=0.5, **RL),
        CLIP,
    ),
    "ppo_roles": (lambda m, r: roles(m, f"{m}/../judge"), CLIP),
    "grpo_roles": (
        lambda m, r: GRPO(m, [RewardAdapter(f"{m}/../judge", batch_size=3)], group_size=2, network=LORA, **RL),
        {},
    ),
    "grpo_lora": (lambda m, r: GRPO(m, [RewardModel(r)], group_size=2, network=LORA, **RL), {}),
}
DEFERRED = (
    "sft_lora",
    "reward",
    "ppo",
    "ppo_lora",
    "ppo_roles",
    "grpo",
)  # read from the files by parts; the others are cut up


def batches(name: str) -> list:
    """Two batches of eight rows."""
    if name.startswith("sft"):
        return [arena.examples(8, seed=i) for i in range(2)]
    if name.startswith("reward"):
        return [arena.pairs(8, seed=i) for i in range(2)]
    found = [arena.prompts(8, seed=i) for i in range(2)]
    return [one.with_(pretraining=arena.examples(6)) for one in found] if name == "ppo_trunk" else found


def parts_of(batch: Any) -> list:
    """Every second row for each of two ranks; of pairs, both responses."""
    if not isinstance(batch, Pairs):
        return shares(batch)
    rows = torch.arange(len(batch.ids)).view(-1, 2)
    return [
        Pairs(batch.ids[own], batch.mask[own], *counted(len(own) // 2))
        for own in (rows[0::2].flatten(), rows[1::2].flatten())
    ]


def counted(pairs: int) -> list[torch.Tensor]:
    """Better, worse and group numbers of so many pairs that stand in order."""
    numbers = torch.arange(pairs)
    return [2 * numbers, 2 * numbers + 1, numbers]


class Seen(arena.Log):
    """Metrics, and all trainable weights and averages after every step; whether everything is sharded between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []
        self.held: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, *more: Any) -> None:
        super().on_train_batch_end(trainer, stage, *more)
        own = [p for p in stage.parameters() if p.requires_grad]
        own += [b for n, b in stage.named_buffers() if "average" in n]
        self.weights.append(torch.cat([whole(tensor).detach().flatten() for tensor in own]))
        everything = list(stage.parameters())
        here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in everything)
        self.held.append(here / sum(p.numel() for p in everything))


def train(
    name: str,
    folders: str,
    *,
    rank: int | None = None,
    ckpt_path: str | None = None,
    data: list | None = None,
    more_callbacks: Sequence[L.Callback] = (),
    **settings: Any,
) -> tuple[Any, L.Trainer, Seen]:
    """Train a case in one process, or as one of two ranks under FSDP2."""
    make, own = CASES[name]
    seen, data = Seen(), data or batches(name)
    if rank is not None:
        data, own = [parts_of(one)[rank] for one in data], {"strategy": "fsdp2", "devices": 2, **own}
    with without_weights() if rank is not None and name in DEFERRED else contextlib.nullcontext():
        stage = make(f"{folders}/policy", f"{folders}/reward")
    run = arena.trainer(**{**own, "callbacks": [seen, *more_callbacks], "use_distributed_sampler": False, **settings})
    with patch.dict(PASS_TOKENS, {"cpu": 64}):
        run.fit(stage, arena.loader(data), ckpt_path=ckpt_path)
    if rank is not None:
        assert is_sharded(stage)
    return stage, run, seen


def main(folders: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    for name in names:
        _, _, seen = train(name, folders, rank=rank)
        torch.save((seen.weights, seen.rows, seen.held), Path(out) / f"{name}_{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
