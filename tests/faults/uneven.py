"""Run by test_ranks.py on one and on two processes: validate and train the four stages on rows that do not divide.

usage: uneven.py FOLDER (see ``runs.make_files``)
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import arena
import torch
from faults import runs

import lit_rlhf
from lit_rlhf.data import DataError
from lit_rlhf.models import Network

CASES = list(itertools.product(runs.STAGES, (1, 3, 5)))  # rows held out; two rows a batch


def rows_of(stage: str, count: int, folder: Path) -> str:
    """A file of so many rows."""
    path = folder / f"{stage}-{count}-{os.getpid()}.jsonl"
    path.write_text("".join((folder / f"{stage}.jsonl").read_text().splitlines(keepends=True)[:count]))
    return str(path)


def build(stage: str, folder: Path, trains: int, holds: int, batch_size: int = 1) -> tuple[Any, Any]:
    """Stage and data, of so many rows to train on and held out."""
    kind, data = getattr(lit_rlhf, runs.CLASSES[stage]), getattr(lit_rlhf, runs.DATA[stage])
    settings: dict[str, Any] = {"optim": lit_rlhf.stages.Optim(lr=1e-3)}
    if stage in ("ppo", "grpo"):
        settings |= {"rewards": [arena.low_ids], "sampling": arena.SHORT}
    if stage == "grpo":
        settings |= {"group_size": 2}
    if stage == "sft":
        settings |= {"rewards": [arena.low_ids], "sample_prompts": 1, "sampling": arena.SHORT}
    files = {"train": rows_of(stage, trains, folder), "val": rows_of(stage, holds, folder)}
    module = kind(str(folder / "base"), network=Network(), **settings)
    return module, data(**files, batch_size=batch_size, val_batch_size=2, seed=1)


def held_out(stage: str, holds: int, folder: Path, **distributed: Any) -> dict[str, float]:
    """What a validation on so many rows logs."""
    module, data = build(stage, folder, 4, holds)
    found = arena.trainer(**distributed).validate(module, data, verbose=False)[0]
    return {key: float(value) for key, value in found.items()}


def weights_after(stage: str, trains: int, batch_size: int, folder: Path, **distributed: Any) -> torch.Tensor:
    """Weights after one epoch on so many rows."""
    module, data = build(stage, folder, trains, 2, batch_size)
    arena.trainer(max_epochs=1, max_steps=-1, limit_val_batches=0, **distributed).fit(module, data)
    return arena.weights(module)


def run_rank(rank: int, port: int, folder: str) -> None:
    """What each of two processes does."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    two, there = {"devices": 2, "strategy": "ddp"}, Path(folder)
    found: dict[str, Any] = {f"{stage}-{holds}": held_out(stage, holds, there, **two) for stage, holds in CASES}
    for stage in runs.STAGES:
        torch.save(weights_after(stage, 3, 1, there, **two), there / f"{stage}.rank{rank}.pt")  # one row is left over
        try:
            weights_after(stage, 1, 1, there, **two)
        except DataError as error:
            found[f"{stage}-too-few"] = str(error)
    (there / f"uneven{rank}.json").write_text(json.dumps(found))
