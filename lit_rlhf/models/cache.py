"""Read prompts and further tokens into a cache whose rows can be fanned out and dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.masks import accepted, masks_for, why_no_masks


def new_cache(model: Any, columns: int) -> Any | None:
    """Give an empty cache for ``columns`` tokens a row, written in place instead of grown by concatenation.

    Args:
        model: a transformers decoder.
        columns: longest sequence, prompt and response together.

    Returns:
        A transformers cache with `fan_in` and `drop_rows`; None where the model keeps other state than keys and values
        (state space, linear attention), which cannot be held so.
    """
    from lit_rlhf.models.buffers import BufferedCache, BufferedLayer

    sliding = sliding_layers(model)
    if sliding is None:
        return None
    return BufferedCache(layers=[BufferedLayer(columns, is_sliding) for is_sliding in sliding])


def sliding_layers(model: Any) -> list[bool] | None:
    """Say of each layer of a decoder's cache whether it attends to a window only.

    Returns:
        None where the model keeps other state than keys and values, or is no decoder.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return None
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    if not kinds or not set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return [kind is DynamicSlidingWindowLayer for kind in kinds]


def cache_bytes(model: Any) -> int:
    """Bytes that one token of one row takes in the cache, over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else model.dtype
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def read_on(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Read further tokens of rows whose earlier ones stand in the cache; give the logits after the last one, [B, V].

    Args:
        model: the decoder.
        cache: its cache; gains the new tokens.
        ids: [B, L] the new tokens.
        mask: [B, columns used + L] bool, True = a real token; None = all are.
        positions: [B, L] position of each new token among the row's real ones.
    """
    ready: Any = None if mask is None else mask.long()
    if mask is not None and ids.shape[1] == 1 and why_no_masks(model) is None:  # spares a wait for the device a step
        ready = masks_for(model, mask, mask.shape[1] - 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": ready,
        "past_key_values": cache,
        "use_cache": True,
    }
    takes = accepted(model.__class__)
    if "position_ids" in takes:  # some (ALiBi) know no positions
        inputs["position_ids"] = positions
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    return model(**inputs).logits[:, -1]
