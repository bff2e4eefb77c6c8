"""Run by test_sharded_resume.py as each of two processes: save under FSDP2, go on, and go on from one process's file.

usage: LOCAL_RANK=… MASTER_PORT=… sharded_resume.py FOLDERS OUT ALONE
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from stages import sharded

from lit_rlhf import checkpoint_parts
from lit_rlhf.callbacks import Checkpoint
from lit_rlhf.strategies import FSDP2Strategy

CASES = ("sft", "reward_lora", "ppo_trunk", "ppo_lora", "ppo_roles", "grpo")


def go(name: str, folders: str, keep_in: Path | None = None, rank: int | None = None, **settings: Any) -> torch.Tensor:
    """Two epochs of one batch each; what is trained, at the end."""
    saver = [] if keep_in is None else [Checkpoint(str(keep_in), keep=9, every_n_train_steps=1, filename="{step}")]
    first = sharded.batches(name)[:1]
    _, _, seen = sharded.train(
        name,
        folders,
        rank=rank,
        data=first,
        more_callbacks=saver,
        max_epochs=2,
        enable_checkpointing=bool(saver),
        accumulate_grad_batches=1,
        **settings,
    )
    return seen.weights[-1]


def go_sharded(name: str, folders: str, form: str, rank: int, **more: Any) -> torch.Tensor:
    """The same as one of two ranks, saving in one file or in parts."""
    return go(name, folders, rank=rank, strategy=FSDP2Strategy(save_parts=form == "parts"), **more)


def go_with_a_full_disk(folders: str, kept: Path, rank: int) -> dict[str, Any]:
    """One process cannot write its part of the first checkpoint."""
    write = checkpoint_parts.write

    def fail(part: dict[str, Any], path: Path) -> None:
        if rank == 1 and "step=1" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(part, path)

    with patch.object(checkpoint_parts, "write", fail), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        weights = go_sharded("sft", folders, "parts", rank, keep_in=kept)
    return {"weights": weights, "said": "\n".join(str(one.message) for one in seen)}


def main(folders: str, out: str, alone: str) -> None:
    torch.set_num_threads(1)
    rank, found = int(os.environ["LOCAL_RANK"]), {}
    for name in CASES:
        for form in ("file", "parts"):
            kept = Path(out) / name / form
            found[name, form, "whole run"] = go_sharded(name, folders, form, rank, keep_in=kept)
            found[name, form, "went on"] = go_sharded(name, folders, form, rank, ckpt_path=str(kept / "step=1.ckpt"))
        ckpt_path = f"{alone}/{name}/step=1.ckpt"
        found[name, "from one process"] = go_sharded(name, folders, "file", rank, ckpt_path=ckpt_path)
    found["full disk"] = go_with_a_full_disk(folders, Path(out) / "full", rank)
    torch.save(found, Path(out) / f"found_{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
