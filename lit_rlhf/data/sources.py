"""Rows of a data set, wherever they lie: a hub id, a local file or folder, or a data set saved to disk.

Text files are read here rather than through ``datasets``: a row keeps the types it was written with, an error can name
its line, and no cache decides what is read.
"""

from __future__ import annotations

import difflib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from lit_rlhf.data.files import (
    DataError,
    Rows,
    files_of,
    join,
    looks_like_path,
    missing_path,
    read_file,
    read_hub,
    read_saved,
)
from lit_rlhf.data.mixture import Sources, sources_of, stack, unstack

T = TypeVar("T")


class Dropped(Exception):  # noqa: N818 - a decision, not an error
    """Raised by an encoder for a row to be left out; the text says why and is what the rows are counted under."""


def load_rows(source: str, split: str = "train") -> Rows:
    """Read the rows of ``source``.

    Args:
        source: a file (json, jsonl, csv, each also .gz; parquet), a folder of such files, a folder written by
            ``datasets``' save_to_disk, or a hub id, with its configuration after a colon (``openai/gsm8k:main``).
        split: which split of a hub data set, of a saved one, or of a folder whose files are named by split.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no rows.
    """
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, no such user's home
        raise DataError(f"{source[:200]!r} cannot be a path: {getattr(error, 'strerror', None) or error}") from None
    if not source.strip():
        raise DataError(f"expected a file, a folder or a hub id, got {source!r}")
    if is_file:
        rows = join(source, [read_file(path)])
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        rows = read_saved(path, source, split)
    elif path.is_dir():
        rows = join(source, [read_file(file) for file in files_of(path, split)])
    elif looks_like_path(source):
        raise missing_path(path)
    else:
        rows = read_hub(source, split)
    if not len(rows):
        raise DataError(f"{source} has no rows")
    return rows


def load_sources(given: Sources, split: str, *, knob: str, over: str | None = None) -> Rows:
    """Read the rows of one or several sources, stacked.

    Args:
        given: what the knob was set to.
        split: taken of a source that names none.
        knob: what it is called.
        over: taken of every source, whatever it names.
    """
    return stack([load_rows(one.path, over or one.split or split) for one in sources_of(given, knob)])


def load_split(
    train: Sources,
    val: Sources | None,
    *,
    split: str,
    val_split: str | None,
    val_fraction: float,
    split_by: str | None,
    seed: int,
    limit: int | None = None,
    val_limit: int | None = None,
) -> tuple[Rows, Rows | None]:
    """Read training and validation rows; the data modules' knobs of the same names say what each argument means."""
    rows = load_sources(train, split, knob="train")
    held_out: Rows | None = None
    if val is not None:
        if any(source.weight != 1 for source in sources_of(val, "val")):
            raise DataError("val: a weight has no meaning here, as validation reads every row once; leave it out")
        held_out = load_sources(val, val_split or split, knob="val")
    elif val_split is not None:
        held_out = load_sources(train, split, knob="train", over=val_split)
        for part, other in zip(unstack(rows), unstack(held_out), strict=True):
            if part.place(0) == other.place(0):  # a file, or a folder whose files are not named by split
                raise DataError(f'{part.source} has no split "{val_split}" of its own; name val, or set val_fraction')
    if held_out is not None:
        if split_by is not None:
            _check_apart(rows, held_out, split_by)
    elif val_fraction != 0:
        rows, held_out = split_rows(rows, fraction=val_fraction, split_by=split_by, seed=seed)
    empty = next((part for part in unstack(rows) if not len(part)), None)
    if empty is not None:
        raise DataError(f"{empty.source}: all of its rows are held out; lower val_fraction, or name val")
    return _first(rows, limit), None if held_out is None else _first(held_out, val_limit)


def refuse_long(length: int, longest: int, how: str, *, knob: str, instead: str) -> None:
    """Raise for a row of too many tokens unless ``how`` says that it shall be cut."""
    if how == "drop":
        raise Dropped(f"longer than {knob}={longest}")
    if how == "error":
        raised = "raise it, or " if knob.isidentifier() else ""  # a model's positions are what they are
        raise DataError(
            f'{length} tokens are more than {knob}={longest}; {raised}set too_long to "{instead}" or "drop"'
        )


