"""Sample texts of each validation, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

COLUMNS = ("step", "mode", "score", "prompt", "completion")


def as_text(prompt: Any) -> str:
    """A prompt as plain text; of a conversation, one line a message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class SampleTable(Callback):
    """Write the stage's newest validation samples to ``samples.jsonl`` in the run's folder, and to W&B where it logs.

    Reads ``pl_module.samples``: a list of dicts with step, mode, prompt, completion and score.

    Args:
        rows: samples kept of a validation.
        wandb_every: send every n-th validation's table to W&B (each is a file there); 0 = none.
    """

    def __init__(self, rows: int = 16, wandb_every: int = 1) -> None:
        self.rows, self.wandb_every, self.seen = rows, wandb_every, 0

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seen = state_dict["seen"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append this validation's samples."""
        samples = getattr(pl_module, "samples", [])[: self.rows]
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False) or not samples:
            return
        folder = trainer.log_dir  # a collective: every rank has to ask
        self.seen += 1
        if not trainer.is_global_zero:
            return
        rows = [{**sample, "prompt": as_text(sample["prompt"])} for sample in samples]
        path = Path(folder or trainer.default_root_dir) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self.wandb_every and (self.seen - 1) % self.wandb_every == 0:
            table = [[row.get(column) for column in COLUMNS] for row in rows]
            for logger in trainer.loggers:
                if hasattr(logger, "log_table"):
                    logger.log_table("samples", columns=list(COLUMNS), data=table, step=trainer.global_step)
