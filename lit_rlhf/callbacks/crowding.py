"""Too many threads for the cores that are free."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

_SECONDS = 10  # that a look covers at least
_SHARE = 0.25  # of the threads' time spent waiting; on free cores it is under a hundredth


class Crowding:
    """Warns once where a run's threads wait for cores that other work keeps busy, and says what to set.

    Every small operation of a threaded run waits for its slowest thread, so a core too few costs not its share but a
    multiple. The kernel's own count of the time that this process's threads were ready and had no core is looked at,
    not the load, which counts other containers' work and waits for a disk.

    Args:
        read: gives (seconds on a core, seconds ready without one) of all threads so far; None where nobody counts.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        read: Callable[[], tuple[float, float] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.read, self.clock = read or thread_seconds, clock
        self.start()

    def start(self) -> None:
        """Look at what comes from now on."""
        self.began, self.before = self.clock(), self.read()

    def look(self) -> None:
        """Warn if enough time has passed since the start and a quarter of the threads' time was spent waiting."""
        if self.before is None or torch.get_num_threads() == 1 or self.clock() - self.began < _SECONDS:
            return
        now = self.read()
        if now is None:
            return
        ran, waited = (after - before for after, before in zip(now, self.before, strict=True))
        self.began, self.before = self.clock(), now
        if waited > _SHARE * (ran + waited):
            self.before = None
            warnings.warn(
                f"this run's threads spent {waited / (ran + waited):.0%} of their time waiting for a core: torch uses "
                f"{torch.get_num_threads()} threads, more than there are free cores. Small models then run many "
                "times slower than with one thread; set OMP_NUM_THREADS=1 (or the number of cores that are free)",
                stacklevel=2,
            )


def thread_seconds(folder: Path = Path("/proc/self/task")) -> tuple[float, float] | None:
    """Seconds that this process's threads were on a core, and were ready without one; None where Linux says neither."""
    ran, waited, found = 0, 0, False
    try:
        for thread in folder.iterdir():
            counts = (thread / "schedstat").read_text().split()
            ran, waited, found = ran + int(counts[0]), waited + int(counts[1]), True
    except (OSError, ValueError, IndexError):  # no such file, or a thread has ended meanwhile
        return None
    return (ran / 1e9, waited / 1e9) if found else None
