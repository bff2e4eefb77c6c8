"""Keys and values of beginnings that several rows share, fanned out to the rows with their gradient.

Importing this file imports transformers, which takes seconds: ``prefix.py`` does so when a beginning is first shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

States = tuple[Tensor, Tensor]  # keys and values [B, heads, columns, head size]


class JoiningLayer(DynamicLayer):
    """One layer's keys and values: those of the columns before, if any, and of the tokens that are read.

    A sliding-window layer keeps all columns too: the mask leaves out what is beyond the window.
    """

    def __init__(self, is_sliding: bool, before: States | None = None) -> None:
        super().__init__()
        self.is_sliding, self.before = is_sliding, before
        self.columns = 0 if before is None else before[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> States:
        """Take the states of the tokens that are read, once; give those of all columns."""
        if self.before is not None:
            key_states = torch.cat([self.before[0], key_states], dim=2)
            value_states = torch.cat([self.before[1], value_states], dim=2)
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self.dtype, self.device, self.columns = key_states.dtype, key_states.device, key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        """Columns so far."""
        return self.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns that a mask for ``query_length`` further tokens covers, and the first of them."""
        query = query_length if isinstance(query_length, int) else query_length.shape[0]  # older releases: positions
        return self.columns + query, 0


def empty_cache(sliding: list[bool]) -> Cache:
    """A cache that keeps what one forward pass reads."""
    return Cache(layers=[JoiningLayer(is_sliding) for is_sliding in sliding])


class Fan:
    """States of D beginnings in all layers, the last token of each in the last column.

    Args:
        caches: of the passes that read them, rows from the left edge.
        place: [D, W] long, which of all the passes' columns, row by row and pass by pass, stands at each place; None =
            there was one pass, whose rows stand as they should.
    """

    def __init__(self, caches: list[Any], place: Tensor | None) -> None:
        self.sliding = [layer.is_sliding for layer in caches[0].layers]
        self.states: list[States] = []
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
            self.states.append((_align(keys, place), _align(values, place)))

    def out(self, of: Tensor, columns: int) -> Cache:
        """A cache of rows that begin with the beginnings ``of`` [B], of which the last ``columns`` columns are kept."""
        layers = []
        for is_sliding, (keys, values) in zip(self.sliding, self.states, strict=True):
            start = keys.shape[2] - columns
            before = (keys[:, :, start:].index_select(0, of), values[:, :, start:].index_select(0, of))
            layers.append(JoiningLayer(is_sliding, before))
        return Cache(layers=layers)


def _align(parts: list[Tensor], place: Tensor | None) -> Tensor:
    if place is None:
        return parts[0]
    flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return flat.index_select(0, place.flatten()).unflatten(0, place.shape).transpose(1, 2)
