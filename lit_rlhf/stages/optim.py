"""One optimizer with named parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

from lit_rlhf.ranges import SettingError, check_number


@dataclass
class Optim:
    """How the weights move.

    Args:
        lr: peak learning rate.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's ε, added to the root of the second moment.
        weight_decay: decoupled weight decay, applied to every trainable tensor.
        schedule: what the learning rate does after the warm-up: stays, or falls to ``final_fraction`` of the peak.
        warmup_steps: optimizer steps (in RL: rollouts) of linear rise from 0.
        final_fraction: where a falling schedule ends, as a fraction of the peak (InstructGPT's cosine: 0.1).
        nonfinite: what a NaN or infinite loss or gradient does: ``stop`` the run with an error that says where, or
            ``skip`` the optimizer step.
        most_skips: steps skipped in a row after which the run stops all the same.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    nonfinite: Literal["stop", "skip"] = "stop"
    most_skips: int = 10

    def __post_init__(self) -> None:
        if self.nonfinite not in ("stop", "skip") or self.most_skips < 0:
            raise ValueError(
                f"optim.nonfinite={self.nonfinite!r} and optim.most_skips={self.most_skips}: expected 'stop' or "
                "'skip', and 0 or more"
            )
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas is {self.betas!r}: expected two numbers, one for each of AdamW's moments")
        for i, beta in enumerate(self.betas):
            check_number(f"optim.betas[{i}]", beta, least=0, below=1)
        for name in ("lr", "weight_decay"):
            check_number(f"optim.{name}", getattr(self, name), least=0)
        check_number("optim.eps", self.eps, above=0)  # at 0 a weight without gradient would become NaN
        check_number("optim.final_fraction", self.final_fraction, least=0, most=1)
        check_number("optim.warmup_steps", self.warmup_steps, least=0, whole=True)
        self.betas = (self.betas[0], self.betas[1])  # a checkpoint gives a list back


def learning_rate_factor(step: int, total: float, optim: Optim) -> float:
    """Give the learning rate of a step as a fraction of the peak.

    Args:
        step: optimizer steps (in RL: rollouts) already made.
        total: steps of the whole run; may be infinite where the schedule is constant.
        optim: the schedule's settings.

    >>> learning_rate_factor(100, 100, Optim(schedule="cosine", final_fraction=0.1))
    0.1
    """
    if step < optim.warmup_steps:
        return (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return 1.0
    done = min(1.0, (step - optim.warmup_steps) / max(1.0, total - optim.warmup_steps))
    left = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.final_fraction + (1 - optim.final_fraction) * left


def configure(
    module: LightningModule,
    groups: Mapping[str, tuple[Iterable[Parameter], float]],
    optim: Optim,
    begin: Mapping[str, int] | None = None,
) -> Any:
    """Build what ``configure_optimizers`` returns: AdamW over named groups and a schedule per optimizer step.

    The length of the run is read when training starts, not here: asking the Trainer now would build the data loader
    before a checkpoint has put it back in its place.

    Args:
        module: the stage; its Trainer gives the length of the run.
        groups: for each group its parameters (frozen ones are skipped) and peak learning rate.
        optim: the settings.
        begin: for a group the first step that moves it; 0 where it is not named.

    Raises:
        SettingError: the Trainer clips below 0 or accumulates nothing; later, if the schedule falls without an end.
    """
    # A negative norm would turn the gradient around, NaN would poison every weight.
    check_number("trainer.gradient_clip_val", module.trainer.gradient_clip_val, least=0, null=True)
    check_number("trainer.accumulate_grad_batches", module.trainer.accumulate_grad_batches, least=1, whole=True)
    parameters = [
        {"params": [p for p in tensors if p.requires_grad], "lr": lr, "name": name}
        for name, (tensors, lr) in groups.items()
    ]
    # One kernel for all of AdamW: a quarter of the time on a CPU. Under fp16 it would undo the scaling of gradients
    # after they are clipped.
    fused = module.trainer.precision != "16-mixed" and module.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )

    def factor(step: int) -> float:
        # Built before training starts, the scheduler asks for step 0 only, and no schedule has fallen by then.
        total = module.trainer.estimated_stepping_batches if step else math.inf
        if step and optim.schedule != "constant" and not 0 < total < math.inf:
            raise SettingError(
                f"optim.schedule={optim.schedule!r} needs to know where the run ends: set trainer.max_steps or "
                f"trainer.max_epochs, or take schedule='constant'."
            )
        return learning_rate_factor(step, total, optim)

    def factor_from(first: int) -> Callable[[int], float]:
        return lambda step: factor(step) if step >= first else 0.0

    factors = [factor_from((begin or {}).get(name, 0)) for name in groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def forget_moments(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Have a group start like new: its moments saw gradients while nothing moved.

    AdamW scales its first steps up by how few there were (Kingma & Ba 2015, alg. 1); moments that have counted steps
    without gradients would scale them wrongly, by (1 − β₁) / √(1 − β₂).

    Args:
        optimizer: of `configure`.
        name: of the group.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["name"] == name else ():
            optimizer.state.pop(parameter, None)


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Norm of each named parameter group's gradient, over all ranks (a DTensor where weights are sharded)."""
    return {
        group["name"]: torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None]).detach()
        for group in optimizer.param_groups
    }


def clip_gradients(
    optimizer: torch.optim.Optimizer, norms: Mapping[str, Tensor], limit: float | None, algorithm: str | None
) -> None:
    """Clip each parameter group by its own norm: in PPO the critic's gradient must not shrink the policy's.

    Lightning's own clipping refuses fused optimizers under bf16-mixed, where nothing is scaled.

    Args:
        optimizer: its named parameter groups hold the gradients.
        norms: from `gradient_norms`.
        limit: largest norm (or value) of a gradient; None = no limit.
        algorithm: Lightning's ``gradient_clip_algorithm``: "value" clips each number, else the norm counts.
    """
    if not limit:
        return
    for group in optimizer.param_groups:
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(group["params"], limit)
        else:
            torch.nn.utils.clip_grads_with_norm_(group["params"], limit, norms[group["name"]])


def divide_gradients(optimizer: torch.optim.Optimizer, count: float) -> None:
    """Divide every gradient by ``count``: the gradient of a step's sum becomes that of its mean.

    Args:
        optimizer: its parameter groups hold the gradients.
        count: what the loss was summed over (tokens, or prompts), over all batches and ranks of the step.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_(gradients, max(count, 1.0))
