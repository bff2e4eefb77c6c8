"""Read rows of similar length together, so that little of what is read is padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.batch import Pairs
from lit_rlhf.models import can_share, is_sharded, most_over_ranks, sequence_scores
from lit_rlhf.models.heads import shared_scores
from lit_rlhf.models.lengths import cut_by_length, padded_tokens, pass_tokens
from lit_rlhf.models.prefix import groups_of_rows, shared_beginnings

_ReadT = TypeVar("_ReadT", Tensor, tuple[Tensor, Tensor])


def read_in_parts(reader: Callable[..., _ReadT], model: Any, ids: Tensor, mask: Tensor, *more: Tensor) -> _ReadT:
    """Read a batch in parts of similar length, each without the columns that only longer rows use.

    What comes out is what ``reader(model, ids, mask, *more)`` gives of the whole batch, and its gradients too.

    Args:
        reader: gives for rows [n, L] one tensor or two, [n] or [n, L - d]; what stands in padding does not matter to
            it, and it gives 0 there.
        model: what it reads with. Where its weights are sharded, all processes must call together.
        ids: [B, L], padded on the right.
        mask: [B, L] bool, True = a real token.
        more: other tensors [B, L] that the reader takes.

    Returns:
        The reader's tensors, [B] or [B, L - d].
    """
    lengths = mask.sum(dim=1).tolist()
    parts = cut_by_length(lengths, overhead=pass_tokens(mask.device))
    if is_sharded(model):
        parts = _as_many_on_all_ranks(parts, lengths, mask.device)
    columns, outputs = ids.shape[1], []
    for rows in parts:
        width = max(1, *(lengths[row] for row in rows.tolist()))  # no model reads rows without columns
        chosen = slice(None) if len(parts) == 1 else rows.to(mask.device, non_blocking=True)
        output = reader(model, *(tensor[chosen, :width] for tensor in (ids, mask, *more)))
        tensors = output if isinstance(output, tuple) else (output,)
        outputs.append([F.pad(one, (0, columns - width)) if one.dim() > 1 else one for one in tensors])
    back = torch.cat(parts).argsort().to(mask.device, non_blocking=True)
    whole = [torch.cat(one)[back] if len(parts) > 1 else one[0] for one in zip(*outputs, strict=True)]
    return (whole[0], whole[1]) if isinstance(output, tuple) else whole[0]


def read_ranked(model: Any, pairs: Pairs) -> Tensor:
    """Score each response, [N]; what the responses to a prompt begin with is read once where that is cheaper.

    Args:
        model: from `load_scalar`.
        pairs: responses, padded on the right, and the comparisons that say which answer the same prompt.
    """
    lengths = pairs.mask.sum(dim=1).cpu()
    if can_share(model):
        shared = shared_beginnings(pairs.ids, pairs.mask, groups_of_rows(pairs))
        whole = cut_by_length(lengths, overhead=shared.overhead)
        if shared.cost < padded_tokens(whole, lengths) + shared.overhead * len(whole):
            return shared_scores(model, shared)
    return read_in_parts(sequence_scores, model, pairs.ids, pairs.mask)


def _as_many_on_all_ranks(parts: list[Tensor], lengths: list[int], device: torch.device) -> list[Tensor]:
    """Cut once more: as many parts as any rank wants, or as the rank with the fewest rows can make."""
    most, less_fewest_rows = most_over_ranks([len(parts), -len(lengths)], device)
    never_more = len(lengths) * max(lengths) + 1  # more than a part can save
    return cut_by_length(lengths, overhead=never_more, at_least=min(most, -less_fewest_rows))
