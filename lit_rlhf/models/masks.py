"""Attention masks of a decode step, made beforehand.

A mask of four dimensions is taken by transformers as it is; from one of two it would make its own, and to see whether
that is needed it looks at the values, which waits for the device.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

_KINDS = {"full_attention", "sliding_attention"}  # those whose masks are made here


@functools.cache
def accepted(model_type: Any) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model_type.forward).parameters)


def layer_kinds(config: Any) -> set[str]:
    """Give the kinds of attention among a decoder's layers, by transformers' names."""
    named = getattr(config, "layer_types", None)
    if named is None:
        is_chunked = getattr(config, "attention_chunk_size", None) is not None
        is_sliding = getattr(config, "sliding_window", None) is not None
        named = ["sliding_attention" if is_sliding else "chunked_attention" if is_chunked else "full_attention"]
    return set(named)


def why_no_masks(model: Any) -> str | None:
    """Say why masks cannot be made for a model beforehand; None = they can."""
    config = model.config.get_text_config()
    if not any(kind.__module__.startswith("transformers.models.") for kind in type(model).__mro__):
        return "its code is not transformers' own"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention ({config._attn_implementation}) makes masks of its own; sdpa takes ours"
    if "position_ids" not in accepted(model.__class__) or getattr(config, "alibi", False):
        return "it takes no positions and counts them from the mask"
    unknown = layer_kinds(config) - _KINDS
    return f"it has layers of another kind: {', '.join(sorted(unknown))}" if unknown else None


def masks_for(model: Any, seen: Tensor, column: Tensor | int) -> Tensor | dict[str, Tensor]:
    """Make the masks for one further token a row.

    Args:
        model: a decoder of which `why_no_masks` knows no reason.
        seen: [B, columns] bool, True = a real token, the new one included.
        column: of the new token; an int, or [1].

    Returns:
        [B, 1, 1, columns] as the model's attention wants it; by kind of layer where it has two.
    """
    config = model.config.get_text_config()
    masks = {}
    for kind in sorted(layer_kinds(config)):
        mask = seen
        if kind == "sliding_attention":
            mask = seen & (torch.arange(seen.shape[1], device=seen.device) > column - config.sliding_window)
        mask = mask[:, None, None]
        if config._attn_implementation == "eager":  # which adds it to the scores
            nothing = torch.zeros((), dtype=model.dtype, device=seen.device)
            mask = torch.where(mask, nothing, torch.finfo(model.dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else masks.popitem()[1]
