"""The measured process's end of the pipe: it waits for leave to work, and says what the work took."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from typing import Any


class Gate:
    """Lets one process work at a time: the driver gives leave on stdin, the process answers in lines of JSON.

    Whatever else the process prints goes to stderr.

    Args:
        burst: steps between two looks at the clock; what is reported is their mean.
    """

    def __init__(self, burst: int = 1) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.burst, self.steps = burst, 0

    def ready(self, *packages: str) -> None:
        """Say that the first step may begin, with the versions of the packages, and wait for leave."""
        import torch

        versions = {name: version(name) for name in ("torch", "transformers", *packages)}
        self._say(threads=torch.get_num_threads(), versions=versions)
        self._wait()

    def done(self, tokens: float, **phases: float) -> None:
        """Say what the step took, and wait for leave to make the next.

        Args:
            tokens: response or sequence tokens of the step.
            phases: seconds of its parts, by name.
        """
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.steps += 1
        if self.steps % self.burst:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._say(wall=wall / self.burst, cpu=cpu / self.burst, tokens=tokens, phases=phases, peak_mb=peak)
        self._wait()

    def _say(self, **what: Any) -> None:
        print(json.dumps(what), file=self.answers, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit  # the driver has seen enough, or is gone
        self.wall, self.cpu = time.perf_counter(), time.process_time()
