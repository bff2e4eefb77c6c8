"""Checkpoints to resume from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with the state in which training ends and with what validation found.

    Lightning's saves every n steps: those after the last multiple of n are in no checkpoint. And it saves before the
    validation of the same step, which is where a reward model learns the mean of its scores.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where ``max_steps`` ends training: a moment later the epoch would count as finished."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self._save_the_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint of this step once more, now with what the validation found."""
        saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        super().on_validation_end(trainer, pl_module)
        if saved and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_checkpoint(trainer, saved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step has been saved already."""
        self._save_the_end(trainer)

    def _save_the_end(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False) or self._last_global_step_saved == trainer.global_step:
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
