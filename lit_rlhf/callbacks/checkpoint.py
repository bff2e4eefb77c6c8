"""Checkpoints to resume from."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.checkpoint_io import SafeCheckpointIO
from lit_rlhf.callbacks.generators import put_back, states_of_all
from lit_rlhf.callbacks.unfinished import (
    begin_epoch,
    begin_validation,
    expect_validation,
    validation_follows,
    within_a_step,
)
from lit_rlhf.checkpoints import CheckpointError, link

# What Lightning's callback notes of a save before it makes it.
NOTES = ("best_model_path", "best_k_models", "best_model_score", "kth_best_model_path", "kth_value", "current_score")


class _NotSavedError(Exception):
    """A save failed on the process that writes."""


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which loses nothing: neither the end of a run nor a checkpoint to a kill.

    Lightning's saves every n steps: those after the last multiple of n are in no checkpoint. And it saves before the
    validation of the same step, which is where a reward model learns the mean of its scores. A disk that is full ends
    its run; here the checkpoint before stays, the run goes on with a warning, and the next interval tries again.

    Args:
        dirpath: folder of the checkpoints; ``checkpoints`` in the run's own if null.
        keep: newest checkpoints that stay where no metric is monitored: more than one, since the newest may be damaged.
        train_time_interval: save after so much time as well, whichever comes first.
        kwargs: those of ModelCheckpoint.
    """

    def __init__(
        self, dirpath: str | None = None, keep: int = 2, train_time_interval: timedelta | None = None, **kwargs: Any
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}: at least the newest checkpoint must stay")
        super().__init__(dirpath, **kwargs)
        if train_time_interval is not None:  # Lightning's own works beside the other two, but refuses to be given so
            self._train_time_interval = train_time_interval
            if kwargs.get("every_n_train_steps") is None and kwargs.get("every_n_epochs") is None:
                self._every_n_epochs = 0
        self.keep = keep
        self._outdated: list[str] = []  # oldest first
        self._failed_at: int | None = None  # the step whose save failed
        self._failure = ""
        self._put_off = False  # a save, to the end of the epoch
        self._generators: list[dict[str, Any]] = []  # of each process, where a checkpoint was loaded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have this Trainer's checkpoints written and read safely."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody chose another
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        refuse_another_start(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store every process's random state, for what user code draws, and whether a validation is still to come."""
        checkpoint["generators"] = states_of_all(trainer)
        if validation_follows(trainer):
            expect_validation(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training starts: much may still draw before that."""
        self._generators = checkpoint.get("generators", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put this process's random state back; a process that the stopped run had not keeps its own."""
        super().on_train_start(trainer, pl_module)
        begin_epoch(trainer)
        if trainer.global_rank < len(self._generators):
            put_back(self._generators[trainer.global_rank], trainer.strategy.root_device)
        self._generators = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and where ``max_steps`` ends training: a moment later the epoch would count as finished.

        What a resumed Lightning would pass over comes first: the end of an epoch, and a validation after the very last
        step. A validation elsewhere it is told to begin with.
        """
        validated_next, last = validation_follows(trainer), trainer.global_step == trainer.max_steps
        self._put_off = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not validated_next
        if self._put_off or (validated_next and last) or within_a_step(trainer):
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_at_max_steps(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off to the epoch's end."""
        if self._put_off:
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
            self._save_at_max_steps(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the run was resumed is of no more interest."""
        super().on_validation_start(trainer, pl_module)
        begin_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint of this step once more, now with what the validation found."""
        saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or within_a_step(trainer):
            return
        if saved:
            self._attempt(trainer, lambda: self._save_checkpoint(trainer, saved))
        else:
            self._save_at_max_steps(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step has been saved already.

        Raises:
            CheckpointError: the state in which training ended is on no disk.
        """
        self._failed_at = None  # the disk may have room by now
        self.save_now(trainer)
        if self._failed_at is not None:
            newest = f"the newest checkpoint is {self._last_checkpoint_saved}" if self._last_checkpoint_saved else ""
            raise CheckpointError(
                f"training ended at step {trainer.global_step} and its end could not be saved: {self._failure}; "
                + (newest or "there is no checkpoint of this run")
            )

    def save_now(self, trainer: Trainer) -> None:
        """Save this step, between two batches, unless it has been saved already; all processes together."""
        if getattr(trainer, "fast_dev_run", False) or self._last_global_step_saved == trainer.global_step:
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_at_max_steps(self, trainer: Trainer) -> None:
        if trainer.global_step == trainer.max_steps:
            self.save_now(trainer)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or within_a_step(trainer)

    # -- how Lightning's callback saves, links and removes ---------------------------------------------------------

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        save = super()._save_topk_checkpoint
        self._attempt(trainer, lambda: save(trainer, monitor_candidates))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        save, how, unsaved = super()._save_last_checkpoint, self.save_last, trainer.global_step
        if how == "link" and self.monitor is not None and self._last_global_step_saved != unsaved:
            self.save_last = True  # this step is not among the best: a link would point to an older one
        try:
            self._attempt(trainer, lambda: save(trainer, monitor_candidates))
        finally:
            self.save_last = how
        # Only now, when the link points to the new one, may the old ones go.
        spare = self.keep - 1 if self.monitor is None and self.save_top_k == 1 else 0
        while self._failed_at is None and len(self._outdated) > spare:
            super()._remove_checkpoint(trainer, self._outdated.pop(0))

    def _attempt(self, trainer: Trainer, save: Callable[[], None]) -> None:
        """Save; if that fails, stand where we stood before and let the run go on. One attempt a step."""
        if self._failed_at == trainer.global_step:
            return
        before = {name: getattr(self, name) for name in NOTES} | {"best_k_models": dict(self.best_k_models)}
        last = self.last_model_path
        try:
            save()
        except _NotSavedError as error:
            vars(self).update(before, last_model_path=last)
            self._failed_at, self._failure = trainer.global_step, str(error)
            kept = f"the one before stays, {self._last_checkpoint_saved}" if self._last_checkpoint_saved else "none yet"
            rank_zero_warn(
                f"CHECKPOINT NOT SAVED at step {trainer.global_step}: {error}. Training goes on ({kept}); "
                "the next interval tries again. Make room or give permission."
            )
        else:
            self._failed_at = None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, SafeCheckpointIO):
            super()._save_checkpoint(trainer, filepath)
            return
        with io.forgiving() as failures:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        if failure := trainer.strategy.broadcast("; ".join(failures)):
            raise _NotSavedError(failure)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        self._outdated = [path for path in self._outdated if path != filepath]
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            try:
                link(filepath, linkpath)
            except OSError as error:
                rank_zero_warn(f"{linkpath} could not be pointed to {filepath}: {error}")
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._outdated.append(filepath)


def refuse_another_start(trainer: Trainer) -> None:
    """Refuse a rank that would start from elsewhere than rank 0: each has looked for the checkpoint itself.

    Raises:
        CheckpointError: its machine does not see rank 0's folder.
    """
    if trainer.world_size == 1:
        return
    own = trainer.ckpt_path
    first = trainer.strategy.broadcast(own)
    # The folder may be mounted elsewhere: run, folder and file must be the same.
    if (own and Path(own).parts[-3:]) != (first and Path(first).parts[-3:]):
        raise CheckpointError(
            f"rank 0 goes on from {first or 'nothing'}, rank {trainer.global_rank} from {own or 'nothing'}: "
            "trainer.default_root_dir must be a folder that all machines see"
        )
