"""Several examples in one row, none of which sees another: fewer rows to read, and next to no padding in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.models.noise import embedding_noise
from lit_rlhf.models.output import chosen_tokens
from lit_rlhf.ranges import SettingError


def pack_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put examples into rows, longest first, each into the first row where it still fits (first-fit decreasing).

    It takes at most 11/9 of the fewest rows possible, and 6/9 of one more (Dósa 2007).

    Args:
        lengths: tokens of each example; none longer than ``room``.
        room: tokens that a row takes.

    Returns:
        The numbers of the examples in each row; every example once.

    >>> pack_rows([2, 5, 3, 4], room=7)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


def packed_next_token_logprobs(
    model: Any, ids: Tensor, mask: Tensor, learned: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `next_token_logprobs` does, gradients too, with the batch packed into as few rows as it fills.

    A row is as long as the longest example. Position ids begin anew with each example; from that transformers makes
    masks that keep examples apart, of sliding windows too. Flash attention gets a single row without any padding, since
    it tells examples apart in a batch of one only. That a model keeps them apart is tried out once.

    Args:
        model: a causal language model.
        ids: [B, L] token ids, one example a row.
        mask: [B, L] bool, True = a real token, padding on either side.
        learned: [B, L] bool, True = a token that is asked for; None = all.
        noise: [B, L, d] added to the embeddings while gradients are recorded; None = none.

    Returns:
        (logprobs [B, L - 1] float32, correct [B, L - 1] bool), 0 and False where nothing is asked for.

    Raises:
        ValueError: the model lets examples of one row see one another.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    _refuse_leaks(network)
    column = mask.long().cumsum(dim=1) - 1
    lengths = [max(length, 0) for length in column[:, -1].tolist()]  # an example's last token predicts nothing
    room = max(1, sum(lengths) if _is_flash(network) else max(lengths))
    start, position_ids = _lay_out(lengths, room, ids.device)
    end = position_ids.numel()
    slots = torch.where(mask & (column < column[:, -1:]), start[:, None] + column, end)  # what is not read goes behind
    packed = ids.new_zeros(end + 1).scatter_(0, slots.flatten(), ids.flatten())[:end].view_as(position_ids)
    if noise is not None:
        spread = noise.new_zeros(end + 1, noise.shape[2]).index_put_((slots.flatten(),), noise.flatten(0, 1))
        noise = spread[:end].view(*position_ids.shape, -1)
    asked = mask if learned is None else learned & mask
    row, at = (asked & (column > 0)).nonzero(as_tuple=True)
    before = start[row] + column[row, at] - 1
    with embedding_noise(network, noise):
        found = chosen_tokens(model, packed, before, ids[row, at], position_ids=position_ids, correct=True)
    place, shape = (row, at - 1), (ids.shape[0], ids.shape[1] - 1)
    logprobs = found.logprobs.new_zeros(shape).index_put(place, found.logprobs)
    return logprobs, found.correct.new_zeros(shape).index_put(place, found.correct)


def _lay_out(lengths: list[int], room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each example begins in the flattened rows [B], and every place's number in its example [R, room].

    What a row has left over counts from 0 too: an example of padding, which only padding sees.
    """
    start, positions = [0] * len(lengths), list[Tensor]()
    rows = pack_rows(lengths, room)
    for number, row in enumerate(rows):
        sizes = [lengths[i] for i in row]
        for i, first in zip(row, accumulate(sizes, initial=0), strict=False):
            start[i] = number * room + first
        positions += [torch.arange(size) for size in (*sizes, room - sum(sizes))]
    return (
        torch.tensor(start).to(device, non_blocking=True),
        torch.cat(positions).view(len(rows), room).to(device, non_blocking=True),
    )


def _is_flash(network: Any) -> bool:
    return "flash" in str(getattr(network.config, "_attn_implementation", ""))


_LEAKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _refuse_leaks(network: Any) -> None:
    if network not in _LEAKS:
        _LEAKS[network] = _leaks(network)
    if _LEAKS[network]:
        raise SettingError(
            f"packing: {type(network).__name__} lets examples of one row see one another (a state-space or recurrent "
            "model, or one that makes its attention masks without position ids): set packing: false"
        )


@torch.no_grad()
def _leaks(network: Any) -> bool:
    """Whether what is said of a row's second example depends on the first, or differs from what is said of it alone."""
    device, half = next(network.parameters()).device, 5
    vocabulary = network.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(3 * half, device=device).view(3, half) % vocabulary
    positions = torch.arange(half, device=device).repeat(2)[None]
    training = [module for module in network.modules() if module.training]
    network.eval()  # dropout would make a difference of its own
    try:
        behind_one, behind_other, alone = (
            network(input_ids=row[None], position_ids=positions[:, : len(row)], use_cache=False).logits[0, -half:]
            for row in (tokens[[0, 2]].flatten(), tokens[[1, 2]].flatten(), tokens[2])
        )
    finally:
        for module in training:
            module.training = True
    # Rounding varies with a row's length and, in mixtures of experts, its company; in half precision it is coarse.
    coarse = behind_one.dtype != torch.float32 or network.dtype != torch.float32
    coarse = coarse or torch.is_autocast_enabled(device.type)
    limit = (0.05 if coarse else 1e-3) * alone.float().std()
    return not all(bool(((other - alone).float().abs() <= limit).all()) for other in (behind_one, behind_other))
