"""Trainer settings that would quietly train something else, refused with what to use instead."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_half_precision_weights(trainer: Trainer) -> None:
    """Refuse precisions that hold weights and optimizer state in half precision.

    Raises:
        MisconfigurationException: ``trainer.precision`` is bf16-true, 16-true or the like.
    """
    precision = str(trainer.precision)
    if precision.endswith("true") and not precision.startswith(("32", "64")):
        raise MisconfigurationException(
            f"precision={precision} keeps weights and optimizer state in half precision: rotary tables lose digits "
            "and small updates round to nothing. Use precision='bf16-mixed'; frozen networks may be bfloat16."
        )


def run_length(trainer: Trainer, knob: str) -> float:
    """Optimizer steps of the whole run (in RL: rollouts).

    Args:
        trainer: of the run.
        knob: the setting that asks, for the error.

    Raises:
        MisconfigurationException: the run has no end.
    """
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise MisconfigurationException(
            f"{knob} needs to know where the run ends: set trainer.max_steps or trainer.max_epochs."
        )
    return total


def refuse_accumulation(trainer: Trainer) -> None:
    """Refuse gradient accumulation where one batch is a whole rollout.

    Raises:
        MisconfigurationException: ``trainer.accumulate_grad_batches`` is above 1.
    """
    if trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            "trainer.accumulate_grad_batches would accumulate over rollouts. To bound memory set "
            "model.updates.micro_batch_tokens: it splits a minibatch without changing the result."
        )
