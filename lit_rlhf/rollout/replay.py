"""Run a step of fixed shape; on CUDA, from its third time on, by replaying it as a CUDA graph."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_WARM_UP = 2  # times that a step is run before it is captured: libraries set themselves up, which no graph may hold

Step = Callable[[], None]


class Replay:
    """Steps by key: what a key stands for must do the same work on the same memory every time.

    The first times are steps like any other, on a side stream; then the step is recorded without being run, and from
    there on replayed. The graphs share one memory pool, which they may since each leaves its results in buffers that
    were there before. Where recording fails, one warning says why, and the steps are run as they are.

    Args:
        device: where the steps run; only on CUDA is anything recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record = recorder(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.forget()

    def forget(self) -> None:
        """Give up what was recorded: the memory that the steps work on is another."""
        self.graphs: dict[Hashable, Any] = {}
        self.times: Counter[Hashable] = Counter()

    def __call__(self, key: Hashable, step: Step) -> None:
        """Run ``step``, or what was recorded when it was run under the same key."""
        self.times[key] += 1
        if self.record is not None and key not in self.graphs and self.times[key] > _WARM_UP:
            self._record(key, step)
        if key in self.graphs:
            self.graphs[key].replay()
        elif self.record is None:
            step()
        else:
            self._run_aside(step)

    def _run_aside(self, step: Step) -> None:
        """Run a step on another stream than the default one, as must be before it is captured on one."""
        if self.side is None:
            step()
            return
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            step()
        current.wait_stream(self.side)

    def _record(self, key: Hashable, step: Step) -> None:
        assert self.record is not None
        try:
            self.graphs[key] = self.record(step, next(iter(self.graphs.values()), None))
        except RuntimeError as error:  # a wait for the device, an operation that cannot be recorded, no memory left
            self.record = None
            self.forget()
            warnings.warn(
                f"a decode step could not be captured as a CUDA graph ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); it is run without",
                stacklevel=5,
            )


def recorder(device: torch.device) -> Callable[[Step, Any], Any] | None:
    """Give what records a step on a device (step, an earlier graph or None) → graph; None where nothing can."""
    return _cuda_graph if device.type == "cuda" else None


def _cuda_graph(step: Step, earlier: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    pool = None if earlier is None else earlier.pool()
    # By thread: a loader's thread that pins memory meanwhile must not spoil it.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph


def without_weight_cache(device: torch.device) -> AbstractContextManager[None]:
    """Autocast as it is, but without its store of cast weights, which a graph would go on reading once freed."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)
