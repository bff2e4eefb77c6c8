"""Loaders whose place in the data is known: a run that is resumed goes on with the very next row.

The place (epoch, rows read by all processes) belongs to the data module and travels in its ``state_dict``. It is not
the DataLoader's own state: Lightning forgets that one when something asked for the length of the run before the
checkpoint was restored (Lightning issue 20550).
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_rlhf.data.chat import find_tokenizer, padding_id
from lit_rlhf.data.files import DataError, Rows
from lit_rlhf.data.mixture import Mixture, sources_of, unstack
from lit_rlhf.data.position import Position, recount
from lit_rlhf.data.reach import Reach
from lit_rlhf.data.shares import RankSampler, Rounds, collate_numbered
from lit_rlhf.data.sources import load_split
from lit_rlhf.data.templates import set_template
from lit_rlhf.ranges import check_number, check_seed

_SIZES = ("batch_size", "val_batch_size", "pretraining_batch_size", "max_length", "max_prompt_length")
_COUNTS = (*_SIZES, "limit", "val_limit", "prompt_words")


class SeekableLoader(DataLoader[Any]):
    """A DataLoader that reads from ``position`` and moves it on.

    A pass looks at the position only when its first batch is asked for, so a seek counts that comes after the iterator
    was made (strategies that restore a checkpoint late). Without a position it is a plain DataLoader.
    """

    position: Position | None = None
    gain: Callable[[Any], Any] | None = None  # what a batch gains in the main process, when it is given out

    def __iter__(self) -> Any:
        if self.position is None or not isinstance(self.sampler, RankSampler):  # overfit_batches puts another in place
            return super().__iter__() if self.gain is None else map(self.gain, super().__iter__())
        return self._read(self.position, self.sampler)

    def _read(self, position: Position, sampler: RankSampler) -> Iterator[Any]:
        step = (self.batch_size or 1) * sampler.num_replicas
        position.begin(usable=len(self) * step)
        sampler.epoch, sampler.start = position.epoch, position.rows // sampler.num_replicas
        for batch in super().__iter__():
            position.rows += step
            yield batch if self.gain is None else self.gain(batch)


class SeekableData(L.LightningDataModule):
    """What the data modules share: rows are read and encoded once (a subclass says how), served, their place kept."""

    def __init__(self, *, batch_size: int, val_batch_size: int | None, seed: int, num_workers: int) -> None:
        """Take the knobs of the same names."""
        super().__init__()
        self.tokenizer: Any = None
        self.dropped: Counter[str] = Counter()  # rows left out, by reason
        self.truncated = 0  # sequences that were cut to the length limit
        self.position, self.reach = Position(), Reach()
        self._batch_size, self._val_batch_size = batch_size, val_batch_size or batch_size
        self._seed, self._num_workers = seed, num_workers
        self._train: Sequence[Any] | None = None
        self._val: Sequence[Any] = ()
        self._mixture = Mixture((), ())
        self._owner: weakref.ref[Any] | None = None  # the Trainer that the position belongs to
        self._kept = False  # the position was restored before there was a Trainer

    @property
    def knobs(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def encode(self, rows: Rows) -> Sequence[Any]:
        """Encode all rows; whatever is left out is counted in ``dropped``."""
        raise NotImplementedError

    def combine(self, parts: list[Any]) -> Sequence[Any]:
        """The encoded rows of several sources as one sequence, in their order."""
        return [row for part in parts for row in part]

    def encode_beside(self) -> None:
        """Encode what is no row of ``train`` or ``val``, if there is such a thing."""

    @staticmethod
    def collate(rows: list[Any], *, pad: int) -> Any:
        """Make a batch of encoded rows, padded with ``pad``."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read and encode all rows, unless that was done with this very tokenizer."""
        known = self.tokenizer if self.knobs.tokenizer is not None else None
        tokenizer = known or find_tokenizer(self.knobs.tokenizer, self.trainer)
        if self._train is not None and tokenizer is self.tokenizer:
            return
        self._check_knobs()
        self.tokenizer, self.dropped, self.truncated = tokenizer, Counter(), 0
        self.reach = Reach.of(self.trainer)
        set_template(self.tokenizer, self.knobs.chat_template)
        train, val = load_split(**{name: self.knobs[name] for name in inspect.signature(load_split).parameters})
        self._train, parts = self._encode_all(train)
        self._val = () if val is None else self._encode_all(val)[0]
        sources = sources_of(self.knobs.train, "train")
        self._mixture = Mixture.of([len(part) for part in parts], [source.weight for source in sources])
        self.encode_beside()
        lost = "".join(f"; dropped {count} {reason}" for reason, count in self.dropped.items())
        cut = f"; cut {self.truncated} that were too long" if self.truncated else ""
        name, rows = type(self).__name__, f"{len(self._train)} training and {len(self._val)} validation rows"
        pad, end = padding_id(self.tokenizer), self.tokenizer.eos_token_id
        same = f"; padding is the end token ({pad}), told apart by lengths" if pad == end else ""
        rank_zero_info(f"{name}: {rows}{self._mixture.shares(sources)}{lost}{cut}{same}")

    def train_dataloader(self) -> SeekableLoader:
        """Shuffled batches, always full; a new Trainer starts with the first epoch unless it restored a place."""
        rows, trainer, epoch = self._train or (), self.trainer, len(self._mixture)
        rank, world = rank_of(trainer)
        if epoch < self._batch_size * world:
            raise DataError(
                f"{epoch} training rows do not fill one batch: batch_size={self._batch_size} on {world} "
                f"process(es) takes {self._batch_size * world}. Lower batch_size, or give more rows."
            )
        if trainer is not None:
            if not self._kept and (self._owner is None or self._owner() is not trainer):
                self.position.seek(0, 0)
            self._kept, self._owner = False, weakref.ref(trainer)
        sampler = RankSampler(self._mixture, rank=rank, world=world, shuffle=True, seed=self._seed)
        loader: SeekableLoader = self._loader(SeekableLoader, rows, sampler, self._batch_size)
        loader.position = self.position
        if trainer is not None:
            recount(trainer, self.position, sampler.num_samples, self._batch_size, world)
        return loader

    def val_dataloader(self) -> Any:
        """Every row once, in order; on several processes first rows may come again, marked as not to be counted.

        All processes read as many, since sharded weights are gathered in every forward pass.
        """
        if not self._val:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # it is meant
            return []
        rank, world = rank_of(self.trainer)
        sampler = RankSampler(len(self._val), rank=rank, world=world, shuffle=False, seed=self._seed)
        return self._loader(DataLoader, Rounds(self._val), sampler, self._val_batch_size)

    def test_dataloader(self) -> Any:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The validation rows."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The place to store; a finished epoch is the start of the next, also when the Trainer cut it short."""
        place, loop = self.position, getattr(self.trainer, "fit_loop", None)
        beside = {"pretraining": place.pretraining} if place.pretraining else {}
        if place.started and loop is not None and loop.epoch_loop.batch_progress.is_last_batch:
            return {"epoch": place.epoch + 1, "rows": 0, **beside}
        return {"epoch": place.epoch, "rows": place.rows, **beside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a stored place, before or after the loader was made."""
        # Lightning tells a resumable loader by a method of the DataLoader; here the data module resumes.
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
        self.position.seek(*(int(state_dict.get(key, 0)) for key in ("epoch", "rows", "pretraining")))
        self._kept, self._owner = self.trainer is None, None if self.trainer is None else weakref.ref(self.trainer)

    def _encode_all(self, rows: Rows) -> tuple[Sequence[Any], list[Sequence[Any]]]:
        """The encoded rows of all sources together, and of each."""
        parts = [self.encode(part) for part in unstack(rows) if len(part)]
        return parts[0] if len(parts) == 1 else self.combine(parts), parts

    def _check_knobs(self) -> None:
        """Refuse values that the constructor's signature does not allow."""
        for name, hint in get_type_hints(type(self).__init__).items():
            value = self.knobs.get(name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise DataError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
        for name in _COUNTS:
            if (value := self.knobs.get(name)) is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        check_number("data.max_dropped", self.knobs.max_dropped, least=0, most=1)
        check_number("data.num_workers", self.knobs.num_workers, least=0, whole=True)
        check_seed("data.seed", self.knobs.seed)

    def _loader(self, kind: Any, rows: Sequence[Any], sampler: RankSampler, batch_size: int) -> Any:
        pad = padding_id(self.tokenizer)
        return kind(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self._num_workers,
            collate_fn=partial(
                self.collate if sampler.shuffle else partial(collate_numbered, self.collate, len(self._val)), pad=pad
            ),
            drop_last=bool(sampler.shuffle),
            generator=torch.Generator().manual_seed(self._seed),  # else each pass draws from torch's global stream
        )


def rank_of(trainer: Any) -> tuple[int, int]:
    """(rank, world) among the processes that read different data; one process where there is no Trainer."""
    place = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None)
    return (place["rank"], place["num_replicas"]) if place else (0, 1)
