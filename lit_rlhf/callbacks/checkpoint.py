"""Checkpoints to resume from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves the state in which training ends.

    Lightning's saves every n steps and leaves the steps after the last multiple of n out of every checkpoint, so that
    a finished run could not be continued from its end.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step has been saved already."""
        if getattr(trainer, "fast_dev_run", False) or self._last_global_step_saved == trainer.global_step:
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
