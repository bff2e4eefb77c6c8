"""Several sources of rows as one: what names them, and which of their rows an epoch reads, in which order."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from lit_rlhf.data.files import DataError, Rows

Sources = list[str | dict[str, Any]] | str  # one source, or several; a dict has path and perhaps weight and split


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Args:
        path: file, folder or hub id.
        weight: how many times an epoch reads it.
        split: which of its splits; None takes that of the other sources.
    """

    path: str
    weight: float = 1.0
    split: str | None = None


def sources_of(given: Sources, knob: str) -> list[Source]:
    """What a knob names: one path, or a list of paths and of ``{path, weight, split}``.

    Raises:
        DataError: nothing or something twice, an unknown key, a missing path, a weight that is no number above 0.
    """
    if isinstance(given, str):
        return [Source(given)]
    if not isinstance(given, (list, tuple)) or not given:
        raise DataError(f"{knob}: expected a path or a list of at least one source, got {given!r}")
    sources = [_source(one, f"{knob}, source {number}") for number, one in enumerate(given, start=1)]
    for i, source in enumerate(sources):
        if (source.path, source.split) in [(other.path, other.split) for other in sources[:i]]:
            raise DataError(f"{knob}, source {i + 1}: {source.path} is named twice; to read it twice give it weight: 2")
    return sources


def _source(given: Any, place: str) -> Source:
    if isinstance(given, str):
        return Source(given)
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        raise DataError(f"{place}: expected a path, or path and perhaps weight and split, got {given!r}")
    unknown = [key for key in given if key not in ("path", "weight", "split")]
    if unknown:
        raise DataError(f'{place} ({given["path"]}): no key "{unknown[0]}" is known; known are path, weight, split')
    weight, split = given.get("weight"), given.get("split")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise DataError(
            f"{place} ({given['path']}): weight is {weight!r}; expected a number above 0, how many times an epoch "
            "reads the source (take the source out to read none of it)"
        )
    return Source(given["path"], float(weight), split)


@dataclass(frozen=True)
class _Chain(Sequence[Any]):
    parts: Sequence[Rows]
    starts: list[int]  # of each part, and the end

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: Any) -> Any:
        which = bisect_right(self.starts, i) - 1
        return self.parts[which][i - self.starts[which]]

    def place(self, i: int) -> str:
        which = bisect_right(self.starts, i) - 1
        return self.parts[which].place(i - self.starts[which])


def stack(parts: Sequence[Rows]) -> Rows:
    """Rows of several sources, one source after the other; `unstack` parts them again."""
    if len(parts) == 1:
        return parts[0]
    chain = _Chain(parts, list(accumulate((len(part) for part in parts), initial=0)))
    columns = tuple(dict.fromkeys(column for part in parts for column in part.columns))
    return Rows(" + ".join(part.source for part in parts), columns, chain, chain.place, range(len(chain)))


def unstack(rows: Rows) -> list[Rows]:
    """What is left of each source in stacked rows, of which some may have been picked."""
    if not isinstance(rows.items, _Chain):
        return [rows]
    chosen: list[list[int]] = [[] for _ in rows.items.parts]
    for i in rows.index:
        which = bisect_right(rows.items.starts, i) - 1
        chosen[which].append(i - rows.items.starts[which])
    return [part.pick(mine) for part, mine in zip(rows.items.parts, chosen, strict=True)]


@dataclass(frozen=True)
class Mixture:
    """How many rows each source has, one source after the other, and how many of them an epoch reads.

    A source is read pass after pass, each in a new order; an epoch takes the next ``counts`` rows of every source and
    shuffles them together. So weight 2 reads each row twice an epoch, weight ½ reads each row in one of two epochs, and
    weight 1 everywhere is the plain sum of the sources. A row drawn at random from an epoch comes from source i with
    probability counts[i] / sum(counts). No source ends early and no row is left out for good.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float]) -> Mixture:
        """The mixture of sources of these sizes: an epoch reads weight · size rows of each, one at least."""
        counts = [max(1, round(weight * size)) for size, weight in zip(sizes, weights, strict=True)]
        return cls(tuple(sizes), tuple(counts))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """Numbers of the rows that an epoch reads, in order: a function of the arguments and nothing else."""
        rows: list[int] = []
        first = 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            rows += [first + i for i in self._next(number, size, epoch * count, count, seed)]
            first += size
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]

    @staticmethod
    def _next(number: int, size: int, start: int, count: int, seed: int) -> Sequence[int]:
        """Places ``start`` to ``start + count`` of the endless passes over a source."""
        if count == size:
            return range(size)
        found: list[int] = []
        while len(found) < count:
            passes, at = divmod(start + len(found), size)
            digest = hashlib.blake2b(repr((seed, number, passes)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            found += torch.randperm(size, generator=generator).tolist()[at : at + count - len(found)]
        return found

    def shares(self, sources: Sequence[Source]) -> str:
        """For people: "; an epoch reads a.jsonl 20 (80.0 %), b.jsonl 5 (20.0 %)"; nothing of one source read once."""
        if self.counts == self.sizes and len(sources) == 1:
            return ""
        both = zip(sources, self.counts, strict=True)
        read = (f"{source.path} {count} ({100 * count / len(self):.1f} %)" for source, count in both)
        return f"; an epoch reads {', '.join(read)}"
