"""Kill runs of the four stages at random moments, start them again, and compare their ends bit for bit.

    python benchmarks/faults/soak.py --kills 50

A run is killed again and again until it ends by itself, so one may be struck several times. The moments: any (SIGKILL
after a random time), while tokens are sampled, before responses are scored, within a rollout after some of its updates,
in a save (before the file is on the disk, before it has its name, before the link is moved), in the export, and SIGTERM
and SIGUSR1, after which a checkpoint is due. Every step is saved, so a kill costs the step at hand, or with a save that
it cuts off the one before as well. Prints what was struck, how often, and what was lost: saves cut off, links that
point to nothing whole, damaged files, ends that differ (weights, moments, schedule, place in the data, exported files).
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests"), str(Path(__file__).resolve().parents[2])]

from faults import runs  # noqa: E402

from lit_rlhf.checkpoints import CheckpointError, newest, read  # noqa: E402

MOMENTS = ("any", "fsync", "replace", "export", "SIGKILL", "SIGTERM", "SIGUSR1")
IN_ROLLOUTS = {"sampling": 6, "scoring": 1}  # further moments of PPO and GRPO, and how often they come a rollout
UPDATES = {"sft": 1, "reward": 1, "ppo": 8, "grpo": 2}  # optimizer steps a step of the Trainer


class Table:
    """What was struck and what it cost."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}

    def add(self, stage: str, moment: str, **counts: int) -> None:
        """Add to a row."""
        self.counts.setdefault((stage, moment), Counter()).update(counts)

    def show(self) -> None:
        """Print it."""
        columns = ("struck", "missed", "saves cut off", "links broken", "files damaged")
        print(f"| stage | moment | {' | '.join(columns)} |\n| --- | --- |{' --- |' * len(columns)}")
        for (stage, moment), row in sorted(self.counts.items()):
            print(f"| {stage} | {moment} | {' | '.join(str(row[column]) for column in columns)} |")


def damage(root: Path) -> dict[str, int]:
    """What a strike left: saves cut off, links that point to no whole checkpoint, files that are damaged."""

    def is_damaged(path: Path) -> bool:
        try:
            read(path)
        except (CheckpointError, FileNotFoundError):
            return True
        return False

    links = list(root.glob("version_*/checkpoints/last.ckpt"))
    halves = list(root.glob("version_*/checkpoints/.step=*.partial"))
    for half in halves:
        half.unlink()  # counted once
    return {
        "saves cut off": len(halves),
        "links broken": sum(map(is_damaged, links)),
        "files damaged": sum(map(is_damaged, newest(path.parent for path in links))),
    }


class Soak:
    """Runs of one stage, struck and started again.

    Args:
        stage: one of ``runs.STAGES``.
        folder: where models and data are, and the runs go.
        draw: chooses the moments.
        table: where the counts go.
    """

    def __init__(self, stage: str, folder: Path, draw: random.Random, table: Table) -> None:
        self.stage, self.folder, self.draw, self.table = stage, folder, draw, table
        self.context, self.log = runs.server(), folder / f"{stage}.log"
        self.ended, self.differing = 0, 0
        self.seconds = 0.0

    def start(self, root: Path, hook: str | None = None) -> runs.Run:
        """Start the run under ``root``, or start it again."""
        return runs.Run(self.context, runs.arguments(self.stage, self.folder, root), self.log, hook)

    def finish(self, root: Path) -> dict[str, Any]:
        """Let a run end by itself; returns what it ends with."""
        if code := self.start(root).wait():
            raise SystemExit(f"{self.stage} ended with code {code}:\n{self.log.read_text(encoding='utf-8')}")
        return runs.end_of(root)

    def strike(self, root: Path, moment: str) -> int:
        """Start a run and strike it at the moment; returns the exit code."""
        if moment == "any":
            run = self.start(root)
            run.process.join(self.draw.uniform(0.2, 1.0) * self.seconds)
            run.send(signal.SIGKILL)
            return run.wait()
        often = {"fsync": 3, "replace": 2, **IN_ROLLOUTS}.get(moment, UPDATES[self.stage])
        calls = 1 if moment == "export" else often * (runs.STEPS - 1)
        return self.start(root, f"{moment}@{self.draw.randint(1, calls)}").wait()

    def run(self, strikes: int) -> None:
        """Strike runs so many times in all, each until it ends, and compare the ends."""
        self.finish(self.folder / f"{self.stage}-warm")
        started = time.monotonic()
        whole = self.finish(self.folder / f"{self.stage}-whole")
        self.seconds, struck, root = time.monotonic() - started, 0, self.folder / self.stage
        moments = [*MOMENTS, *(IN_ROLLOUTS if self.stage in ("ppo", "grpo") else ())]
        deck: list[str] = []
        while struck < strikes:
            deck = deck or self.draw.sample(moments, len(moments))  # each as often as the others
            moment = deck.pop()
            code = self.strike(root, moment)
            struck += code != 0
            self.table.add(self.stage, moment, **({"struck": 1, **damage(root)} if code else {"missed": 1}))
            if code == 0 or struck == strikes:
                different = runs.differences(self.finish(root), whole)
                print("\n".join(f"{self.stage}: {place} differs" for place in different[:5]), end="", flush=True)
                self.ended, self.differing = self.ended + 1, self.differing + bool(different)
                shutil.rmtree(root)
        print(f"{self.stage}: {struck} strikes, {self.ended} runs ended, {self.differing} of them differ", flush=True)


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at least so many, shared out over the stages")
    parser.add_argument("--stages", nargs="+", default=list(runs.STAGES), choices=runs.STAGES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw, table = Path(tempfile.mkdtemp()), random.Random(args.seed), Table()
    runs.make_files(folder)
    soaks = [Soak(stage, folder, draw, table) for stage in args.stages]
    for soak in soaks:
        soak.run(-(-args.kills // len(soaks)))
    table.show()
    shutil.rmtree(folder)
    sys.exit(any(soak.differing for soak in soaks))


if __name__ == "__main__":
    main()
