"""Numbers of all processes together."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def over_ranks(trainer: Trainer, value: Tensor, how: str) -> Tensor:
    """Sum, mean or maximum over the processes, elementwise; itself where there is one. Every process must call.

    Args:
        trainer: of the run.
        value: a tensor, of the same shape everywhere.
        how: "sum", "mean" or "max".
    """
    if trainer.world_size == 1:
        return value
    own = value.to(trainer.strategy.root_device, copy=True)  # it is reduced in place
    found: Tensor = trainer.strategy.reduce(own, reduce_op=how)
    return found


def sum_over_ranks(trainer: Trainer, *values: Tensor) -> Tensor:
    """Add up numbers over the processes, all in one reduction; every process must call.

    Args:
        trainer: of the run.
        values: numbers [] on one device.

    Returns:
        One sum each, [len(values)] in float32.
    """
    return over_ranks(trainer, torch.stack([value.detach().float() for value in values]), "sum")
