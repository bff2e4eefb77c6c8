"""Read once what several rows of a batch begin with: the prompt of a group's answers, the start of ranked responses.

The beginnings are read into a cache that carries gradients; their keys and values are fanned out to the rows, and the
rest of each row is read over them, rows of like length together, all in one graph. A causal model cannot tell the
difference: what comes out is what reading every row whole gives, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Pairs, Rollout
from lit_rlhf.models.cache import sliding_layers
from lit_rlhf.models.lengths import cut_by_length, padded_tokens, pass_tokens
from lit_rlhf.models.network import to_left_edge

# What a row pays for a token of its beginning that it does not read itself, as a share of reading it: its keys and
# values are copied, and their gradients added up. CPU, one thread, llama of 1M weights, 128 rows of 32 + 64 tokens,
# profiled: .04 ms (index, cat, copy, mask) beside .38 ms. Attention itself takes as long over a cache with its explicit
# mask as over whole rows: 14 % of the time both ways.
FAN_OUT = 0.1


@dataclass(frozen=True)
class Shared:
    """Rows of which several begin alike. B rows, D beginnings; all but ``ids`` is on the host.

    Worked example: rows ``abcx``, ``abcyz``, ``dew``::

        which [0, 0, 1]    first [0, 2]    prefix [3, 2]    rest [1, 2, 1]
    """

    ids: Tensor  # [B, W] long, rows from the left edge
    which: Tensor  # [B] long, the beginning of each row
    first: Tensor  # [D] long, a row that begins so
    prefix: Tensor  # [D] long, tokens of each beginning; 0 = these rows share nothing
    rest: Tensor  # [B] long, tokens to be read after it; what stands behind them is not read

    @property
    def overhead(self) -> int:
        """What one more pass costs, in tokens."""
        return pass_tokens(self.ids.device)

    @cached_property
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Numbers of the beginnings, and of the rows, that are read in one pass each."""
        return in_parts(self.prefix, self.overhead), in_parts(self.rest, self.overhead)

    @property
    def cost(self) -> int:
        """What reading costs, in tokens."""
        return reading_cost(self.prefix, self.which, self.rest, self.parts, self.overhead)


def in_parts(lengths: Tensor, overhead: int) -> list[Tensor]:
    """Cut by length what is longer than nothing."""
    read = lengths.nonzero().squeeze(1)
    return [read[part] for part in cut_by_length(lengths[read], overhead=overhead)]


def reading_cost(
    prefix: Tensor, which: Tensor, rest: Tensor, parts: tuple[list[Tensor], list[Tensor]], overhead: int
) -> int:
    """What it costs, in tokens, to read beginnings and rows in these parts."""
    beginnings, rows = parts
    read = padded_tokens(beginnings, prefix) + padded_tokens(rows, rest)
    return read + overhead * (len(beginnings) + len(rows)) + int(FAN_OUT * int(prefix[which].sum()))


def number_rows(ids: Tensor, mask: Tensor) -> Tensor:
    """Number distinct rows in the order in which they first occur; [B] long, on the host.

    Args:
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token.
    """
    numbers: dict[bytes, int] = {}
    rows = ids.masked_fill(~mask, -1).cpu().numpy()
    return torch.tensor([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], dtype=torch.long)


def first_of_each(which: Tensor) -> Tensor:
    """First row of each number, [D], of rows numbered 0 … D − 1, [B]."""
    rows, count = torch.arange(len(which)), int(which.max()) + 1
    return torch.full((count,), len(which)).scatter_reduce(0, which, rows, "amin")


def shared_prompts(rollout: Rollout) -> Shared | None:
    """See which rows of a rollout answer the same prompt; a row is read up to its last token, which predicts nothing.

    Returns:
        None where reading the rows whole costs less, or a prompt is empty.
    """
    which = number_rows(rollout.prompt_ids, rollout.prompt_mask)
    if not len(which) or int(which.max()) + 1 == len(which):
        return None
    first = first_of_each(which)
    prefix, lengths = torch.stack([rollout.prompt_mask.sum(dim=1), rollout.lengths]).cpu()
    # Where a response counts for nothing the row's last token is its prompt's, which is read for the others.
    ids, _ = to_left_edge(rollout.input_ids, rollout.input_mask, but_last=bool(lengths.min() > 0))
    shared = Shared(ids, which, first, prefix[first], (lengths - 1).clamp(min=0))
    cheaper = shared.cost < ids.numel() + shared.overhead
    return shared if cheaper and int(prefix.min()) > 0 else None