def split_rows(rows: Rows, *, fraction: float, split_by: str | None = None, seed: int = 0) -> tuple[Rows, Rows]:
    """Draw about ``fraction`` of the rows for validation; rows that share a value of ``split_by`` stay together.

    Returns:
        (training rows, validation rows), each at least one row, each in the order of the source.
    """
    if not 0 < fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {fraction}; 0 means no validation rows")
    if split_by is not None:
        _check_everywhere(rows, split_by)
    keys: list[Any] = (
        list(range(len(rows))) if split_by is None else [_key(rows[i], split_by) for i in range(len(rows))]
    )
    sizes = Counter(keys)
    if len(sizes) < 2:
        what = "rows" if split_by is None else f'different values of "{split_by}"'
        raise DataError(f"{rows.source}: a validation part needs at least 2 {what}, found {len(sizes)}; name a file")
    names = list(sizes)
    random.Random(seed).shuffle(names)
    wanted, taken, held = max(1, round(fraction * len(rows))), 0, set[Any]()
    for name in names[:-1]:  # one key at least stays for training
        if taken >= wanted:
            break
        held.add(name)
        taken += sizes[name]
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        sides[key in held].append(i)
    return rows.pick(sides[0]), rows.pick(sides[1])


def check_columns(rows: Rows, wanted: Iterable[str]) -> None:
    """Raise a DataError that names the nearest columns if one of ``wanted`` is not there."""
    for column in wanted:
        if column not in rows.columns:
            raise DataError(f'{rows.source} has no column "{column}"{nearest([column], rows.columns)}')


def nearest(names: Iterable[str], known: Iterable[str]) -> str:
    """Words for an error: what is there, and which of it may have been meant by names that are not."""
    known = list(known)
    close = dict.fromkeys(match for name in names for match in difflib.get_close_matches(name, known, n=2, cutoff=0.5))
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"{meant} It has: {', '.join(known)}"


def encode_rows(
    rows: Rows, encode: Callable[[dict[str, Any]], T], *, max_dropped: float
) -> tuple[list[T], list[int], Counter[str]]:
    """Encode every row once, in order.

    Args:
        rows: what to encode.
        encode: gives a row's record; raises Dropped to leave it out and ValueError where it is wrong.
        max_dropped: the largest share of rows that may be left out.

    Returns:
        (records, the row number of each, how many rows were dropped for which reason).

    Raises:
        DataError: a wrong row (with its place), more dropped than allowed, or nothing left.
    """
    records, kept, dropped = [], [], Counter[str]()
    for i in range(len(rows)):
        try:
            records.append(encode(rows[i]))
            kept.append(i)
        except Dropped as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            said = str(error)  # which may hold the row's own words, however many
            said = said if len(said) < 600 else f"{said[:400]} … {said[-100:]}"
            raise DataError(f"{rows.place(i)}: {said}") from error
    lost = sum(dropped.values())
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if lost > max_dropped * len(rows):
        raise DataError(
            f"{rows.source}: {lost} of {len(rows)} rows would be dropped ({why}), more than "
            f"max_dropped={max_dropped:g} allows. Raise the length limit or max_dropped, or mend the data."
        )
    if not records:
        raise DataError(f"{rows.source}: no row is left ({why or 'it was empty'})")
    return records, kept, dropped


def _key(row: dict[str, Any], column: str) -> str:
    return json.dumps(row.get(column), sort_keys=True, default=str)


def _first(rows: Rows, limit: int | None) -> Rows:
    """The first rows of each source."""
    return rows if limit is None else stack([part.pick(range(min(limit, len(part)))) for part in unstack(rows)])


def _check_everywhere(rows: Rows, column: str) -> None:
    for part in unstack(rows):
        check_columns(part, [column])


def _check_apart(rows: Rows, held_out: Rows, column: str) -> None:
    _check_everywhere(rows, column)
    _check_everywhere(held_out, column)
    known = {_key(rows[i], column) for i in range(len(rows))}
    for i in range(len(held_out)):
        if (key := _key(held_out[i], column)) in known:
            raise DataError(f'{held_out.place(i)}: "{column}" = {key[:60]} also stands among the training rows')
