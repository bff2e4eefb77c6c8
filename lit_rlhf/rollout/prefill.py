"""Reading the prompts before the first token is drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.cache import new_cache, read_on
from lit_rlhf.models.lengths import cut_by_length, pass_tokens


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
    lengths = (distinct >= 0).sum(dim=1).cpu()
    logits = None
    for chosen in cut_by_length(lengths, most_tokens=most_tokens, overhead=pass_tokens(ids.device)):
        shortest, longest = int(lengths[chosen].min()), int(lengths[chosen].max())
        read = distinct[chosen.to(ids.device)][:, width - longest :]
        real = read >= 0
        part = new_cache(policy, longest)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        last = read_on(policy, part, read.clamp(min=0), None if shortest == longest else real, positions)
        place = torch.full((len(distinct),), -1, device=ids.device)
        place[chosen.to(ids.device)] = torch.arange(len(chosen), device=ids.device)
        rows = (place[which] >= 0).nonzero().squeeze(1)
        of = place[which[rows]]
        logits = last.new_empty(rows_in_all, last.shape[1]) if logits is None else logits
        logits[rows] = last[of]
        cache.fan_in(part, rows, of, width, rows_in_all)
    assert logits is not None
    return logits, int(lengths.min()) < width
