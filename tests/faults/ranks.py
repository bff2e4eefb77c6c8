"""Two processes of one run through the command line, a fault planted in one of them; for test_ranks.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from faults import runs
from pair import free_port

import lit_rlhf
from lit_rlhf.data import PromptData
from lit_rlhf.rewards import Rewards
from lit_rlhf.rollout import DecodeSampler

PLACES: dict[str, tuple[Any, str]] = {
    "reading the data": (PromptData, "setup"),
    "sampling": (DecodeSampler, "__call__"),
    "scoring": (Rewards, "judge"),
    "the update": (torch.optim.AdamW, "step"),
    "validation": (lit_rlhf.GRPO, "validation_step"),
}


def strike(where: str, how: str, note: Path) -> None:
    """At the second call of a place (the only one of ``reading the data``): raise, die, freeze or wait."""
    owner, attribute = PLACES[where]
    calls, real = [0], getattr(owner, attribute)

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if where == "reading the data" else 2):
            note.write_text(repr(time.time()))
            if how == "wait":
                time.sleep(60)
            elif how == "raise":
                raise LookupError("planted")
            else:
                os.kill(os.getpid(), signal.Signals[how])
        return real(*args, **kwargs)

    setattr(owner, attribute, struck)


def run_rank(rank: int, port: int, args: list[str], folder: str, plan: tuple[str, str] | None) -> None:
    """What each process does."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if plan:
        strike(*plan, Path(folder) / f"struck{rank}")
    runs.child(args, f"{folder}/said{rank}", None)


def two(context: Any, folder: Path, plans: list[tuple[str, str] | None], *more: str) -> tuple[list[int | None], float]:
    """Run GRPO on two ranks, with plans of what strikes each; exit codes, and seconds from the last strike to the end.

    A rank that is frozen is ended last, when the other one is gone.
    """
    root = folder / "run"
    args = runs.arguments("grpo", folder.parent, root, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    args += ["--data.val_fraction", "0.4", "--data.batch_size", "2", *more]
    port = free_port()
    ranks = [
        context.Process(target=run_rank, args=(rank, port, args, str(folder), plan)) for rank, plan in enumerate(plans)
    ]
    for process in ranks:
        process.start()
    frozen = [plan is not None and plan[1] == "SIGSTOP" for plan in plans]
    for process, is_frozen in zip(ranks, frozen, strict=True):
        if not is_frozen:
            process.join(90)
    ended = time.time()
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes, ended - max(float(path.read_text()) for path in folder.glob("struck*"))
