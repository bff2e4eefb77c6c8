"""Cut rows into batches that hold the answers to a prompt together, so that the prompt is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.models.lengths import padded_tokens
from lit_rlhf.models.prefix import in_parts, reading_cost


def cut_groups(
    which: Tensor, prefix: Tensor, rest: Tensor, *, most_tokens: int | None, overhead: int, count: int | None = None
) -> tuple[list[Tensor], int]:
    """Cut rows into batches that hold the rows of a group together, about equally large, as few as the bound allows.

    Args:
        which: [B] long, number of each row's group.
        prefix: [B] long, tokens that the rows of its group share.
        rest: [B] long, tokens of its own.
        most_tokens: that a batch may read, padding included, each beginning once; a group of more is divided, a longer
            row stands alone. None = no bound.
        overhead: what one more pass costs, in tokens.
        count: make so many batches, at most B, in place of as few as fit.

    Returns:
        (row numbers [n] of each batch, ascending; what reading all of them costs, in tokens).
    """
    order = torch.argsort(which * (int(rest.max()) + 1) + rest, stable=True)
    units = [_fitting(rows, int(prefix[rows[0]]), rest, most_tokens) for rows in _runs(order, which)]
    units.sort(key=lambda chunks: int(prefix[chunks[0][0]]))  # prompts of like length together
    flat = [chunk for chunks in units for chunk in chunks]
    if count is not None and count > len(flat):
        flat = list(torch.cat(flat).split(1))
    tried = count or 1
    while True:
        batches, costs, fits = _joined(flat, prefix, rest, tried), 0, True
        for rows in batches:
            own, of = torch.unique(which[rows], return_inverse=True)
            once = torch.zeros_like(own).scatter(0, of, prefix[rows])
            parts = in_parts(once, overhead), in_parts(rest[rows], overhead)
            costs += reading_cost(once, of, rest[rows], parts, overhead)
            tokens = padded_tokens(parts[0], once) + padded_tokens(parts[1], rest[rows])
            fits = fits and (most_tokens is None or tokens <= most_tokens)
        if fits or count is not None or tried == len(flat):
            return [rows.sort().values for rows in batches], costs
        tried = min(tried + 1 + tried // 8, len(flat))


def _runs(order: Tensor, which: Tensor) -> list[Tensor]:
    sizes = torch.unique_consecutive(which[order], return_counts=True)[1]
    return list(order.split(sizes.tolist()))


def _fitting(rows: Tensor, prefix: int, rest: Tensor, most_tokens: int | None) -> list[Tensor]:
    """A group's rows in as few chunks as fit."""
    chunks, longest = 1, int(rest[rows].max())
    while most_tokens is not None and chunks < len(rows) and prefix + -(-len(rows) // chunks) * longest > most_tokens:
        chunks += 1
    return list(rows.tensor_split(chunks))


def _joined(units: list[Tensor], prefix: Tensor, rest: Tensor, count: int) -> list[Tensor]:
    """Join neighbours into ``count`` batches of about as many tokens."""
    tokens = torch.stack([prefix[rows[0]] + rest[rows].sum() for rows in units]).cumsum(0)
    marks = torch.arange(1, count) * int(tokens[-1]) / count
    ends = torch.searchsorted(tokens, marks).tolist()
    batches, start = [], 0
    for i, end in enumerate([*ends, len(units)]):
        end = min(max(end, start + 1), len(units) - (count - 1 - i))  # none is empty
        batches.append(torch.cat(units[start:end]))
        start = end
    return batches
