"""Which rows a process reads: every one of training as many, and of what is held out each row once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lit_rlhf.batch import Examples, Pairs, Prompts
from lit_rlhf.data.mixture import Mixture


class RankSampler(DistributedSampler[int]):
    """This process's share of the row numbers; the order is a function of (seed, epoch) and nothing else.

    Row ``i`` of the epoch's order belongs to rank ``i mod world``, so the batches of one step are one block of that
    order whatever the number of processes. Being a DistributedSampler keeps Lightning from putting its own in place.
    """

    def __init__(self, rows: int | Mixture, *, rank: int, world: int, shuffle: bool, seed: int) -> None:
        """Share out ``rows``: shuffled, the rest is left out; in order, numbers past the end fill the last round."""
        self.mixture = Mixture((rows,), (rows,)) if isinstance(rows, int) else rows
        self.rows = len(self.mixture)
        super().__init__(range(self.rows), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed, drop_last=shuffle)  # type: ignore[arg-type]
        self.start = 0  # rows of this rank to leave out at the next pass

    def __iter__(self) -> Iterator[int]:
        order = self.mixture.order(self.seed, self.epoch) if self.shuffle else list(range(self.total_size))
        start, self.start = self.start, 0
        return iter(order[self.rank : self.total_size : self.num_replicas][start:])

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the loader sets the epoch, as Lightning does so too late for worker processes."""


class Rounds(Sequence[Any]):
    """Held-out rows with their numbers, which go on past the last one: there the first rows come again."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> tuple[int, Any]:
        """(number, row)."""
        return i, self.rows[i % len(self.rows)]


def collate_numbered(collate: Callable[..., Any], total: int, numbered: list[tuple[int, Any]], *, pad: int) -> Any:
    """Make a batch of numbered rows; those whose number is ``total`` or more count nowhere.

    Args:
        collate: makes a batch of rows.
        total: number of rows that there are.
        numbered: (number, row) of each.
        pad: token id to pad with.

    Returns:
        Prompts with their numbers, by which a sampler draws; Examples with nothing to learn in a row that comes again.
    """
    numbers, batch = torch.tensor([i for i, _ in numbered]), collate([row for _, row in numbered], pad=pad)
    counts = numbers < total
    if isinstance(batch, Prompts):
        batch = batch.with_(rows=numbers)
    if bool(counts.all()):
        return batch
    if isinstance(batch, Examples):
        return batch.with_(loss_mask=batch.loss_mask & counts.unsqueeze(1))
    if isinstance(batch, Pairs):
        return batch.with_(counts=counts.repeat_interleave(torch.tensor([len(row.sequences) for _, row in numbered])))
    return batch.with_(counts=counts) if isinstance(batch, Prompts) else batch
