"""One base, many roles: which of a model's adapters takes part in a pass.

Only switches in the adapted layers are turned. peft's own ``set_adapter`` and ``disable_adapter`` also change
``requires_grad``, which drops gradients in silence and lets processes drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

POLICY = "default"  # the adapters that a stage trains, saves and merges; peft's own name for a model's only ones
CRITIC = "critic"  # those of a critic on the policy's base
_OF = re.compile(r"(\.lora_[^.]+)\.([^.]+)")
# Walking through a large model takes milliseconds, and roles change at every pass. Only another adapter adds layers.
_LAYERS: WeakKeyDictionary[nn.Module, tuple[int, dict[str, Any]]] = WeakKeyDictionary()


def adapter_of(name: str) -> str | None:
    """Which adapter a weight belongs to, by its name in the model; None = none, it is the model's own."""
    found = _OF.search(name)
    return found[2] if found else None


def name_in_files(name: str) -> str:
    """Name of an adapter's weight without that of the adapter, as peft writes it."""
    return _OF.sub(r"\1", name)


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """Layers that carry adapters, by name.

    Args:
        model: a network.
        adapter: only those that carry this one.
    """
    if not hasattr(model, "peft_config"):  # spares the import of peft where no adapters are
        return {}
    names: Any = model.peft_config
    count, layers = _LAYERS.get(model, (0, {}))
    if count != len(names):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        _LAYERS[model] = len(names), layers
    return {name: layer for name, layer in layers.items() if adapter is None or adapter in layer.scaling}


def has_adapters(model: nn.Module) -> bool:
    """Say whether a model carries adapters."""
    return bool(adapted_layers(model))


def weights_of(model: nn.Module, adapter: str = POLICY) -> dict[str, nn.Parameter]:
    """The trainable weights of a role, by name.

    Args:
        model: a network.
        adapter: whose; to the policy belongs all that is no other adapter's, to a network without adapters everything.
    """
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and (adapter_of(name) or POLICY) == adapter
    }


@contextmanager
def role(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run the model with one of its adapters alone, or without any: then its outputs are bitwise the base model's.

    Args:
        model: a network with adapters.
        adapter: its name; None = the base.

    Raises:
        ValueError: the model has no adapters, or none of that name.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("this model has no adapters to switch off; its reference must be a frozen copy")
    names: Any = model.peft_config
    if adapter is not None and adapter not in names:
        raise ValueError(f"this model has no adapter {adapter!r}, only {', '.join(map(repr, names))}")
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers.values()]
    for layer, active, _ in before:
        turn(layer, active if adapter is None else [adapter], off=adapter is None)
    try:
        yield
    finally:
        for switch in before:
            turn(*switch)


def turn(layer: Any, active: Any, off: bool) -> None:
    """Turn the switches of an adapted layer: the names of the adapters that count, and whether none does."""
    layer._active_adapter, layer._disable_adapters = active, off


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Run the model as it was before its adapters.

    Raises:
        ValueError: the model has no adapters, so there is no base to go back to.
    """
    return role(model, None)


def adapters_in_use(model: nn.Module) -> list[bool]:
    """Say of each adapted layer whether its adapter takes part."""
    return [not layer._disable_adapters for layer in adapted_layers(model).values()]


def same_role_again(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Have what checkpointing recomputes in the backward pass run in the role that it first ran in.

    By then the switches may stand elsewhere. To be given to ``torch.utils.checkpoint`` as its ``context_fn``.

    Returns:
        What the first pass and what its repetition run in.
    """
    layer = next(iter(adapted_layers(model).values()), None)
    if layer is None:
        return nullcontext(), nullcontext()
    active = layer._active_adapter
    name = active if isinstance(active, str) else active[0]
    return nullcontext(), role(model, None if layer._disable_adapters else name)


def same_place(place: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Give ``place`` if it can hold ``like`` in ``dtype``, else new memory that can."""
    if place is not None and (place.shape, place.device, place.dtype) == (like.shape, like.device, dtype):
        return place
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


@contextmanager
def merged(model: nn.Module, kept: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Run a model with the policy's adapters added to the weights: one product a layer instead of three.

    The weights come back bit for bit, since they are put aside and not computed back. Adapters on sharded weights, or
    on weights in half precision (which would round the adapters' part away), are left as they are.

    Args:
        model: the model, in the policy's role.
        kept: where the sums stand, by layer; given again, they are written to the same places.
    """
    before = []
    for name, layer in adapted_layers(model, POLICY).items():
        weight = layer.base_layer.weight
        is_whole = not hasattr(weight, "full_tensor")
        if weight.dtype == torch.float32 and is_whole and not layer._disable_adapters:
            before.append((name, layer, weight.data))
    try:
        with torch.no_grad():
            for name, layer, weight in before:
                place = same_place((kept or {}).get(name), weight, weight.dtype)
                if kept is not None:
                    kept[name] = place
                layer.base_layer.weight.data = torch.add(weight, layer.get_delta_weight(POLICY), out=place)
                layer._disable_adapters = True
        yield
    finally:
        for _, layer, weight in before:
            layer.base_layer.weight.data = weight
            layer._disable_adapters = False
