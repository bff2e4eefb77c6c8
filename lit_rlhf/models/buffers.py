"""Keys and values of a decoder in buffers that are allocated once.

Importing this file imports transformers, which takes seconds: ``cache.py`` does so when a first cache is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """One layer's keys and values [B, heads, columns, head size], of which the first ``used`` columns count.

    A sliding-window layer keeps all columns too: the mask leaves out what is beyond the window.
    """

    def __init__(self, columns: int, is_sliding: bool) -> None:
        super().__init__()
        self.columns, self.is_sliding, self.used = columns, is_sliding, 0
        self.key_buffer: Tensor
        self.value_buffer: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers; shapes and dtype are those of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = (
            states.new_empty(*states.shape[:2], self.columns, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of further tokens [B, heads, L, head size]; give those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        self.key_buffer[:, :, start : self.used] = key_states
        self.value_buffer[:, :, start : self.used] = value_states
        self.keys, self.values = self.key_buffer[:, :, : self.used], self.value_buffer[:, :, : self.used]
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        """Columns in use."""
        return self.used

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns that a mask for ``query_length`` further tokens covers, and the first of them."""
        query = query_length if isinstance(query_length, int) else query_length.shape[0]  # older releases: positions
        return self.used + query, 0

    def place(self, other: Any, rows: Tensor, of: Tensor, used: int) -> None:
        """Write ``other``'s rows ``of`` [N] into rows ``rows`` [N], their last column at ``used`` − 1."""
        start = used - other.used
        for buffer, states in ((self.key_buffer, other.keys), (self.value_buffer, other.values)):
            buffer[rows, :, start:used] = states[of]
            if start:  # under the mask it is multiplied by 0, and 0 times the NaN of fresh memory is NaN
                buffer[rows, :, :start] = 0
        self.used = used

    def shrink(self, count: int, holes: Tensor, movers: Tensor) -> None:
        """Keep the first ``count`` rows, after ``movers`` have taken the places of ``holes``."""
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[holes, :, : self.used] = buffer[movers, :, : self.used]
        self.key_buffer, self.value_buffer = self.key_buffer[:count], self.value_buffer[:count]


class BufferedCache(Cache):
    """Layers of one model, whose rows are handled together."""

    def fan_in(self, other: Any, rows: Tensor, of: Tensor, used: int, total: int) -> None:
        """Take rows of a cache that has read some prompts.

        Args:
            other: a cache of the same model.
            rows: [N] where they go.
            of: [N] which of the other's rows.
            used: columns in use afterwards; shorter prompts end there too.
            total: rows of this cache.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(
                    *(states[:1].expand(total, -1, -1, -1) for states in (theirs.keys, theirs.values))
                )
            mine.place(theirs, rows, of, used)

    def drop_rows(self, gone: Tensor) -> Tensor:
        """Drop the rows where ``gone`` [B] is True; rows from the end take their places, the others stay put.

        Returns:
            [N] which row stands at each place afterwards.
        """
        stay = (~gone).nonzero().squeeze(1)
        count = len(stay)
        holes, movers = gone[:count].nonzero().squeeze(1), stay[stay >= count]
        for layer in self.layers:
            layer.shrink(count, holes, movers)
        now = torch.arange(count, device=gone.device)
        now[holes] = movers
        return now


class FixedLayer(BufferedLayer):
    """A layer that writes one token a row at the column ``at`` [1] names, and always gives all its columns.

    What is not written yet is 0; the mask leaves it out.
    """

    def __init__(self, columns: int, is_sliding: bool, at: Tensor) -> None:
        super().__init__(columns, is_sliding)
        self.at = at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, whose places in memory stay."""
        super().lazy_initialization(key_states, value_states)
        self.all_rows = self.key_buffer.zero_(), self.value_buffer.zero_()

    def restart(self, rows: int) -> None:
        """Forget everything and hold the first ``rows`` rows."""
        if self.is_initialized:
            self.key_buffer, self.value_buffer = (buffer[:rows].zero_() for buffer in self.all_rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of one token a row [B, heads, 1, head size]; give those of all columns."""
        for buffer, states in ((self.key_buffer, key_states), (self.value_buffer, value_states)):
            buffer.index_copy_(2, self.at, states.to(buffer.dtype))
        return self.key_buffer, self.value_buffer

    def shrink(self, count: int, holes: Tensor, movers: Tensor) -> None:
        """Keep the first ``count`` rows; how many columns are in use, only ``at`` knows."""
        self.used = self.columns
        super().shrink(count, holes, movers)


class FixedCache(BufferedCache):
    """Layers of fixed shape, used for one batch after another."""

    def restart(self, rows: int) -> None:
        """Forget everything and hold the first ``rows`` rows."""
        for layer in self.layers:
            layer.restart(rows)
