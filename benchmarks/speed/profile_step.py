"""Where a step of ours spends its time, by operator: ``python benchmarks/speed/profile_step.py ppo --shape 1m``.

The same work as in peers.py, without a peer; the share of the matrix products says how near the step is to its floor.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from pathlib import Path

import lightning as L
import side_ours
import torch
from peers import TASKS
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from work import Work, save_models

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("scaled_dot_product", "_flash_attention")


def print_python(trainer: L.Trainer, stage: L.LightningModule, loader: DataLoader, rows: int) -> None:
    """Where the Python of a toy model's steps goes: shares of a step in this project's and Lightning's functions.

    Functions are counted with all that they call, so shares overlap; the profiler makes calls dearer than they are.
    """
    found = cProfile.Profile()
    found.enable()
    trainer.fit(stage, loader)
    found.disable()
    stats = pstats.Stats(found).stats  # type: ignore[attr-defined]
    seen = sorted(((took, place, count) for place, (_, count, _, took, _) in stats.items()), reverse=True)
    ours = [one for one in seen if any(room in one[1][0] for room in ("lit_rlhf", "lightning/pytorch/core/module"))]
    whole = ours[0][0]
    for took, (file, line, name), count in ours[:rows]:
        print(f"{took / whole:6.1%} {count:8d} × {Path(file).name}:{line} {name}")


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--shape", default=None)
    parser.add_argument("--lengths", default="full", choices=["full", "ragged"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=15, help="operators shown")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = TASKS[asked.task][2] | {"lengths": asked.lengths, "steps": asked.steps}
    work = Work(asked.task, **(settings | ({"shape": asked.shape} if asked.shape else {})))
    with tempfile.TemporaryDirectory() as name:
        save_models(work.shape, Path(name))
        stage, loader = side_ours.prepare(work, Path(name))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_steps=asked.steps, accelerator="cpu", enable_model_summary=False, **quiet)
        if asked.task.startswith("loop_"):
            return print_python(trainer, stage, loader, asked.rows)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            trainer.fit(stage, loader)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    for event in events[: asked.rows]:
        share = event.self_cpu_time_total / whole
        milliseconds = event.self_cpu_time_total / 1e3 / asked.steps
        print(f"{share:6.1%} {milliseconds:9.1f} ms a step {event.count:8d} × {event.key[:60]}")
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / whole
    attention = sum(e.self_cpu_time_total for e in events if any(key in e.key for key in ATTENTION)) / whole
    print(f"matrix products {products:.0%}, attention {attention:.0%}, of {whole / 1e6 / asked.steps:.2f} s a step")


if __name__ == "__main__":
    main()
