"""Tables of a validation, for people to open."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Tables(Callback):
    """Write the tables of the newest validation as CSV files into the run's folder, beside ``metrics.csv``.

    Reads ``pl_module.tables``: for each table's name its rows, dicts with the same keys. The reward model has
    ``calibration.csv`` and ``length_bias.csv``.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this validation's tables over those of the last."""
        tables = getattr(pl_module, "tables", {})
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False) or not tables:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: every rank has to ask
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["step", *rows[0]])
                writer.writeheader()
                writer.writerows({"step": trainer.global_step, **row} for row in rows)

    on_test_end = on_validation_end
