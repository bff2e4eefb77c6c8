"""On resume, the optimizer's settings come from the user's config, its moments from the checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ConfigWins(Callback):
    """Put the configured learning rates, betas, ε and weight decay back after a checkpoint was loaded.

    Restoring an optimizer and its schedule also restores the settings they were saved with, so that a new
    ``optim.lr`` would change nothing. Where a setting did not change, nothing is touched: such a resume stays exact.
    """

    def __init__(self) -> None:
        self.settings: list[list[dict[str, Any]]] = []
        self.base_lrs: list[list[Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the config asks for: the optimizers are made, the checkpoint is not in them yet."""
        self.settings = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        self.base_lrs = [list(getattr(one.scheduler, "base_lrs", [])) for one in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back; the current learning rate keeps its place on the schedule."""
        if trainer.ckpt_path is None:
            return
        for optimizer, wanted_groups in zip(trainer.optimizers, self.settings, strict=True):
            for group, wanted in zip(optimizer.param_groups, wanted_groups, strict=True):
                peak, old_peak = (settings.get("initial_lr", settings["lr"]) for settings in (wanted, group))
                lr = group["lr"] if peak == old_peak else group["lr"] * peak / old_peak if old_peak else peak
                group.update({**wanted, "lr": lr})
        for one, base_lrs in zip(trainer.lr_scheduler_configs, self.base_lrs, strict=True):
            if base_lrs:
                one.scheduler.base_lrs = base_lrs
