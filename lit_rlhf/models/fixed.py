"""A decode step of fixed shape: one token a row, written at the column that a tensor names.

Nothing in such a step depends on a number that Python sees, so that a CUDA graph of it can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_rlhf.models.cache import new_cache, read_on
from lit_rlhf.models.masks import accepted, masks_for, why_no_masks
from lit_rlhf.models.switches import adapters_in_use, same_place

_PROBED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_not_fixed(model: Any) -> str | None:
    """Say why a model cannot decode with fixed shapes; None = it can. Tried on four tokens, once a model."""
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return "its weights are sharded"
    reason = why_no_masks(model)
    if reason is None and model not in _PROBED:
        _PROBED[model] = _probe(model)
    return reason or _PROBED[model]


@torch.no_grad()
def _probe(model: Any) -> str | None:
    """Read a fourth token both ways: some models tell places by the number of columns, and say nothing."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids, positions = (torch.arange(4, device=model.device)[None] for _ in range(2))
    grown, at = new_cache(model, 4), torch.full((1,), 3, device=model.device)
    cache = fixed_cache(model, min(limit or 4096, 4096), at)
    read_on(model, grown, ids[:, :3], None, positions[:, :3])
    cache.fan_in(grown, at.new_zeros(1), at.new_zeros(1), 3, 1)
    expected = read_on(model, grown, ids[:, 3:], None, positions[:, 3:])
    seen = torch.arange(cache.layers[0].columns, device=model.device)[None] < 4
    found = read_at(model, cache, ids[:, 3:], seen, positions[:, 3:])
    is_near = (found - expected).abs().max() <= 0.1 * expected.std()  # even if rounded to bfloat16
    return None if bool(is_near) else "it reads a token otherwise where the cache has room for more"


def fixed_cache(model: Any, columns: int, at: Tensor) -> Any:
    """Give an empty cache of fixed shape.

    Args:
        model: a decoder of which `why_not_fixed` knows no reason.
        columns: longest sequence, prompt and response together.
        at: [1] long, the column where the next token is written; its owner moves it on.
    """
    from lit_rlhf.models.buffers import FixedCache, FixedLayer

    growing: Any = new_cache(model, columns)
    return FixedCache(layers=[FixedLayer(columns, layer.is_sliding, at) for layer in growing.layers])


def read_at(model: Any, cache: Any, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
    """Read one further token a row at the cache's column; give the logits after it, [B, V].

    Args:
        model: the decoder.
        cache: its `fixed_cache`.
        ids: [B, 1] the tokens.
        seen: [B, columns] bool, True = a real token, the new one included.
        positions: [B, 1] position of each new token among the row's real ones.
    """
    inputs = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model.__class__) else {}
    masks = masks_for(model, seen, cache.layers[0].at)
    output = model(
        input_ids=ids, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True, **inputs
    )
    return output.logits[:, -1]


@contextmanager
def cast_once(model: nn.Module, kept: dict[str, Tensor] | None) -> Iterator[None]:
    """Under autocast, hold the weights of linear layers in the dtype that every product would cast them to.

    A recorded step cannot use autocast's store of cast weights, and would cast all of them at every token. An embedding
    that is tied to the head stays as it is.

    Args:
        model: the model, which has its own weights back afterwards.
        kept: where the cast weights stand, by layer; given again, they are written to the same places. None = do
            nothing.
    """
    before, device = [], next(model.parameters()).device.type
    if kept is not None and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        for name, layer in model.named_modules():
            if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
                before.append((layer, layer.weight))
                kept[f"{name}.weight"] = place = same_place(kept.get(f"{name}.weight"), layer.weight, dtype)
                # Another parameter and not another ``data``: a change of dtype would cut hooks on gradients off.
                layer.weight = nn.Parameter(place.copy_(layer.weight.detach()), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in before:
            layer.weight = weight


def storage(model: nn.Module) -> tuple[int, ...]:
    """Where a model's weights and tables stand, and which adapters are in use: what a captured step was made for."""
    tensors = [*model.parameters(), *model.buffers()]
    return (*(tensor.data_ptr() for tensor in tensors), *map(int, adapters_in_use(model)))
