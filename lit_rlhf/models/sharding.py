"""A model spread over processes with FSDP2 (``fully_shard``), each network as a root of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _shards(model: nn.Module) -> list[Any]:
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard(model: Any, mesh: Any, *, low_precision: torch.dtype | None = None) -> Any:
    """Shard a transformers model, or a single layer, in place: each decoder layer, then the rest.

    Args:
        model: the model; its adapters, if any, must be in already.
        mesh: a one-dimensional ``DeviceMesh`` (Lightning's ``self.device_mesh["data_parallel"]``), or None to leave
            the model whole.
        low_precision: number format in which weights are gathered and computed with; gradients are averaged, and each
            process keeps its part, in the weights' own. None = their own throughout.

    Returns:
        The model.
    """
    if mesh is None or _shards(model):
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = torch.float32 if low_precision is not None else None
    policy = MixedPrecisionPolicy(param_dtype=low_precision, reduce_dtype=kept)
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (then every process must call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_rows(tensor: Any) -> tuple[Tensor, int]:
    """This process's part of a tensor that may be sharded, and the number of its first row in the whole."""
    if not hasattr(tensor, "full_tensor"):
        return tensor, 0
    mesh = tensor.device_mesh
    rows_each = -(-tensor.shape[0] // mesh.size())  # fully_shard cuts as torch.chunk does
    return tensor.to_local(), min(mesh.get_local_rank() * rows_each, tensor.shape[0])


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor that every process has whole as another is sharded; itself where that one is not."""
    if not hasattr(like, "full_tensor"):
        return value
    own, first = own_rows(like)
    rows = value[first : first + len(own)].to(own.device, copy=True)  # a view would keep the whole
    return sharded_as(rows, like)


def sharded_as(rows: Tensor, like: Any) -> Tensor:
    """Make of each process's rows a tensor that is sharded as ``like`` is.

    Args:
        rows: this process's part.
        like: a sharded tensor of the same shape.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether processes gather the model's weights at each pass (FSDP, FSDP2, ZeRO-3) and so must make as many passes.

    Args:
        model: a network.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    in_zero_3 = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return in_zero_3 or any(isinstance(one, (FSDPModule, FullyShardedDataParallel)) for one in model.modules())


def most_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """The largest of each count over the processes, which all must call.

    Args:
        counts: as many everywhere.
        device: that the processes talk over.
    """
    found = torch.tensor(counts, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    most: list[int] = found.tolist()
    return most


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold a sharded model's weights whole, so that generation gathers them once instead of once a token.

    Inside, processes may run different numbers of forward passes. Does nothing to a model that is not sharded.
    """
    shards = _shards(model)
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not model, recurse=False)  # torch's own default
            module.reshard()


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without backward leaves gathered: the root's embedding and head."""
    for module in _shards(model):
        module.reshard()


def unsharded_trainables(module: nn.Module) -> list[str]:
    """Name the trainable parameters that stand outside every shard; no process would ever synchronise them."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "full_tensor")
    ]
