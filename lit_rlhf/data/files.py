"""Readers of data files and folders: each gives rows as dicts and knows the line that every row stands on."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


class DataError(ValueError):
    """What is wrong with a source or a row, where it stands, and what to do."""


@dataclass(frozen=True)
class Rows:
    """Rows as dicts, and for each the place it comes from."""

    source: str
    columns: tuple[str, ...]
    items: Sequence[Any]  # list of dicts, or a datasets.Dataset
    place_of: Callable[[int], str]  # index into items → "file, line 3"
    index: Sequence[int]  # which items, in which order

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.items[int(self.index[i])]

    def place(self, i: int) -> str:
        """Where row ``i`` stands, for people: "pairs.jsonl, line 12"."""
        return self.place_of(int(self.index[i]))

    def pick(self, chosen: Iterable[int]) -> Rows:
        """The rows with these numbers, in this order."""
        return replace(self, index=[self.index[i] for i in chosen])


@dataclass(frozen=True)
class Part:
    """The rows of one file."""

    name: str
    items: Sequence[Any]
    lines: Sequence[int] | None  # the line of each row, where the file has lines
    columns: Sequence[str]


def join(source: str, parts: list[Part]) -> Rows:
    """Rows over several files, in the order of the files."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.items))
    items = parts[0].items if len(parts) == 1 else [row for part in parts for row in part.items]

    def place(i: int) -> str:
        which = bisect_right(starts, i) - 1
        part, within = parts[which], i - starts[which]
        return f"{part.name}, row {within + 1}" if part.lines is None else f"{part.name}, line {part.lines[within]}"

    columns = tuple(dict.fromkeys(column for part in parts for column in part.columns))
    return Rows(source, columns, items, place, range(len(items)))


def read_file(path: Path) -> Part:
    """Read one json, jsonl, csv (each also .gz) or parquet file."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: expected a name that ends with one of {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    try:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows, lines = _read_csv(file, path) if ".csv" in name else _read_json(file, path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return Part(str(path), rows, lines, list(dict.fromkeys(key for row in rows for key in row)))


def read_saved(path: Path, source: str, split: str) -> Rows:
    """Read a folder that ``datasets`` wrote with save_to_disk."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f'{path} has no split "{split}"; it has {", ".join(saved)}')
        saved = saved[split]
    return join(source, [Part(str(path), saved, None, saved.column_names)])


def read_hub(source: str, split: str) -> Rows:
    """Read a split of a hub data set; a configuration may follow the id after a colon."""
    import datasets

    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever the hub, the network or a builder raises: say it in one line
        raise DataError(
            f"{source} is neither a file or folder here ({Path.cwd()}) nor did the hub give such a data set with split "
            f'"{split}": '
            f"{type(error).__name__}: {error}"
        ) from error
    return join(source, [Part(f"{source} ({split})", data, None, data.column_names)])


def looks_like_path(source: str) -> bool:
    """Whether the user surely meant a file or folder and not a hub id."""
    starts = source.startswith(("/", "./", "../", "~")) or source in {".", ".."}
    return starts or "\\" in source or source.count("/") > 1 or source.lower().endswith(SUFFIXES)


def missing_path(path: Path) -> DataError:
    """The error for a path that is not there, with what stands near it."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    message = f"{path} does not exist (seen from {Path.cwd()})"
    if parent != path.absolute().parent:
        return DataError(f"{message}; of the folders it names, {parent} is the last that does")
    close = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.4)
    return DataError(message + (f"; did you mean {' or '.join(close)}?" if close else ""))


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a folder: those named after the split, or all of them if no name speaks of splits."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(f"{folder} holds no data file ({', '.join(SUFFIXES)}) and is no data set saved to disk")
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    named = [file for file in files if split.lower() in words[file]]
    if named or not any(words[file] & set(SPLITS) for file in files):
        return named or files
    raise DataError(f'{folder} has no file of split "{split}"; it holds {", ".join(f.name for f in files[:8])}')


def _read_json(file: TextIO, path: Path) -> tuple[list[dict[str, Any]], list[int] | None]:
    """Objects a line, or one list of objects (then rows are counted, not lines)."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if first.lstrip().startswith("["):
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        for number, row in enumerate(rows, start=1):
            _object(row, f"{path}, row {number}")
        return rows, None
    numbered = list(_json_lines(file, path))
    return [row for _, row in numbered], [number for number, _ in numbered]


def _json_lines(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: expected one JSON object a line (or one list of them): {error.msg}"
            ) from error
        yield number, _object(row, f"{path}, line {number}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object with named columns, got {type(row).__name__}")
    return row


def _read_csv(file: TextIO, path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows under the header's names; every value stays text."""
    reader = csv.DictReader(file)
    rows, lines = [], []
    for row in reader:
        if None in row:
            raise DataError(
                f"{path}, line {reader.line_num}: has more fields than the header; quote fields with commas"
            )
        rows.append(row)
        lines.append(reader.line_num)
    return rows, lines


def _read_parquet(path: Path) -> Part:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = datasets.Dataset(parquet.read_table(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return Part(str(path), table, None, table.column_names)
