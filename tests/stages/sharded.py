"""Run by test_sharded.py as each of two processes: train stages under FSDP2, leave weights and metrics for comparison.

usage: LOCAL_RANK=… MASTER_PORT=… sharded.py FOLDERS OUT CASE …
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import arena
import lightning as L
import torch
from stages.two_ranks import roles, shares
from torch.utils._python_dispatch import TorchDispatchMode

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
LOW = {  # computed in bfloat16, kept in float32
    "sft_low": (CASES["sft"][0], {"precision": "bf16-mixed"}),
    "ppo_low": (CASES["ppo"][0], {"precision": "bf16-mixed"}),
    "grpo_lora_low": (CASES["grpo_lora"][0], {"precision": "bf16-mixed"}),
}
UNEVEN = {  # long rows on the first rank, short ones on the second
    "sft_uneven": CASES["sft_lora"],
    "reward_uneven": CASES["reward"],
    "ppo_uneven": CASES["ppo"],
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


def uneven(batch: Any) -> list:
    """The longer half of the rows for the first of two ranks, the shorter for the second, and cut shorter still."""
    if isinstance(batch, Pairs):
        first, second = parts_of(batch)
        return [first, second.with_(mask=second.mask & (torch.arange(second.mask.shape[1]) < 3))]
    order = batch.mask.sum(dim=1).argsort(descending=True, stable=True)
    return [batch.select(order[:4]), batch.select(order[4:])]


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
    make, own = (CASES | LOW | UNEVEN)[name]
    seen, data = Seen(), data or batches(name)
    if rank is not None:
        cut = uneven if name in UNEVEN else parts_of
        data, own = [cut(one)[rank] for one in data], {"strategy": "fsdp2", "devices": 2, **own}
    with without_weights() if rank is not None and name in DEFERRED else contextlib.nullcontext():
        stage = make(f"{folders}/policy", f"{folders}/reward")
    assert next(stage.parameters()).is_meta == (rank is not None and name in DEFERRED)
    run = arena.trainer(**{**own, "callbacks": [seen, *more_callbacks], "use_distributed_sampler": False, **settings})
    with patch.dict(
        PASS_TOKENS, {"cpu": 2 if name in UNEVEN else 64}
    ):  # passes cost little: rows are read in many parts
        run.fit(stage, arena.loader(data), ckpt_path=ckpt_path)
    if rank is not None:
        assert is_sharded(stage)
    return stage, run, seen


class Collectives(TorchDispatchMode):
    """Counts the collectives that are made inside, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def main(folders: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    for name in names:
        with Collectives() as made:
            _, _, seen = train(name, folders, rank=rank)
        torch.save((seen.weights, seen.rows, seen.held, dict(made.counts)), Path(out) / f"{name}_{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
