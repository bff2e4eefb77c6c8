"""The reward model: learn from comparisons which response people prefer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.batch import Pairs
from lit_rlhf.models import Network, keep_adapters_only, load_scalar, load_tokenizer, save_scalar
from lit_rlhf.objectives import best_of_k_loss, centering_loss, group_mean, pairwise_loss
from lit_rlhf.ranges import SettingError
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.finite import Watch, clip_and_log
from lit_rlhf.stages.guards import refuse_half_precision_weights
from lit_rlhf.stages.held_out import HeldOut
from lit_rlhf.stages.memory import explained_backward, explains_memory
from lit_rlhf.stages.optim import Optim, configure, divide_gradients
from lit_rlhf.stages.parts import read_ranked
from lit_rlhf.stages.ranks import over_ranks, sum_over_ranks
from lit_rlhf.stages.resume import greet
from lit_rlhf.stages.seeds import seed_for
from lit_rlhf.stages.spread import spread


class RewardModeling(LightningModule):
    """Minimise −log σ(r_better − r_worse − margin) over comparisons (Ouyang et al. 2022, eq. 1).

    Each prompt weighs the same however many of its responses were compared, and the mean is over all prompts of an
    optimizer step, whatever ``accumulate_grad_batches`` and the number of processes. A prompt's K responses are read
    once and give up to C(K, 2) comparisons; tied responses are not compared.

    Args:
        model: hub id or folder: a language model (a new scalar head is put on it) or a reward model to go on from.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how the model is loaded.
        optim: the optimizer's settings.
        loss: what a prompt's responses are asked: every two, which is better ("pairwise"); or all at once, which is the
            best ("best_of_k": −log softmax, Ziegler et al. 2019, eq. 1). Each of several tied best responses stands
            against the worse ones alone, and the prompt's loss is the mean of theirs.
        margin: subtract the data's ``margin`` column from the difference of scores (Touvron et al. 2023, eq. 2).
        label_smoothing: share of comparisons taken to be labelled the wrong way round, 0 to below ½.
        center: weight of (r_better + r_worse)², which keeps scores around 0 (Eisenstein et al. 2023, §2).
        normalize: what a saved model tells ``RewardModel(normalize=True)`` to take off and divide by: mean and
            deviation of the scores of all held-out responses; or the mean of each prompt's best and 1, so that
            demonstrations, where they are the best, average 0 (Ouyang et al. 2022, §3.5).
        seed: of the new head and of dropout.

    Raises:
        ValueError: a setting out of its range, or one that ``best_of_k`` has no use for.
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
        loss: Literal["pairwise", "best_of_k"] = "pairwise",
        margin: bool = True,
        label_smoothing: float = 0.0,
        center: float = 0.0,
        normalize: Literal["mean_std", "demonstrations"] = "mean_std",
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__()
        _check(loss, label_smoothing, normalize)
        remember(self, arguments)
        network, self.optim = revive(Network, network), revive(Optim, optim)
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.reward = load_scalar(model, network, seed=seed)
        keep_adapters_only(self, ["reward"])
        self.watch = Watch(self, self.optim)
        self.loss, self.margin, self.label_smoothing = loss, margin, label_smoothing
        self.center, self.normalize, self.seed = center, normalize, seed
        self.step_prompts = 0.0
        for name, value in (("score_mean", 0.0), ("score_std", 1.0), ("was_validated", False)):
            self.register_buffer(name, torch.tensor(value))
        self.held_out, self.tables = HeldOut(), dict[str, list[dict[str, Any]]]()

    def compare(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """Loss of each prompt, and the score [N] of each response, which is read once."""
        scores = read_ranked(self.reward, batch)
        better, worse = scores[batch.better], scores[batch.worse]
        margin = batch.margin if self.margin else None
        if self.loss == "best_of_k":
            if margin is not None:
                raise SettingError("loss=best_of_k has no use for the data's margin column: set margin to false")
            losses = best_against_worse(scores, batch)
        else:
            each = pairwise_loss(better, worse, margin=margin, label_smoothing=self.label_smoothing)
            losses = group_mean(each, batch.groups)
        return losses + self.center * group_mean(centering_loss(better, worse), batch.groups), scores

    configure_model = spread  # shards the networks where the strategy asks for it

    def on_fit_start(self) -> None:
        """Refuse the Trainer settings that would quietly train something else."""
        refuse_half_precision_weights(self.trainer)

    @explains_memory("reward")
    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Sum of the prompts' losses; the step's gradient is divided by its prompts before clipping."""
        place = (self.trainer.fit_loop.total_batch_idx, self.global_rank)
        torch.manual_seed(seed_for(self.seed, "dropout", *place))
        losses, scores = self.compare(batch)
        total, better, worse = losses.sum(), scores[batch.better], scores[batch.worse]
        self.step_prompts += len(batch)
        self.watch.note(losses)
        sums = (total, (better > worse).sum(), (better - worse).sum(), better.sum(), worse.sum())
        prompts, pairs, *totals = sum_over_ranks(self.trainer, *map(total.new_tensor, (len(batch), len(better))), *sums)
        names = ("loss", "accuracy", "margin", "chosen_mean", "rejected_mean")
        sizes = (prompts, *[pairs.clamp(min=1)] * 4)
        means = {name: value / size for name, value, size in zip(names, totals, sizes, strict=True)}
        self.log_dict(means, batch_size=len(batch))
        return total * self.trainer.accumulate_grad_batches  # Lightning divides by it; the count below is the true one

    on_load_checkpoint = greet  # refuses another run's checkpoint, says how far this one had come

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into that of the mean over the prompts of all batches and ranks."""
        count = torch.tensor(self.step_prompts, device=self.device, dtype=torch.double)
        divide_gradients(optimizer, float(over_ranks(self.trainer, count, "mean")))
        self.step_prompts = 0.0

    backward, configure_gradient_clipping = explained_backward, clip_and_log

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Held-out loss, accuracy and calibration; what the scores have to do with length; their mean and spread."""
        self.held_out.update(batch, *self.compare(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics, keep the tables, and note what is saved with the model about its scores."""
        metrics, self.tables = self.held_out.compute()
        shifted = self.normalize == "demonstrations"
        self.score_mean.copy_(metrics["best_mean" if shifted else "score_mean"])
        self.score_std.copy_(torch.ones_like(self.score_std) if shifted else metrics["score_std"])
        self.was_validated.fill_(True)
        to = "test" if self.trainer.testing else "val"
        self.log_dict({f"{to}/{name}": value for name, value in metrics.items()})

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: Pairs, batch_idx: int) -> list[dict[str, float]]:
        """Score each comparison's two responses."""
        _, scores = self.compare(batch)
        counted = slice(None) if batch.counts is None else batch.counts[batch.better]
        better, worse = scores[batch.better[counted]].tolist(), scores[batch.worse[counted]].tolist()
        return [{"better": b, "worse": w} for b, w in zip(better, worse, strict=True)]

    def configure_optimizers(self) -> Any:
        """One AdamW over the reward model."""
        return configure(self, {"reward": (self.reward.parameters(), self.optim.lr)}, self.optim)

    def export(self, folder: str, merge: bool = True) -> None:
        """Write a sequence-classification folder; after a validation it says what ``normalize`` is about.

        Args:
            folder: where to.
            merge: add adapters to the weights, so that every loader of such folders can use it. False writes adapters
                and head alone, for ``peft`` and ``RewardAdapter``.
        """
        mean, std = (float(self.score_mean), float(self.score_std)) if self.was_validated else (None, None)
        save_scalar(self.reward, self.tokenizer, folder, mean=mean, std=std, merge=merge)


def best_against_worse(scores: Tensor, batch: Pairs) -> Tensor:
    """Give each prompt's best-of-K loss; of several tied best responses the mean of theirs.

    Args:
        scores: [N].
        batch: the comparisons; they say which responses a best one stands against.
    """
    of_best = batch.best[batch.better]
    best, of_row = batch.better[of_best].unique(return_inverse=True)
    worse, prompts = batch.worse[of_best], batch.groups[of_best]
    contests = torch.cat([torch.arange(len(best), device=best.device), of_row])
    losses = best_of_k_loss(scores[torch.cat([best, worse])], contests)
    return group_mean(losses, prompts.new_zeros(len(best)).scatter(0, of_row, prompts))


def _check(loss: str, label_smoothing: float, normalize: str) -> None:
    if loss not in ("pairwise", "best_of_k"):
        raise ValueError(f"loss is {loss!r}, expected 'pairwise' or 'best_of_k'")
    if normalize not in ("mean_std", "demonstrations"):
        raise ValueError(f"normalize is {normalize!r}, expected 'mean_std' or 'demonstrations'")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more and less than 0.5")
    if label_smoothing and loss == "best_of_k":
        raise ValueError("label_smoothing is about pairs: loss=best_of_k has no use for it")
