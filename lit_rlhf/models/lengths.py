"""Cut rows into parts of similar length, so that little of what is read is padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

# What one more forward and backward pass costs, as the number of tokens that take as long to compute.
# CPU, one thread, measured as fixed time / time a token: llamas of 0.1M, 1M and 15M weights 227, 69, 48 (forward
# passes alone: 411, 107, 39). GPU, reckoned, not measured: a pass is at least the launches of its kernels, some 25 ms
# of Python, and a token of a model with N weights takes 6·N / 400 TFLOP/s, so 3,300 tokens at 0.5B and 240 at 7B.
PASS_TOKENS = {"cpu": 128, "cuda": 2048}
_NEVER = 2**60  # a cost that no cut has


def pass_tokens(device: torch.device) -> int:
    """What one more pass costs on a device, in tokens."""
    return PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])


def padded_tokens(parts: Sequence[Tensor], lengths: Tensor) -> int:
    """Tokens that are read of rows of ``lengths`` [B] in these parts, padding included."""
    return sum(len(part) * int(lengths[part].max()) for part in parts)


def cut_by_length(
    lengths: Sequence[int] | Tensor,
    *,
    most_tokens: int | None = None,
    overhead: int = PASS_TOKENS["cuda"],
    at_least: int = 1,
) -> list[Tensor]:
    """Cut rows into parts of similar length, so that reading them part by part costs least.

    The cost is Σ over parts of (rows × longest row + ``overhead``), and no other cut into parts that respect
    ``most_tokens`` costs less: some best cut is one of the rows in order of length, and of those a dynamic programme
    finds the best.

    Args:
        lengths: tokens of each row, [B].
        most_tokens: rows × longest row that a part may have, which bounds memory; a longer row stands alone.
        overhead: what one more part costs, in tokens (``PASS_TOKENS``).
        at_least: number of parts to make at least; as many as there are rows where these are fewer.

    Returns:
        Row numbers [n] of each part, ascending within a part, parts from short rows to long ones; every row once.

    >>> [part.tolist() for part in cut_by_length([9, 2, 8, 2], overhead=3)]
    [[1, 3], [0, 2]]
    """
    lengths = torch.as_tensor(lengths).cpu().long()
    if not len(lengths):
        return []
    in_order = lengths.sort(stable=True)
    longest, room = in_order.values.tolist(), _NEVER if most_tokens is None else most_tokens
    places = _places(longest, room)
    at_least = min(max(at_least, 1), len(lengths))
    ends = _best_ends(places, longest, room, overhead, at_least)
    sizes = _even_sizes(ends, longest, at_least)
    return [part.sort().values for part in in_order.indices.split(sizes)]


def _places(longest: list[int], room: int) -> list[int]:
    """Where a best cut of the rows in order may cut, from 0 to B.

    A part that ends between two rows of one length is full, or the next row could join it at no cost. So it ends where
    the length changes or where the room does.
    """
    rows = len(longest)
    changes = [end for end in range(1, rows) if longest[end - 1] != longest[end]] + [rows]
    is_place = [False] * rows + [True]
    for place in [0, *changes]:
        is_place[place] = True
    for start in range(rows):
        if is_place[start]:
            # The first change that a part from here does not reach; its rows before that one may still fit.
            over = bisect_left(changes, True, key=lambda end: (end - start) * longest[end - 1] > room)
            if over < len(changes):
                reach = start + max(1, room // longest[changes[over] - 1])
                is_place[max(reach, changes[over - 1] if over else 0)] = True
    return [place for place in range(rows + 1) if is_place[place]]


def _best_ends(places: list[int], longest: list[int], room: int, overhead: int, at_least: int) -> list[int]:
    """Ends of the parts of a cheapest cut that cuts at some of the places.

    ``cost[j, k]`` is that of the first ``places[j]`` rows in k + 1 parts; in the last column, in ``at_least`` or more.
    A cut with fewer parts also pays for those it lacks: they are made of it afterwards and save no tokens.
    """
    ends = np.array(places)
    cost = np.full((len(places), at_least), _NEVER)
    came = np.zeros_like(cost)  # the place where the last part begins
    begun = np.full_like(cost, _NEVER)  # [j, k]: cost up to place j in k parts; last column: or in more
    begun[0, 0] = 0
    first, column = 0, np.arange(at_least)
    for j in range(1, len(places)):
        end, width = places[j], longest[places[j] - 1]
        while (end - places[first]) * width > room and end - places[first] > 1:
            first += 1
        through = begun[first:j] + ((end - ends[first:j]) * width + overhead)[:, None]
        index = through.argmin(axis=0)
        cost[j], came[j] = through[index, column], index + first
        begun[j, 1:] = cost[j, :-1]
        begun[j, -1] = min(begun[j, -1], cost[j, -1])
    j, k = len(places) - 1, int((cost[-1] + overhead * column[::-1]).argmin())
    cut = []
    while j:
        cut.append(places[j])
        j = int(came[j, k])
        k = k if k == at_least - 1 and (k == 0 or cost[j, k] <= cost[j, k - 1]) else k - 1
    return cut[::-1]


def _even_sizes(ends: list[int], longest: list[int], at_least: int) -> list[int]:
    """Rows of each part: neighbours with the same longest row share theirs evenly, and missing parts are made."""
    groups: list[list[int]] = []  # rows, parts
    start = 0
    for _, alike in groupby(ends, key=lambda end: longest[end - 1]):
        group = list(alike)
        groups.append([group[-1] - start, len(group)])
        start = group[-1]
    for _ in range(at_least - len(ends)):
        max(groups, key=lambda group: group[0] / group[1])[1] += 1
    return [rows * (i + 1) // count - rows * i // count for rows, count in groups for i in range(count)]
