"""Every run keeps its whole config: in its own folder and with its loggers."""

from __future__ import annotations

from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class SavedConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder and the same settings into each logger's hyperparameters.

    Lightning's own callback knows the run's folder for two kinds of logger only; with W&B all runs share one file.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once a run."""
        if self.already_saved:
            return
        folder = trainer.log_dir  # a collective: every rank has to ask
        if trainer.is_global_zero:
            whole = self.parser.dump(self.config, skip_none=False)
            path = Path(folder or trainer.default_root_dir) / self.config_filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(whole, encoding="utf-8")
            for logger in trainer.loggers:
                logger.log_hyperparams({"cli": yaml.safe_load(whole)})
        self.already_saved = True
