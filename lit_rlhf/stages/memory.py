"""Running out of memory, said in terms of what was being read and of the knobs that lower it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

if TYPE_CHECKING:
    from lit_rlhf.stages.inner_loop import InnerLoop

StepT = TypeVar("StepT", bound=Callable[..., Tensor])

_NETWORK = "model.network.gradient_checkpointing, model.network.lora, trainer.precision=bf16-mixed"
_KNOBS = {
    "rollout": "sampler.cache_gb (samples in parts), data.batch_size, sampling.max_new_tokens",
    "score": "model.updates.micro_batch_tokens (a scoring pass reads four times as many tokens), the batch_size of a "
    "RewardModel, model.frozen_dtype=bfloat16",
    "update": "model.updates.micro_batch_tokens (which changes no result; model.updates.halve_on_oom lowers it by "
    f"itself), {_NETWORK}, model.frozen_dtype=bfloat16",
    "batch": f"data.batch_size (with trainer.accumulate_grad_batches for the same step), {_NETWORK}",
}


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out; the message says at what, and which knobs lower it."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch's own error, not yet one of ours, says that an allocation failed.

    Args:
        error: as it was raised.
    """
    if isinstance(error, OutOfMemory):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def explained(phase: str, sizes: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say of an allocation that fails inside what was being read, and what to lower.

    Args:
        phase: "rollout", "score", "update", or "batch" where a step reads whole batches.
        sizes: what was being read; asked only if it fails.

    Raises:
        OutOfMemory: in place of PyTorch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise OutOfMemory(f"out of memory in the {phase}{sizes()}. To lower it: {_KNOBS[phase]}. {first}") from error


def microbatch_sizes(stage: InnerLoop) -> str:
    """What the last microbatch of the current update holds."""
    plan = stage.updates
    if plan.rollout is None or not plan.passes:
        return ""
    rows = plan.steps[plan.step][(plan.passes - 1) // plan.turns].to(plan.rollout.mask.device)
    lengths = (plan.rollout.prompt_mask.sum(dim=1) + plan.rollout.lengths)[rows]
    return _sizes(stage.policy, len(rows), int(lengths.max()), int(lengths.sum()))


def _sizes(network: Any, rows: int, longest: int, tokens: int) -> str:
    vocabulary = network.config.get_text_config().vocab_size
    logits = f"{rows * longest * vocabulary * 4 / 1e9:.3g} GB if all its logits stood in float32"
    return f": {rows} rows × {longest} tokens ({tokens} without padding), vocabulary {vocabulary}, {logits}"


def explains_memory(network: str) -> Callable[[StepT], StepT]:
    """Wrap a ``training_step`` over batches that have ``mask`` [B, L]; beside it stands ``backward``.

    Args:
        network: the stage's attribute that reads the batch.
    """

    def wrap(step: StepT) -> StepT:
        @functools.wraps(step)
        def wrapped(stage: Any, batch: Any, batch_idx: int) -> Tensor:
            stage.batch_sizes = functools.partial(_batch_sizes, getattr(stage, network), batch.mask)
            with explained("batch", stage.batch_sizes):
                return step(stage, batch, batch_idx)

        return wrapped  # type: ignore[return-value]

    return wrap


def explained_backward(stage: Any, loss: Tensor, *arguments: Any, **settings: Any) -> None:
    """The backward pass of the batch; a stage takes it as its ``backward``."""
    with explained("batch", stage.batch_sizes):
        LightningModule.backward(stage, loss, *arguments, **settings)


def _batch_sizes(network: Any, mask: Tensor) -> str:
    return _sizes(network, mask.shape[0], mask.shape[1], int(mask.sum()))
