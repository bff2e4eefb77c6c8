"""Settings that would quietly train something else, refused with what to use instead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards import MissingEOS
from lit_rlhf.stages.settings import KL, Advantages

if TYPE_CHECKING:
    from lit_rlhf.stages.inner_loop import InnerLoop


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


def refuse_unseen(advantages: Advantages, kl: KL, missing_eos: MissingEOS | None) -> None:
    """Refuse what changes the sum of the rewards where each is compared by itself and the sum is never read.

    Raises:
        ValueError: ``advantages.mix`` is "normalize_then_sum" beside a KL in the score or a ``missing_eos``.
    """
    if advantages.mix != "normalize_then_sum":
        return
    for knob, given in (("kl.place='score'", kl.needs_reference and kl.place == "score"), ("missing_eos", missing_eos)):
        if given:
            raise ValueError(
                f"advantages.mix='normalize_then_sum' compares each reward by itself and would never see {knob}: put "
                "the KL into the reward or the loss, and the price of being cut off into a reward of its own."
            )


def refuse_steps(rollout: Rollout) -> None:
    """Refuse rewards that judge steps where each reward is compared by itself: they would count twice.

    Raises:
        MisconfigurationException: a reward judged steps.
    """
    if rollout.step_scores is not None:
        raise MisconfigurationException(
            "advantages.mix='normalize_then_sum' compares whole responses, but a reward returned Steps: return "
            "numbers, or take advantages.mix='sum_then_normalize'."
        )


def warn_if_silent(stage: InnerLoop, counted: Tensor) -> None:
    """Say of a rollout without a single token that counts that no weight will move; asked of all processes together.

    Args:
        stage: whose rollout it is.
        counted: [B, T] bool, the tokens of this process that count.
    """
    if not stage.max_over_ranks(counted.any().float()):
        rank_zero_warn(
            f"rollout {stage.global_step}: no token of its {len(counted)} responses a process counts (all were cut "
            "off by sampling.max_new_tokens, or are empty), so no weight moves"
        )
