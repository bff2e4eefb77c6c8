"""What ``predict`` gives, as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class Predictions(Callback):
    """Write the rows that a stage's ``predict_step`` returns to ``predictions.jsonl`` in the run's folder.

    With several processes each writes its own share; the others' files carry their rank.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder and an empty file."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: every rank has to ask
        folder.mkdir(parents=True, exist_ok=True)
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        self.path = folder / f"predictions{rank}.jsonl"
        self.path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch's rows."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        rank_zero_info(f"predictions: {self.path}")
