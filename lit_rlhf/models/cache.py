"""Keys and values of a decoder in buffers that are allocated once, whose rows can be fanned out and dropped."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor


def new_cache(model: Any, columns: int) -> Any | None:
    """Give an empty cache for ``columns`` tokens a row, written in place instead of grown by concatenation.

    Args:
        model: a transformers decoder.
        columns: longest sequence, prompt and response together.

    Returns:
        A transformers cache with `fan_in` and `drop_rows`; None where the model keeps other state than keys and values
        (state space, linear attention), which cannot be held so.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return None
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    if not kinds or not set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    cache_type, layer_type = _types()
    return cache_type(layers=[layer_type(columns, kind is DynamicSlidingWindowLayer) for kind in kinds])


_TYPES: list[Any] = []


def _types() -> tuple[Any, Any]:
    """The two classes; made when first needed, since importing transformers takes seconds."""
    if _TYPES:
        return _TYPES[0], _TYPES[1]
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
            self.dtype, self.device = key_states.dtype, key_states.device
            self.key_buffer, self.value_buffer = (
                states.new_empty(*states.shape[:2], self.columns, states.shape[3])
                for states in (key_states, value_states)
            )
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start, self.used = self.used, self.used + key_states.shape[2]
            self.key_buffer[:, :, start : self.used] = key_states
            self.value_buffer[:, :, start : self.used] = value_states
            self.keys, self.values = self.key_buffer[:, :, : self.used], self.value_buffer[:, :, : self.used]
            return self.keys, self.values

        def get_seq_length(self, *args: Any) -> int:
            return self.used

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            query = query_length if isinstance(query_length, int) else query_length.shape[0]
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

    _TYPES.extend((BufferedCache, BufferedLayer))
    return BufferedCache, BufferedLayer


def cache_bytes(model: Any) -> int:
    """Bytes that one token of one row takes in the cache, over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else model.dtype
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


@functools.cache
def _accepted(model_type: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_type.forward).parameters)


def read_on(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Read further tokens of rows whose earlier ones stand in the cache; give the logits after the last one, [B, V].

    Args:
        model: the decoder.
        cache: its cache; gains the new tokens.
        ids: [B, L] the new tokens.
        mask: [B, columns used + L] bool, True = a real token; None = all are.
        positions: [B, L] position of each new token among the row's real ones.
    """
    inputs = {
        "input_ids": ids,
        "attention_mask": None if mask is None else mask.long(),
        "past_key_values": cache,
        "use_cache": True,
    }
    accepted = _accepted(model.__class__)
    if "position_ids" in accepted:  # some (ALiBi) know no positions
        inputs["position_ids"] = positions
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return model(**inputs).logits[:, -1]
