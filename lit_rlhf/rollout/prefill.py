"""Reading the prompts before the first token is drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.cache import new_cache, read_on


def read_prompts(policy: Any, cache: Any, ids: Tensor, mask: Tensor, most_tokens: int) -> tuple[Tensor, bool]:
    """Read each distinct prompt once, prompts of like length together; fan the result out to all rows.

    Args:
        policy: the model.
        cache: an empty one; gets B rows, whose last prompt token stands in column P − 1.
        ids: [B, P] the prompts, left-padded.
        mask: [B, P] bool, True = a real token.
        most_tokens: padded tokens a forward pass may read.

    Returns:
        (logits [B, V] after the prompts, whether any prompt is padded).
    """
    rows_in_all, width = ids.shape
    distinct, which = torch.unique(ids.masked_fill(~mask, -1), dim=0, return_inverse=True)
    lengths = (distinct >= 0).sum(dim=1)
    order = lengths.argsort(stable=True)
    logits, done = None, 0
    sorted_lengths = lengths[order].tolist()
    while done < len(order):
        count = 1
        while done + count < len(order) and (count + 1) * sorted_lengths[done + count] <= most_tokens:
            count += 1
        chosen, longest = order[done : done + count], sorted_lengths[done + count - 1]
        read = distinct[chosen][:, width - longest :]
        real = read >= 0
        part = new_cache(policy, longest)
        all_real = sorted_lengths[done] == longest
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        last = read_on(policy, part, read.clamp(min=0), None if all_real else real, positions)
        place = torch.full_like(order, -1)
        place[chosen] = torch.arange(count, device=order.device)
        rows = (place[which] >= 0).nonzero().squeeze(1)
        of = place[which[rows]]
        logits = last.new_empty(rows_in_all, last.shape[1]) if logits is None else logits
        logits[rows] = last[of]
        cache.fan_in(part, rows, of, width, rows_in_all)
        done += count
    assert logits is not None
    return logits, sorted_lengths[0] < width