def groups_of_rows(pairs: Pairs) -> Tensor:
    """Number each response's prompt, [N] long on the host, 0 … D − 1; one that is not compared stands alone."""
    better, worse, groups = torch.stack([pairs.better, pairs.worse, pairs.groups]).cpu()
    alone = torch.arange(len(pairs.ids)) + len(pairs.ids)
    return torch.unique(alone.scatter(0, better, groups).scatter(0, worse, groups), return_inverse=True)[1]


def shared_beginnings(ids: Tensor, mask: Tensor, groups: Tensor) -> Shared:
    """See how far the rows of each group begin alike; each row's last token is its own.

    Args:
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token, padding on either side.
        groups: [B] long on the host, number of each row's group, 0 … D − 1.
    """
    moved, _ = to_left_edge(ids, mask)
    first, lengths, tokens = first_of_each(groups), mask.sum(dim=1).cpu(), moved.cpu()
    model = first[groups]  # of each row, the row that it is held against
    is_real = torch.arange(tokens.shape[1]) < torch.minimum(lengths, lengths[model])[:, None]
    alike = ((tokens == tokens[model]) & is_real).long().cumprod(dim=1).sum(dim=1)
    alike = torch.minimum(alike, lengths - 1).clamp(min=0)
    prefix = torch.full_like(first, tokens.shape[1]).scatter_reduce(0, groups, alike, "amin")
    prefix[torch.bincount(groups) == 1] = 0
    return Shared(moved, groups, first, prefix, lengths - prefix[groups])


def read_shared(run: Callable[..., Tensor], model: Any, shared: Shared) -> tuple[Tensor, Tensor]:
    """Read beginnings once and the rest of each row over them.

    Args:
        run: ``run(positions, **inputs)`` gives what the model says at places [N] of its flattened inputs, [N, …].
        model: what it runs.
        shared: what to read.

    Returns:
        (what the model says, [M, …]; place [B, 1 + R] of what it says after each row's beginning (column 0) and after
        each further token (columns 1 to R, the longest rest), where there is one).
    """
    from lit_rlhf.models.fan import Fan, empty_cache

    sliding = sliding_layers(model)
    assert sliding is not None
    device, said, count = shared.ids.device, list[Tensor](), 0
    place = torch.zeros(len(shared.which), 1 + int(shared.rest.max()), dtype=torch.long)
    beginnings, rows = shared.parts
    widest, caches, columns = int(shared.prefix.max()), [], 0
    after, at = torch.zeros_like(shared.prefix), torch.zeros(len(shared.prefix), widest, dtype=torch.long)
    for part in beginnings:
        lengths, number = shared.prefix[part], torch.arange(len(part))
        width = int(lengths.max())
        caches.append(empty_cache(sliding))
        ends = (number * width + lengths - 1).to(device)
        ids = shared.ids[shared.first[part].to(device), :width]
        said.append(run(ends, input_ids=ids, past_key_values=caches[-1], use_cache=True))
        own = torch.arange(widest) - (widest - lengths[:, None])  # the last token in the last column
        at[part] = columns + number[:, None] * width + own.clamp(min=0)
        after[part] = count + number
        count, columns = count + len(part), columns + len(part) * width
    as_it_is = len(caches) == 1 and int(shared.prefix.min()) == widest
    fan = Fan(caches, None if as_it_is else at.to(device))
    place[:, 0] = after[shared.which]
    for part in rows:
        inputs, is_real = _rest(shared, part)
        cache = fan.out(shared.which[part].to(device), int(shared.prefix[shared.which[part]].max()))
        asked = is_real.flatten().nonzero().squeeze(1)
        said.append(run(asked.to(device), **inputs, past_key_values=cache, use_cache=True))
        place[part, 1 : 1 + is_real.shape[1]] = (count - 1 + is_real.flatten().cumsum(0)).view(is_real.shape)
        count += len(asked)
    return torch.cat(said), place.to(device)


def _rest(shared: Shared, part: Tensor) -> tuple[dict[str, Tensor | None], Tensor]:
    """Inputs of a pass over what follows the rows' beginnings, and which of its tokens [n, R] are real, on the host."""
    device, before = shared.ids.device, shared.prefix[shared.which[part]]
    columns, last = int(before.max()), shared.ids.shape[1] - 1
    number = torch.arange(int(shared.rest[part].max()))
    # Behind a short row's end stands anything: nothing sees it, but its position must be one that the model has.
    positions = (before[:, None] + number).clamp(max=last).to(device)
    mask = None
    if int(before.min()) < columns:
        is_own = torch.arange(columns) >= columns - before[:, None]
        mask = torch.cat([is_own, torch.ones(len(part), len(number), dtype=torch.bool)], dim=1).long().to(device)
    ids = shared.ids[part.to(device)].gather(1, positions)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    return inputs, number < shared.rest[part][:, None]
