"""The reward model: learn from comparisons which response people prefer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from lit_rlhf.batch import Pairs
from lit_rlhf.metrics import CalibrationError, PairAccuracy, ScoreMoments
from lit_rlhf.models import Network, keep_adapters_only, load_scalar, load_tokenizer, save_scalar
from lit_rlhf.objectives import centering_loss, group_mean, pairwise_loss
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.guards import refuse_half_precision_weights
from lit_rlhf.stages.optim import Optim, clip_and_log, configure, divide_gradients
from lit_rlhf.stages.parts import read_ranked


class RewardModeling(LightningModule):
    """Minimise −log σ(r_better − r_worse − margin) over comparisons (Ouyang et al. 2022, eq. 1).

    Each prompt weighs the same however many of its responses were compared, and the mean is over all prompts of an
    optimizer step, whatever ``accumulate_grad_batches`` and the number of processes.

    Args:
        model: hub id or folder: a language model (a new scalar head is put on it) or a reward model to go on from.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how the model is loaded.
        optim: the optimizer's settings.
        margin: subtract the data's ``margin`` column from the difference of scores (Touvron et al. 2023, eq. 2).
        center: weight of (r_better + r_worse)², which keeps scores around 0 (Eisenstein et al. 2023, §2).
        seed: of the new head.
    """

    score_mean: Tensor
    score_std: Tensor
    was_validated: Tensor

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        network: Network = Network(),
        optim: Optim = Optim(),
        margin: bool = True,
        center: float = 0.0,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__()
        remember(self, arguments)
        network, self.optim = revive(Network, network), revive(Optim, optim)
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.reward = load_scalar(model, network, seed=seed)
        keep_adapters_only(self, ["reward"])
        self.margin, self.center = margin, center
        self.step_prompts = 0.0
        for name, value in (("score_mean", 0.0), ("score_std", 1.0), ("was_validated", False)):
            self.register_buffer(name, torch.tensor(value))
        self.val_loss, self.val_accuracy, self.val_calibration = MeanMetric(), PairAccuracy(), CalibrationError()
        self.val_scores = ScoreMoments()

    def compare(self, batch: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each comparison [M], and the scores of its two responses [M]; each response is read once."""
        scores = read_ranked(self.reward, batch)
        better, worse = scores[batch.better], scores[batch.worse]
        losses = pairwise_loss(better, worse, margin=batch.margin if self.margin else None)
        return losses + self.center * centering_loss(better, worse), better, worse

    def on_fit_start(self) -> None:
        """Refuse the Trainer settings that would quietly train something else."""
        refuse_half_precision_weights(self.trainer)

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Sum over prompts of the mean loss of their comparisons; the gradient is divided by the step's prompts."""
        losses, better, worse = self.compare(batch)
        total = group_mean(losses, batch.groups).sum()
        self.step_prompts += len(batch)
        self.log_dict(
            {
                "loss": total.detach() / len(batch),
                "accuracy": (better > worse).float().mean(),
                "margin": (better - worse).detach().mean(),
                "chosen_mean": better.detach().mean(),
                "rejected_mean": worse.detach().mean(),
            },
            batch_size=len(batch),
        )
        return total * self.trainer.accumulate_grad_batches  # Lightning divides by it; the count below is the true one

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into that of the mean over the prompts of all batches and ranks."""
        count = torch.tensor(self.step_prompts, device=self.device, dtype=torch.double)
        divide_gradients(optimizer, float(self.trainer.strategy.reduce(count, reduce_op="mean")))
        self.step_prompts = 0.0

    configure_gradient_clipping = clip_and_log

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Held-out loss, accuracy and calibration; keep the scores for their mean and spread."""
        losses, better, worse = self.compare(batch)
        self.val_loss.update(losses)
        self.val_accuracy.update(better - worse)
        self.val_calibration.update(better - worse)
        self.val_scores.update(torch.cat([better, worse]))

    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics; note mean and spread of the scores, which are saved with the model."""
        mean, std = self.val_scores.compute()
        self.score_mean.copy_(mean)
        self.score_std.copy_(std)
        self.was_validated.fill_(True)
        to = "test" if self.trainer.testing else "val"
        self.log_dict(
            {
                f"{to}/loss": self.val_loss.compute(),
                f"{to}/accuracy": self.val_accuracy.compute(),
                f"{to}/calibration_error": self.val_calibration.compute(),
                f"{to}/score_mean": self.score_mean,
                f"{to}/score_std": self.score_std,
            }
        )
        for metric in (self.val_loss, self.val_accuracy, self.val_calibration, self.val_scores):
            metric.reset()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: Pairs, batch_idx: int) -> list[dict[str, float]]:
        """Score each comparison's two responses."""
        _, better, worse = self.compare(batch)
        return [{"better": b, "worse": w} for b, w in zip(better.tolist(), worse.tolist(), strict=True)]

    def configure_optimizers(self) -> Any:
        """One AdamW over the reward model."""
        return configure(self, {"reward": (self.reward.parameters(), self.optim.lr)}, self.optim)

    def export(self, folder: str, merge: bool = True) -> None:
        """Write a sequence-classification folder, with the held-out scores' mean and std where there was a validation.

        Args:
            folder: where to.
            merge: must be true: a reward model is exported whole, so that every loader of such folders can use it.

        Raises:
            ValueError: ``merge`` is false.
        """
        if not merge:
            raise ValueError("a reward model is exported whole, with its adapters merged: leave merge at true")
        mean, std = (float(self.score_mean), float(self.score_std)) if self.was_validated else (None, None)
        save_scalar(self.reward, self.tokenizer, folder, mean=mean, std=std)
