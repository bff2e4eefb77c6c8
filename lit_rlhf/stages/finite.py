"""A NaN or infinite loss or gradient moves no weights: the run stops, or the optimizer step is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.stages.optim import Optim, clip_gradients, gradient_norms
from lit_rlhf.stages.ranks import over_ranks

if TYPE_CHECKING:
    from lit_rlhf.stages.inner_loop import InnerLoop

COUNTS = ("skipped_updates", "skipped_in_a_row")
_SHOWN = 4  # rows, prompts and weights named in a message


class Watch:
    """Lets only finite losses and gradients move the weights of a stage; counts what it keeps back.

    A step that is kept back leaves weights, moments and the optimizer's own step count as they were: AdamW passes over
    weights that have no gradient. Under 16-mixed the gradient scaler, which makes overflows on purpose, does that
    itself, and nothing is watched here.

    Args:
        stage: gains the buffers ``skipped_updates``, the count since the run began, and ``skipped_in_a_row``.
        optim: says whether to stop, and after how many kept back steps in a row.
    """

    def __init__(self, stage: LightningModule, optim: Optim) -> None:
        self.skips, self.most = optim.nonfinite == "skip", optim.most_skips
        self.in_a_row = 0
        self.losses: list[Tensor] = []  # of each backward pass of the step: a number, or one a row
        for name in COUNTS:
            stage.register_buffer(name, torch.zeros((), dtype=torch.long))
        # Checkpoints written before these were counted.
        stage.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: _fill_in(state, prefix))
        stage.register_load_state_dict_post_hook(lambda stage, _: self._go_on(stage))

    def _go_on(self, stage: Any) -> None:
        self.in_a_row = int(stage.skipped_in_a_row)

    def _count(self, stage: Any, in_a_row: int) -> None:
        """Note the steps left out in a row, on the host and in what is saved; steps that are made cost nothing."""
        if in_a_row != self.in_a_row:
            self.in_a_row = in_a_row
            stage.skipped_in_a_row.fill_(in_a_row)

    def note(self, losses: Tensor) -> None:
        """Keep what a backward pass starts from, until the step is decided."""
        self.losses.append(losses.detach())

    def admits(
        self,
        stage: Any,
        optimizer: torch.optim.Optimizer,
        norms: Mapping[str, Tensor],
        where: Callable[[list[Tensor]], list[str]],
    ) -> bool:
        """Whether the step may be made; the same on all ranks. One number is read from the device, once a step.

        Args:
            stage: a LightningModule with ``skipped_updates``.
            optimizer: loses its gradients if not.
            norms: of the gradients, over all ranks.
            where: names what is not finite, given the losses noted.

        Raises:
            FloatingPointError: no, and the settings say to stop, or that was one too many in a row.
        """
        losses, self.losses = self.losses, []
        if getattr(stage.trainer.precision_plugin, "scaler", None) is not None:
            return True
        seen = [value.detach().isfinite().all().to(stage.device) for value in (*norms.values(), *losses)]
        if not over_ranks(stage.trainer, (~torch.stack(seen).all()).float(), "max").item():
            self._count(stage, 0)
            return True
        self._count(stage, self.in_a_row + 1)
        found = "; ".join(where(losses) + _weights(stage) or ["another process, whose message says more"])
        problem = f"{type(stage).__name__}, step {stage.global_step}: not finite: {found}"
        if not self.skips:
            raise FloatingPointError(
                f"{problem}. The weights are as they were before this step. Lower optim.lr, set "
                "trainer.gradient_clip_val, look at these rows (trainer.detect_anomaly names the operation), or leave "
                "such steps out with optim.nonfinite: skip"
            )
        if self.in_a_row > self.most:
            raise FloatingPointError(
                f"{problem}. That is step {self.in_a_row} in a row to be left out, and optim.most_skips allows "
                f"{self.most}. The weights are as they were before the first of them"
            )
        warnings.warn(f"{problem}. This step is left out", stacklevel=2)
        optimizer.zero_grad(set_to_none=True)
        stage.skipped_updates += 1
        return False


def clip_finite(
    module: Any,
    optimizer: torch.optim.Optimizer,
    limit: float | None,
    algorithm: str | None,
    where: Callable[[list[Tensor]], list[str]],
) -> dict[str, Tensor]:
    """Clip the gradient if it is finite; else the stage's ``watch`` stops the run or takes the step out.

    Args:
        module: the stage.
        optimizer: holds the gradients.
        limit: as in `clip_gradients`.
        algorithm: as in `clip_gradients`.
        where: names what is not finite, given the losses of the step.

    Returns:
        ``{group}/grad_norm`` before clipping; without them when values are clipped. ``skipped_updates`` under
        ``nonfinite: skip``.
    """
    norms = gradient_norms(optimizer)
    whole = {name: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for name, norm in norms.items()}
    if module.watch.admits(module, optimizer, whole, where):
        clip_gradients(optimizer, norms, limit, algorithm)
    metrics = {} if algorithm == "value" else {f"{name}/grad_norm": norm for name, norm in whole.items()}
    return metrics | ({"skipped_updates": module.skipped_updates.float()} if module.watch.skips else {})


def clip_and_log(
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> None:
    """Clip the gradient and log its norm; a stage takes it as its ``configure_gradient_clipping``."""
    metrics = clip_finite(module, optimizer, gradient_clip_val, gradient_clip_algorithm, bad_rows)
    module.log_dict(metrics, batch_size=1)


def _fill_in(state: dict[str, Any], prefix: str) -> None:
    for name in COUNTS:
        state.setdefault(f"{prefix}{name}", torch.zeros((), dtype=torch.long))


def _weights(stage: LightningModule) -> list[str]:
    """The weights whose gradient (this rank's part of it) is not finite."""
    found = []
    for name, weight in stage.named_parameters():
        if weight.grad is not None:
            own = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
            if not own.isfinite().all():
                found.append(name)
    return [f"the gradient of {_few(found)}"] if found else []


def bad_rows(losses: list[Tensor]) -> list[str]:
    """Which rows of which batch of the step have a loss that is not finite."""
    found = []
    for i, loss in enumerate(losses):
        rows = (~loss.isfinite()).nonzero().flatten().tolist()
        if rows:
            batch = "the batch" if len(losses) == 1 else f"batch {i} of the step's {len(losses)}"
            found.append(f"the loss of rows {_few(rows)} of {batch}")
    return found


def bad_microbatches(stage: InnerLoop) -> list[str]:
    """Which microbatches of the update have a loss or metric that is not finite: what, which rows, which prompts."""
    plan, found = stage.updates, []
    metrics = [metrics for step, _, metrics in plan.metrics if step == plan.step]
    for rows, own in zip(plan.steps[plan.step], metrics, strict=True):
        names = [name for name, value in own.items() if not value.isfinite().all()]
        if names:
            found.append(f"{_few(names)} of {_prompts(stage, rows)}")
    update = f"update {plan.step + 1} of the rollout's {plan.count}"
    return [update, *found] if found else [f"{update}, though its losses are"]


def _prompts(stage: InnerLoop, rows: Tensor) -> str:
    assert stage.updates.rollout is not None
    texts, group = stage.updates.rollout.prompts, stage.samples_per_prompt
    numbers = sorted({row // group for row in rows.tolist()})
    first = " ".join(str(texts[numbers[0] * group]).split())[:60]
    return f"rows {_few(sorted(rows.tolist()))} (prompts {_few(numbers)}, first {first!r})"


def _few(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
