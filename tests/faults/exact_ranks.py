"""Run by test_exact_ranks.py: train on two processes, go on with two fresh ones, and with another number.

usage: MASTER_PORT=… exact_ranks.py MODEL_FOLDER ROWS OUT STAGE …

The libraries are loaded once and the processes forked off. OUT gets tapes, by stage, run and rank: ``whole`` on two
processes, ``resumed`` from it; ``one`` on one process, and ``widened``, on two, from that.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults import exact, exact_cases

POINTS = {"sft": 1, "reward margin": 0, "ppo": 0, "grpo": 0}  # the checkpoint that two fresh processes go on from
WIDENED = {"sft": 1, "grpo calm": 0}  # the one that two processes go on from after one
ALONE = {"sft": 2, "grpo calm": 4}  # rows of its batch: as many as each of the two reads; as many as both
SETTINGS = {"max_epochs": 1}
ON_TWO = {**SETTINGS, "devices": 2, "strategy": "ddp"}
BATCH = 2  # rows that each of two processes reads for one


def play(name: str, model: str, rows: Path, folder: Path, batch: int, *ckpt: Path, **settings: Any) -> exact.Tape:
    """Train one stage."""
    return exact.play(partial(exact_cases.build, name, model, rows, batch), folder, *ckpt, **settings)


def first(rank: int, model: str, rows: Path, out: Path, names: list[str]) -> None:
    """The runs that nothing interrupts."""
    for name in names:
        tape = play(name, model, rows, out / name / "whole", BATCH, **ON_TWO)
        torch.save((tape.begin, tape.events), out / f"{name}-whole-{rank}")


def second(rank: int, model: str, rows: Path, out: Path, names: list[str]) -> None:
    """Those that go on."""
    for name in names:
        ckpt = exact.kept(out / name / "whole")[POINTS[name]]
        tape = play(name, model, rows, out / name / "resumed", BATCH, ckpt, **ON_TWO)
        torch.save((tape.begin, tape.events), out / f"{name}-resumed-{rank}")
    for name in WIDENED:
        ckpt = exact.kept(out / name / "one")[WIDENED[name]]
        tape = play(name, model, rows, out / name / "widened", BATCH, ckpt, **ON_TWO)
        torch.save((tape.begin, tape.events), out / f"{name}-widened-{rank}")


def alone(rank: int, model: str, rows: Path, out: Path, names: list[str]) -> None:
    """Runs on one process, from the start."""
    for name in WIDENED:
        tape = play(name, model, rows, out / name / "one", ALONE[name], **SETTINGS)
        torch.save((tape.begin, tape.events), out / f"{name}-one-0")


def work(what: Callable[..., None], rank: int, *given: Any) -> None:
    """What one process does."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    what(rank, *given)


def main(model: str, rows: str, out: str, *names: str) -> None:
    fork = multiprocessing.get_context("fork")
    given = (model, Path(rows), Path(out), list(names))
    for jobs in ([(first, 0), (first, 1)], [(alone, 0)], [(second, 0), (second, 1)]):
        processes = [fork.Process(target=work, args=(*job, *given)) for job in jobs]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.2)
            if any(process.exitcode for process in processes):  # without it the other one would wait forever
                for process in processes:
                    process.kill()
                sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
