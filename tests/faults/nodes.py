"""A reward for runs on several nodes: writes down what each process sampled, and may have a signal come."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import arena

CALLS = [0]
SIGNAL_AT = 5  # two rollouts, two answers to what is held out, and then the third rollout


def noted(prompts: list, completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """As ``arena.low_ids``; in the third rollout of a job's first start SLURM's signal comes to every task."""
    CALLS[0] += 1
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    with (Path(os.environ["STAND_IN_NOTES"]) / f"sampled{rank}").open("a") as file:
        file.writelines(json.dumps([p, ids]) + "\n" for p, ids in zip(prompts, completion_ids, strict=True))
    if CALLS[0] == SIGNAL_AT and "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
        os.kill(os.getpid(), signal.SIGUSR1)
    return arena.low_ids(prompts, completions, completion_ids)
