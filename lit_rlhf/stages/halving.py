"""Smaller microbatches where memory ran out in an update: the optimizer step is made again, and comes out the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.models import is_sharded
from lit_rlhf.stages.memory import is_out_of_memory, microbatch_sizes

if TYPE_CHECKING:
    from lit_rlhf.stages.inner_loop import InnerLoop


class Halving:
    """Makes an optimizer step again, in microbatches of half as many tokens, when one was too large for the memory.

    The loss of a microbatch is divided by what its whole step holds, so the cut changes nothing but rounding (and what
    dropout draws). All processes halve together: none averages its gradients before all have come to the end of their
    microbatches, and one number says whether they have. Weights that no pass gathers are the condition: a process that
    fails between two collectives leaves the others waiting in the second.

    Args:
        stage: gains the buffer ``micro_batch_limit``, the bound that was found (0 = none yet), which goes with
            checkpoints.
    """

    def __init__(self, stage: InnerLoop) -> None:
        self.stage, self.wanted = stage, stage.updates.settings.halve_on_oom
        none = torch.zeros((), dtype=torch.long)
        stage.register_buffer("micro_batch_limit", none)
        # Checkpoints written before there was one.
        stage.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: _fill_in(state, prefix, none))

    def begin(self) -> None:
        """Go on with the bound that was found before.

        Raises:
            MisconfigurationException: the strategy shards the weights.
        """
        if not self.wanted:
            return
        strategy = self.stage.trainer.strategy
        if is_sharded(self.stage.policy) or not (
            self.stage.trainer.world_size == 1 or isinstance(strategy.model, DistributedDataParallel)
        ):
            raise MisconfigurationException(
                f"updates.halve_on_oom works on one process and under ddp: under {type(strategy).__name__} every pass "
                "gathers weights, and a process that fails in one leaves the others waiting. Set a lower "
                "model.updates.micro_batch_tokens instead."
            )
        if limit := int(self.stage.get_buffer("micro_batch_limit")):
            self.stage.updates.bound(limit)

    def around(self, accumulate: Callable[[], Any]) -> Callable[[], Any]:
        """What an optimizer step calls for its gradients.

        Args:
            accumulate: forward and backward of all its microbatches, once; it gives the loss of the last.

        Raises:
            RuntimeError: PyTorch's own, when every microbatch is a single row.
        """
        return functools.partial(self._step, accumulate) if self.wanted else accumulate

    def _step(self, accumulate: Callable[[], Any]) -> Any:
        while True:
            loss, error = self._attempt(accumulate)
            failed = torch.tensor(float(error is not None), device=self.stage.device)
            if not self.stage.max_over_ranks(failed):
                self._average_gradients()
                return loss
            self._halve(error)
            del error  # with it goes what its frames hold: the activations

    def _attempt(self, accumulate: Callable[[], Any]) -> tuple[Any, RuntimeError | None]:
        try:
            return accumulate(), None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None, error

    def _halve(self, error: RuntimeError | None) -> None:
        """Forget the attempt; cut this step and those after it anew."""
        stage, plan = self.stage, self.stage.updates
        sizes = microbatch_sizes(stage) if error is not None else ", on another process"
        largest = int(stage.max_over_ranks(torch.tensor(plan.largest, device=stage.device)))
        if not largest:
            raise error or torch.OutOfMemoryError("another process ran out of memory with a single row")
        before, lower = plan.most_tokens, max(min(plan.most_tokens or largest, largest) // 2, 1)
        if error is not None:
            error.__traceback__ = error.__context__ = None
        stage.trainer.optimizers[0].zero_grad(set_to_none=True)  # for their memory; the next pass zeroes anyway
        stage.watch.losses = []
        plan.recut(lower, stage.max_over_ranks)
        stage.get_buffer("micro_batch_limit").fill_(lower)
        if stage.device.type == "cuda":
            torch.cuda.empty_cache()
        rank_zero_warn(
            f"out of memory in the update{sizes}. The optimizer step is made again with model.updates."
            f"micro_batch_tokens {lower} in place of {before}, which stays so; set it in the config to spare the next "
            "run the attempt"
        )

    def _average_gradients(self) -> None:
        """What DistributedDataParallel does in the last backward pass, which here it was told to leave."""
        wrapped = self.stage.trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel):
            return
        gradients = [p.grad for p in self.stage.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, float(self.stage.trainer.world_size))
        works = [torch.distributed.all_reduce(one, group=wrapped.process_group, async_op=True) for one in gradients]
        for work in works:
            work.wait()


def _fill_in(state: dict[str, Tensor], prefix: str, none: Tensor) -> None:
    state.setdefault(f"{prefix}micro_batch_limit", torch.zeros_like(none))
