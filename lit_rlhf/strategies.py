"""The strategy ``fsdp2``: every network sharded over all processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.checkpoint_parts import Pieces, begin, discard, each, finish, map_any, write_own
from lit_rlhf.models.sharding import own_rows, sharded_as, whole

TIMEOUT = timedelta(minutes=30)


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all processes in the data-parallel group (Zhao et al. 2023, §3).

    Its checkpoints are those of one process: one file, which any strategy and any number of processes goes on from; or
    a folder in parts, with the same freedom. Both are checked when read and hold tensors and plain values only, where
    torch's own distributed format keeps a pickle beside the weights.

    Args:
        save_parts: each process writes what it holds, into a folder; else the first one puts everything together in a
            file, for which its memory must have room.
        process_group_backend: nccl on GPUs and gloo on CPUs if null.
        timeout: how long a process waits for the others in a collective.
    """

    def __init__(
        self, save_parts: bool = False, process_group_backend: str | None = None, timeout: timedelta = TIMEOUT
    ) -> None:
        super().__init__(1, 1, save_parts, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Put all processes into one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # -- saving ----------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The stage's state dict, tensors put together one at a time; only the first process keeps them."""
        assert self.lightning_module is not None
        return self._collected(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state dict, likewise; parameters are numbered, as in that of one process."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._collected(optimizer.state_dict())

    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return state

        def collect(value: Any, place: str) -> Any:
            if not isinstance(value, Tensor):
                return value
            found = whole(value)  # all processes take part
            return found.cpu() if self.is_global_zero else torch.empty(0)

        found: dict[str, Any] = each(state, collect)
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint; in parts, it gets its name when every process has written its own.

        Raises:
            OSError: it could not be written; where a `Checkpoint` saves, it says so and training goes on.
            MisconfigurationException: parts are to go to an object store.
        """
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        if "://" in str(filepath):
            raise MisconfigurationException(f"{filepath}: parts go to a folder on a disk; set save_parts: false")
        folder, rest = Path(self.broadcast(filepath)), []
        steps = (
            lambda: begin(folder) if self.is_global_zero else None,
            lambda: rest.append(write_own(checkpoint, folder, self.global_rank, self.world_size)),
            lambda: finish(rest[0], folder, self.world_size) if self.is_global_zero else None,
        )
        failed = next((error for step in steps if (error := self._first_failure(step)) is not None), None)
        if failed is None:
            return
        if self.is_global_zero:
            discard(folder)  # a full disk needs the room
        report = getattr(self.checkpoint_io, "report", None)
        if report is None:
            raise failed
        report(folder, failed)

    def _first_failure(self, work: Callable[[], Any]) -> OSError | None:
        """Do a piece of work; the first error of any process, so that all stop together."""
        failure = None
        try:
            work()
        except OSError as error:
            failure = error.errno, error.strerror or str(error)
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, failure)
        for rank, found in enumerate(everyone):
            if found is not None:
                return OSError(found[0], f"{found[1]} (process {rank})")
        return None

    # -- loading ---------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's state over, as with one process."""
        return True

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Map a checkpoint into memory; each process then takes the rows that it holds."""
        path = self.broadcast(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path) if "://" in str(path) else map_any(path)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Put the weights into the stage."""
        assert self.lightning_module is not None
        here = self.lightning_module.state_dict()
        found = {name: _cut(value, here.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(found, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Put the optimizers' states back."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            slots = {
                number: {key: _cut(value, weights[int(number)]) for key, value in own.items()}
                for number, own in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": slots})


def _cut(value: Any, like: Any) -> Any:
    """This process's rows of a whole tensor, or of one in pieces, where ``like`` is sharded and of its shape."""
    if not hasattr(like, "full_tensor") or getattr(value, "shape", None) != like.shape:
        # No part of the mapped file is kept: it would hold its place on the disk when the checkpoint is removed.
        return value[:] if isinstance(value, Pieces) else value.clone() if isinstance(value, Tensor) else value
    own, first = own_rows(like)
    return sharded_as(value[first : first + len(own)].to(own.device, own.dtype, copy=True), like)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="every network sharded over all processes (FSDP2)")
