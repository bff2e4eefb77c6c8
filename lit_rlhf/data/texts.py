"""Readers of text files of rows: an object of JSON a line, a list of them, or CSV; each row with its line."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

LONGEST_FIELD = 2**31 - 1  # of a CSV file, in characters; Python's own limit is 131,072
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # one of the two halves in which JSON may write a character


class DataError(ValueError):
    """What is wrong with a source or a row, where it stands, and what to do."""


def read_json(file: TextIO, path: Path) -> tuple[list[dict[str, Any]], list[int] | None]:
    """Objects a line, or one list of objects (then rows are counted, not lines)."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if first.lstrip().startswith("["):
        text = file.read()
        try:
            rows = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON that can be read: {error}") from error
        halves = HALF.search(text) is not None
        for number, row in enumerate(rows, start=1):
            _object(row, f"{path}, row {number}", halves)
        return rows, None
    numbered = list(_json_lines(file, path))
    return [row for _, row in numbered], [number for number, _ in numbered]


def _json_lines(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected one JSON object a line (or one list of them): "
                f"{getattr(error, 'msg', error)}"
            ) from error
        yield number, _object(row, f"{path}, line {number}", HALF.search(line) is not None)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose keys stands twice: of two values one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object; leave one of them')
    return found


def _object(row: Any, place: str, halves: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object with named columns, got {type(row).__name__}")
    for column, value in row.items() if halves else ():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(
                f"{place}, column {json.dumps(column)}: {half!r} is half a character (a lone surrogate), which is no "
                "text: remove it, or write the whole character"
            ) from None
    return row


def read_csv(file: TextIO, path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows under the header's names; every value stays text."""
    before = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(file, strict=True)  # else a quote that is never closed swallows the rest of the file
    rows, lines = [], []
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f'{path}, line 1: the header names the column "{twice[0]}" twice; rename one')
        for row in reader:
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise DataError(
                    f"{path}, line {reader.line_num}: has {more} fields than the header; quote fields that hold commas"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, after line {(lines or [1])[-1]}: {error}; is a quote not closed?") from error
    finally:
        csv.field_size_limit(before)
    return rows, lines


def not_utf8(path: Path, opened: Callable[..., Any], error: UnicodeDecodeError) -> DataError:
    """The error for a file that is not UTF-8: it names the line.

    Args:
        path: the file.
        opened: ``open`` or ``gzip.open``.
        error: that of reading it as text.
    """
    number = 1
    with contextlib.suppress(OSError, EOFError, zlib.error), opened(path, "rb") as file:  # it may be damaged, too
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError:
                break
            number += 1
    return DataError(f"{path}, line {number}: expected UTF-8 text ({error.reason}); save the file as UTF-8")
