"""Readers of data files and folders: each gives rows as dicts and knows the line that every row stands on."""

from __future__ import annotations

import difflib
import gzip
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_rlhf.data.texts import DataError, not_utf8, read_csv, read_json

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


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
        number = int(self.index[i])
        try:
            return self.items[number]
        except Exception as error:  # a column file decodes its rows when they are asked for
            raise DataError(f"{self.place(i)}: the row cannot be read: {type(error).__name__}: {error}") from error

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
            rows, lines = read_csv(file, path) if ".csv" in name else read_json(file, path)
    except UnicodeDecodeError as error:
        raise not_utf8(path, opened, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; is the file complete?") from error
    return Part(str(path), rows, lines, list(dict.fromkeys(key for row in rows for key in row)))


def read_saved(path: Path, source: str, split: str) -> Rows:
    """Read a folder that ``datasets`` wrote with save_to_disk."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever it raises over files that are damaged, missing or of another kind
        raise DataError(
            f"{path} cannot be read as a data set that was saved to disk: {type(error).__name__}: {error}"
        ) from error
    name = str(path)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f'{path} has no split "{split}"; it has {", ".join(saved)}')
        name, saved = f"{path} ({split})", saved[split]
    return join(source, [Part(name, saved, None, saved.column_names)])


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
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder (a device, a pipe): name one of them")
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


def _read_parquet(path: Path) -> Part:
    import datasets
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        table = datasets.Dataset(parquet.read_table(path))
    except Exception as error:  # whatever the two raise over a file that is damaged or of another kind
        raise DataError(f"{path} cannot be read as Parquet: {type(error).__name__}: {error}") from error
    return Part(str(path), table, None, table.column_names)
