"""A progress bar that shows what matters: score, KL and speed in RL, loss and accuracy elsewhere."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from lit_rlhf.stages.inner_loop import InnerLoop

# Metric → its name on the bar, in this order; what a stage does not log is not shown.
SHOWN = {
    "objective/scores": "score",
    "reward": "score",
    "objective/kl": "kl",
    "throughput/tokens_per_second": "tok/s",
    "loss": "loss",
    "token_accuracy": "acc",
    "accuracy": "acc",
    "val/loss": "val_loss",
    "val/accuracy": "val_acc",
    "val/score_greedy": "val_score",
}
HIDDEN_IN_RL = {"loss"}  # a policy loss is near zero whatever happens


class Progress(TQDMProgressBar):
    """Progress bar with the metrics of ``SHOWN`` and, in RL, what is going on: rollout or update.

    Args:
        refresh_rate: steps between two refreshes; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.phase = ""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Phase and metrics, in the order of ``SHOWN``."""
        hidden = HIDDEN_IN_RL if isinstance(pl_module, InnerLoop) else set()
        items: dict[str, Any] = {"phase": self.phase} if self.phase else {}
        metrics = trainer.callback_metrics
        for metric, name in SHOWN.items():
            if metric in metrics and metric not in hidden:
                value = metrics[metric]
                items[name] = f"{float(value):.3g}" if isinstance(value, (Tensor, float)) else value
        return items | trainer.progress_bar_metrics

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A rollout begins: generation and scoring take most of a step, and nothing else would move."""
        if isinstance(pl_module, InnerLoop):
            self._enter("rollout", trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The rollout is there: the updates begin."""
        if self.phase == "rollout":
            self._enter("update", trainer, pl_module)

    def _enter(self, phase: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = phase
        if self.is_enabled:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
