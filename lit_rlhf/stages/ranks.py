"""Numbers of all processes together."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def sum_over_ranks(trainer: Trainer, *values: Tensor) -> Tensor:
    """Add up numbers over the processes, all in one reduction; every process must call.

    Args:
        trainer: of the run.
        values: numbers [] on one device.

    Returns:
        One sum each, [len(values)] in float32.
    """
    stacked = torch.stack([value.detach().float() for value in values])
    if trainer.world_size == 1:
        return stacked
    total: Tensor = trainer.strategy.reduce(stacked, reduce_op="sum")  # in place, of a tensor that is ours
    return total
