"""Files and folders of rows that cannot be read, or only look as if they could not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

ROW = {"prompt": "Q:", "completion": " A é"}
JSONL = (json.dumps(ROW, ensure_ascii=False) + "\n") * 3
CSV = "prompt,completion\n" + "Q:, A é\n" * 3
LIST = json.dumps([ROW] * 3)


@dataclass(frozen=True)
class File:
    """One case.

    Args:
        name: what is wrong.
        source: what ``train`` is set to; the file's or folder's name in a folder of its own, or as it stands with "=".
        write: makes it: bytes of the file, or a function of its path.
        says: what the error names beside the source; of one that is right, nothing.
        ends: "error" or "read" (three rows).
    """

    name: str
    source: str
    write: bytes | Callable[[Path], object]
    says: str
    ends: str = "error"


def parquet(path: Path, rows: list | None = None) -> Path:
    datasets.Dataset.from_list([ROW] * 3 if rows is None else rows).to_parquet(str(path))
    return path


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def saved(path: Path) -> Path:
    datasets.Dataset.from_list([ROW] * 3).save_to_disk(str(path))
    return path


def broken(path: Path, glob: str, content: bytes | None) -> None:
    """A saved data set, one of whose files has another content or is not there."""
    (file,) = saved(path).glob(glob)
    file.write_bytes(content) if content is not None else file.unlink()


def folder(path: Path, **files: str) -> None:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text, encoding="utf-8")


def other_bytes(path: Path) -> None:
    """A Parquet file whose texts are bytes that are no UTF-8."""
    import pyarrow
    from pyarrow import parquet as files

    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    files.write_table(pyarrow.table({"prompt": bad, "completion": bad}), path)


ZIPPED = gzip.compress(JSONL.encode() * 200)
FILES = [
    File(
        "not there, a name near it", "rows.jsonk", lambda p: p.with_name("rows.jsonl").touch(), "did you mean rows.jso"
    ),
    File("not there, nor its folder", "a/b/rows.jsonl", b"", "is the last that does"),
    File("no path at all", "=", b"", "expected a file, a folder or a hub id, got ''"),
    File("blank path", "= ", b"", "expected a file, a folder or a hub id, got ' '"),
    File("NUL in the path", "=./a\0b.jsonl", b"", "does not exist|cannot be a path"),
    File("path of 5,000 letters", "=./" + "a" * 5_000, b"", "cannot be a path: .*too long"),
    File("home of nobody", "=~nobody_of_that_name/rows.jsonl", b"", "cannot be a path|does not exist"),
    File("neither path nor hub id", "=no such data set!", b"", "is neither a file or folder here .* nor did the hub"),
    File("broken link", "rows.jsonl", lambda p: p.symlink_to(p.parent / "gone.jsonl"), "does not exist"),
    File("link to itself", "rows.jsonl", lambda p: p.symlink_to(p), "does not exist|cannot be a path"),
    File("a device", "=/dev/null", b"", "neither a file nor a folder"),
    File("a folder named like a file", "rows.jsonl", lambda p: p.mkdir(), "holds no data file"),
    File("empty folder", "rows", lambda p: p.mkdir(), "holds no data file"),
    File("folder of other files", "rows", lambda p: folder(p, a_txt="x", b_py="y"), "holds no data file"),
    File("folder without the split", "rows", lambda p: folder(p, test_jsonl=JSONL), 'has no file of split "train"'),
    File(
        "folder with a bad file", "rows", lambda p: folder(p, a_jsonl=JSONL, b_jsonl="{"), "b.jsonl, line 1: expected"
    ),
    File(
        "folder of two columns' kinds", "rows", lambda p: folder(p, a_jsonl=JSONL, b_jsonl='{"x": 1}'), "b.jsonl, line"
    ),
    File("empty file", "rows.jsonl", b"", "has no rows"),
    File("blank lines alone", "rows.jsonl", b"\n \r\n\n", "has no rows"),
    File("empty list", "rows.json", b"[]", "has no rows"),
    File("empty csv", "rows.csv", b"", "has no rows"),
    File("csv of a header alone", "rows.csv", b"prompt,completion\n", "has no rows"),
    File("empty parquet", "rows.parquet", b"", "cannot be read as Parquet"),
    File("parquet without rows", "rows.parquet", lambda p: parquet(p, [ROW][:0]), "has no rows|cannot be read"),
    File("no suffix", "rows", JSONL.encode(), "expected a name that ends with one of .jsonl"),
    File("another suffix", "rows.arrow", JSONL.encode(), "expected a name that ends with one of .jsonl"),
    File("jsonl called csv", "rows.csv", JSONL.encode(), "has none of the columns|fields than the header|line 1"),
    File("jsonl called parquet", "rows.parquet", JSONL.encode(), "cannot be read as Parquet"),
    File("jsonl called gz", "rows.jsonl.gz", JSONL.encode(), "cannot be read: Not a gzipped file"),
    File("csv called jsonl", "rows.jsonl", CSV.encode(), "line 1: expected one JSON object a line"),
    File(
        "parquet called jsonl", "rows.jsonl", lambda p: parquet(p.with_suffix(".parquet")).rename(p), "line 1: expected"
    ),
    File("zip called gz", "rows.jsonl.gz", b"PK\3\4" + JSONL.encode(), "cannot be read: Not a gzipped file"),
    File("jsonl cut within a line", "rows.jsonl", JSONL.encode()[:-9], "line 3: expected one JSON object a line"),
    File(
        "jsonl cut within a letter", "rows.jsonl", JSONL.encode()[: JSONL.encode().rindex(b"\xc3") + 1], "line 3: exp"
    ),
    File("list cut short", "rows.json", LIST.encode()[:-9], "line 1: not JSON"),
    File("list with text behind", "rows.json", LIST.encode() + b"]", "line 1: not JSON: Extra data"),
    File(
        "list of other things", "rows.json", b'[{"prompt": "a", "completion": "b"}, 5]', "row 2: expected a JSON object"
    ),
    File("list nested 100,000 times", "rows.json", b"[" * 100_000, "not JSON"),
    File("columns of lists", "rows.json", b'{"prompt": ["a"], "completion": ["b"]}', 'line 1: column "prompt"'),
    File(
        "object over several lines", "rows.json", json.dumps(ROW, indent=1).encode(), "line 1: expected one JSON object"
    ),
    File("gz cut short", "rows.jsonl.gz", ZIPPED[:-20], "cannot be read: .*is the file complete"),
    File("gz with flipped bytes", "rows.jsonl.gz", ZIPPED[:20] + b"\0\xff" * 9 + ZIPPED[38:], "cannot be read|line"),
    File("gz with a wrong checksum", "rows.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, "cannot be read: CRC check failed"),
    File(
        "csv cut within quotes", "rows.csv", CSV.encode() + b'"a, b', "after line 4: unexpected end of data; is a quote"
    ),
    File("csv with too many fields", "rows.csv", CSV.encode() + b"a,b,c\n", "line 5: has more fields than the header"),
    File("csv with too few fields", "rows.csv", CSV.encode() + b"a\n", "line 5: has fewer fields than the header"),
    File("csv with semicolons", "rows.csv", CSV.replace(",", ";").encode(), "has none of the columns looked for"),
    File("csv with a column twice", "rows.csv", b"prompt,completion,prompt\na,b,c\n", 'the column "prompt" twice'),
    File("csv without a header", "rows.csv", b"Q:,A\nQ:,A\n", "has none of the columns looked for"),
    File("parquet cut short", "rows.parquet", lambda p: cut(parquet(p)), "cannot be read as Parquet"),
    File(
        "parquet cut to its magic word", "rows.parquet", lambda p: cut(parquet(p), 0.002), "cannot be read as Parquet"
    ),
    File(
        "parquet of numbers",
        "rows.parquet",
        lambda p: parquet(p, [{"prompt": 1, "completion": 2}]),
        'row 1: column "prompt": expected text or a list of messages, got int',
    ),
    File("parquet of broken UTF-8", "rows.parquet", other_bytes, "row 1: the row cannot be read: UnicodeDecodeError"),
    File(
        "parquet of bytes",
        "rows.parquet",
        lambda p: parquet(p, [{"prompt": b"a", "completion": b"b"}]),
        'row 1: column "prompt": expected text or a list of messages, got bytes',
    ),
    File(
        "parquet with a null",
        "rows.parquet",
        lambda p: parquet(p, [ROW, {**ROW, "completion": None}]),
        'row 2: column "completion": expected text or a list of messages, got nothing',
    ),
    File("arrow cut short", "rows", lambda p: broken(p, "*.arrow", b"\0" * 99), "cannot be read as a data set|no rows"),
    File(
        "arrow not there", "rows", lambda p: broken(p, "*.arrow", None), "cannot be read as a data set that was saved"
    ),
    File("state.json not there", "rows", lambda p: broken(p, "state.json", None), "cannot be read as a data set"),
    File("state.json cut short", "rows", lambda p: broken(p, "state.json", b"{"), "cannot be read as a data set that"),
    File(
        "dataset_info.json cut short",
        "rows",
        lambda p: broken(p, "dataset_info.json", b"{"),
        "cannot be read as a data",
    ),
    File(
        "dataset_info.json a list", "rows", lambda p: broken(p, "dataset_info.json", b"[]"), "cannot be read as a data"
    ),
    File("UTF-16", "rows.jsonl", JSONL.encode("utf-16"), "line 1: expected UTF-8 text .*save the file as UTF-8"),
    File("UTF-16 without its mark", "rows.jsonl", JSONL.encode("utf-16-le"), "line 1: expected"),
    File("Latin-1", "rows.jsonl", JSONL.encode("latin-1"), "line 1: expected UTF-8 text"),
    File("Latin-1 csv", "rows.csv", CSV.encode("latin-1"), "line 2: expected UTF-8 text"),
    File("bytes at random", "rows.jsonl", bytes(range(256)) * 9, "line 1: expected|line 2: expected"),
    File("NULs alone", "rows.jsonl", b"\0" * 4096, "line 1: expected one JSON object a line"),
    File(
        "one line of 150,000 letters",
        "rows.jsonl",
        b'{"prompt": "' + b"x" * 150_000 + b'", "completion": "a"}',
        "line 1: 15000",
    ),
    File(
        "one field of 150,000 letters", "rows.csv", b"prompt,completion\n" + b"x" * 150_000 + b",a\n", "line 2: 15000"
    ),
    File("mark of byte order", "rows.jsonl", b"\xef\xbb\xbf" + JSONL.encode(), "", ends="read"),
    File("mark of byte order, csv", "rows.csv", b"\xef\xbb\xbf" + CSV.encode(), "", ends="read"),
    File("CRLF", "rows.jsonl", JSONL.replace("\n", "\r\n").encode(), "", ends="read"),
    File("CRLF, csv", "rows.csv", CSV.replace("\n", "\r\n").encode(), "", ends="read"),
    File("no line break at the end", "rows.jsonl", JSONL.rstrip().encode(), "", ends="read"),
    File("blank lines between", "rows.jsonl", JSONL.replace("\n", "\n\n\n").encode(), "", ends="read"),
    File("capital suffix", "ROWS.JSONL", JSONL.encode(), "", ends="read"),
    File("other files beside", "rows", lambda p: folder(p, a_jsonl=JSONL, README_md="x"), "", ends="read"),
]
