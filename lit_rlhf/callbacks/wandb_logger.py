"""W&B that may fail: the run goes on, and its metrics stand in the CSV log all the same."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn


def _safe(name: str) -> Any:
    """A method of Lightning's logger whose errors are warnings; it runs on the first process."""
    method = getattr(WandbLogger, name)

    @rank_zero_only
    @functools.wraps(method)
    def call(self: SafeWandbLogger, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: method(self, *args, **kwargs))

    return call


class SafeWandbLogger(WandbLogger):
    """Lightning's WandbLogger, whose failures are warnings.

    With Lightning's, a server that cannot be reached ends the run, after a hundred seconds; so does W&B's own process
    when it dies; and a run whose server has gone away never ends, since W&B waits for it. Here a run that cannot begin
    online is kept in files, which ``wandb sync`` uploads; W&B that breaks off is left alone; and the end of a run waits
    ``seconds`` for it. Only a missing key still stops a run, at its start.

    Args:
        seconds: time limit of W&B's beginning, which takes it some ten seconds more to notice, and of the uploads that
            are left at the end (with wandb releases that have ``finish_timeout``).
        kwargs: those of Lightning's and of ``wandb.init``.
    """

    def __init__(self, *args: Any, seconds: float = 60.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bound(seconds)

    @classmethod
    def of(cls, logger: WandbLogger) -> SafeWandbLogger:
        """The same logger, made safe.

        Args:
            logger: one of Lightning's that has not begun.
        """
        own = cls.__new__(cls)
        vars(own).update(vars(logger))
        own._bound(60.0)
        return own

    def _bound(self, seconds: float) -> None:
        import wandb

        self._broken, self._ends = False, False
        limits = {"init_timeout": seconds, "finish_timeout": seconds, "finish_timeout_raises": True}
        given = self._wandb_init.get("settings") or {}
        if isinstance(given, dict):  # whole Settings are the user's own affair
            known = {key: limit for key, limit in limits.items() if key in wandb.Settings.model_fields}
            self._wandb_init["settings"] = {**known, **given}
        if self._wandb_init.get("anonymous") is None:  # W&B warns of this argument, whatever it is
            self._wandb_init.pop("anonymous", None)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run: online, else in files, else one that keeps nothing.

        Raises:
            wandb.errors.UsageError: no key, no login: W&B says what to do.
        """
        import wandb

        if self._broken:
            return DummyExperiment()
        try:
            run = super().experiment
        except wandb.errors.UsageError:
            raise
        except Exception as error:
            if self._wandb_init.get("mode") == "offline":
                self._give_up(error)
                return DummyExperiment()
            rank_zero_warn(
                f"W&B cannot be reached ({_first_line(error)}). Training goes on; this run's metrics are kept in "
                f"metrics.csv and for W&B in {self._save_dir or '.'}/wandb/offline-run-*: upload them later with "
                "`wandb sync` and that folder"
            )
            self._wandb_init["mode"] = "offline"
            return self.experiment
        if not self._ends:  # before W&B's own hook, which would wait without a word
            self._ends = True
            atexit.register(self._end)
        return run

    def _end(self) -> None:
        self._try(lambda: self.experiment.finish())
        if self._broken:  # its own hook would fail aloud, or wait once more
            import wandb

            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()

    def _try(self, call: Callable[[], Any]) -> None:
        import wandb

        if self._broken:
            return
        try:
            call()
        except wandb.errors.UsageError:
            raise
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        folder = getattr(getattr(self._experiment, "settings", None), "sync_dir", None)
        rest = f"; what it had written by then is in {folder}: `wandb sync {folder}` uploads it" if folder else ""
        rank_zero_warn(
            f"W&B failed ({_first_line(error)}) and gets nothing more of this run. Training goes on, and metrics.csv "
            f"has all metrics{rest}"
        )

    log_metrics, log_hyperparams, log_table, after_save_checkpoint, finalize = map(
        _safe, ("log_metrics", "log_hyperparams", "log_table", "after_save_checkpoint", "finalize")
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
