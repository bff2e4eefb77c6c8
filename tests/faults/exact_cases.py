"""Stages with everything on that a checkpoint could forget, on tiny files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arena
import lightning as L
from faults.exact import moody

from lit_rlhf.data import PreferenceData, PromptData, SFTData
from lit_rlhf.models import Lora, Network
from lit_rlhf.rewards import MissingEOS, Steps
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import (
    GRPO,
    KL,
    PPO,
    SFT,
    Advantages,
    Clip,
    Entropy,
    Optim,
    RewardModeling,
    Shaping,
    Updates,
    Value,
)

ADAPTERS = Network(lora=Lora(r=2, dropout=0.1))
OPTIM = Optim(lr=1e-3, eps=1e-5, schedule="cosine", warmup_steps=3)
RL = {"sampling": Sampling(max_new_tokens=5), "optim": OPTIM, "updates": Updates(2, 2, micro_batch_tokens=24)}


def some_steps(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[Any]:
    """Judges two steps of some answers, and others as a whole."""
    totals = moody(prompts, completions, completion_ids)
    return [
        Steps([score, ids[-1] / 100], [0, len(ids) - 1]) if ids[0] % 2 else score + ids[0] / 100
        for score, ids in zip(totals, completion_ids, strict=True)
    ]


def write_files(folder: Path) -> None:
    """Rows for every stage, two sources where a stage mixes them."""
    kinds = {
        "a": [{"prompt": f"Q{i}:", "completion": " yes" * (1 + i % 3)} for i in range(12)],
        "b": [{"prompt": f"P{i}:", "completion": f" {i}"} for i in range(5)],
        "pairs": [
            {"prompt": f"Q{i}:", "chosen": " good" * (1 + i % 2), "rejected": f" bad {i}", "margin": i / 9}
            for i in range(12)
        ],
        "ranked": [{"prompt": f"Q{i}:", "responses": [" best", f" {i}", " worst" * (1 + i % 3)]} for i in range(12)],
        "texts": [{"text": f"some text {i}" + "." * i} for i in range(7)],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SFTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft packing": {"packing": True, "network": Network(dropout=0.1)},
    "sft noise": {"neftune_alpha": 5.0, "network": Network(residual_dropout=0.2), "sample_prompts": 2},
    "sft adapters": {"network": ADAPTERS},
}
RANKINGS: dict[str, dict[str, Any]] = {
    "reward margin": {"center": 0.01, "network": Network(residual_dropout=0.1), "normalize": "mean_std"},
    "reward ranked": {"network": ADAPTERS, "normalize": "demonstrations"},
}
PPOS: dict[str, dict[str, Any]] = {
    "ppo": {
        "shaping": Shaping(running=True, clip=2.0),
        "kl": KL(0.1, target=0.5, horizon=20),
        "value": Value(shared=True, warmup=2, lr=2e-3),
        "entropy": Entropy(0.1, final=0.01),
        "ptx_coef": 0.5,
        "ema": 0.6,
        "missing_eos": MissingEOS(penalty=0.5),
    },
    "ppo steps": {"rewards": [some_steps], "network": ADAPTERS, "value": Value(warmup=3), "ema": 0.6},
    "ppo penalty": {
        "clip": Clip(form="penalty", penalty_target=1e-4),
        "kl": KL(0.1, "k3", "loss"),
        "whiten_rewards": True,
    },
}
GRPOS: dict[str, dict[str, Any]] = {
    "grpo": {
        "refresh_reference": 2,
        "kl": KL(0.05, "k3", "loss", target=0.2, horizon=30),
        "ema": 0.6,
        "clip": Clip(0.2, 0.28),
        "aggregation": "token_mean",
        "groups": 2,
        "entropy": Entropy(0.01, final=0.1),
    },
    "grpo calm": {  # as it goes on one process, it goes on two
        "rewards": [arena.low_ids],
        "kl": KL(0.05, "k3", "loss", target=0.2, horizon=30),
        "ema": 0.6,
        "updates": Updates(epochs=2),
    },
    "grpo gdpo": {
        "rewards": [moody, arena.low_ids],
        "advantages": Advantages(mix="normalize_then_sum"),
        "network": ADAPTERS,
        "kl": KL(0.05, "k1", "reward", target=0.2, horizon=30),
    },
    "grpo steps": {"rewards": [some_steps], "advantages": Advantages("batch", "batch", whiten=True)},
}
NAMES = (*SFTS, *RANKINGS, *PPOS, *GRPOS)


def build(
    name: str, model: str, folder: Path, batch: int = 4, workers: int = 0
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """The stage and its data.

    Args:
        name: of a case.
        model: folder of a tiny model.
        folder: of `write_files`.
        batch: rows a process reads for one batch.
        workers: loader processes.
    """
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    common = {"batch_size": batch, "num_workers": workers, "max_dropped": 0.0, "seed": 3}
    if name in SFTS:
        stage = SFT(model, optim=OPTIM, **{"sample_prompts": 0, "sampling": arena.SHORT, **SFTS[name]})
        return stage, SFTData([a, {"path": b, "weight": 1.7}], val=b, val_batch_size=3, **common)
    if name in RANKINGS:
        file = folder / ("ranked.jsonl" if name == "reward ranked" else "pairs.jsonl")
        stage = RewardModeling(model, optim=OPTIM, **RANKINGS[name])
        return stage, PreferenceData(str(file), val=str(file), val_limit=4, **common)
    knobs = {"rewards": [moody], **RL, **(PPOS | GRPOS)[name]}
    if name in PPOS:
        texts = {"pretraining": str(folder / "texts.jsonl"), "pretraining_batch_size": 5, "pretraining_length": 8}
        more = texts if knobs.get("ptx_coef") else {}
        return PPO(model, **knobs), PromptData(a, val=b, val_limit=2, **common, **more)
    return GRPO(model, group_size=2, **knobs), PromptData([a, b], val=b, val_limit=2, **common)
