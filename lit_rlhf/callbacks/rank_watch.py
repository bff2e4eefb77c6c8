"""Several processes end together: one that fails takes the others down, and they say which one it was and why."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import traceback
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.distributed_c10d import _get_default_store

from lit_rlhf.callbacks.rank_links import Links, place

NEWS = 2.0  # seconds in which the reason for a broken connection is waited for
_BROKEN = re.compile(r"gloo|nccl|connection|timed out|process group|store", re.IGNORECASE)
_starts = itertools.count()  # the same on all processes, which make the same runs


class RankError(RuntimeError):
    """Another process of this run has failed; the message says which one, where and why."""


class RankWatch(Callback):
    """End all processes of a run, within seconds, when one of them fails.

    Without it the others wait in the next collective: on NCCL until its time limit, half an hour, and then they report
    a broken connection. Each process keeps a connection to rank 0, in a thread. An exception is announced before the
    process ends; a process that is killed closes its connection; one that is stopped, or whose machine is lost, falls
    silent. The others print one line that names the rank, its host, the error and the line of code, and end with exit
    code 1: by the exception that a broken collective raises, of which a :class:`RankError` is the cause, or, where
    they are held up elsewhere, after five seconds without one.

    A rank that leaves by ``SystemExit`` (a preemption) is waited for, and one that has finished is not missed.

    Args:
        silence: seconds without a sign of life after which a rank is taken for lost; longer than any call that keeps
            Python's interpreter lock. 0: ranks are not watched.
    """

    def __init__(self, silence: float = 600.0) -> None:
        if not 0 <= silence < float("inf"):
            raise ValueError(f"ranks.silence is {silence}: expected seconds, or 0 to leave the ranks unwatched")
        self.silence = silence
        self._links: Links | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the processes; the thread does it, so that nothing waits."""
        if self._links is None and (store := self._store(trainer)) is not None:
            launcher = trainer.strategy.launcher
            children = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
            here = "127.0.0.1" if trainer.num_nodes == 1 else trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
            self._links = Links(trainer.global_rank, trainer.world_size, store, here, self.silence, children)
            self._links.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others; or, where it follows from another rank's failure, name that as the cause."""
        links, self._links = self._links, None
        if links is None:
            self._leave_word(trainer, exception)
            return
        links.leaving = True  # by itself: nobody needs to end it
        if broken := isinstance(exception, RuntimeError) and bool(_BROKEN.search(str(exception))):
            links.failed.wait(NEWS)
        if broken and links.failed.is_set():
            exception.__cause__ = RankError(links.failure)
        elif isinstance(exception, Exception):
            if broken and (others := links.whereabouts()):  # a time limit has passed, perhaps: who was waited for?
                print(links.named(f"the others' last signs of life: {others}"), file=sys.stderr, flush=True)
            links.tell("failed", links.named(described(exception)))
        else:
            links.tell("left", links.named(f"{type(exception).__name__}: {exception}"))
        links.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Part as friends."""
        links, self._links = self._links, None
        if links is not None:
            links.tell("bye")
            links.close()

    def _store(self, trainer: Trainer) -> Any:
        """What the processes found each other by, a new part of it for each run; None where there is one process."""
        if not self.silence or trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return None
        return dist.PrefixStore(f"lit_rlhf/ranks/{next(_starts)}", _get_default_store())

    def _leave_word(self, trainer: Trainer, exception: BaseException) -> None:
        """Tell those who will look for a connection, which this process never made (its data could not be read)."""
        store = self._store(trainer) if isinstance(exception, Exception) else None
        if store is not None:
            links = Links(trainer.global_rank, trainer.world_size, store, "", self.silence, [])
            with contextlib.suppress(RuntimeError):  # the store is gone: they know
                store.set("failed", links.named(described(exception)))


def described(exception: BaseException) -> str:
    """An exception in one line: its class, the beginning of its message, and where it was raised."""
    text = " ".join(str(exception).split())
    at = place(traceback.extract_tb(exception.__traceback__))
    return f"{type(exception).__name__}: {text[:1000]}" + (f" ({at})" if at else "")
