"""Rows from files, folders and saved sets; wrong paths, wrong files, wrong rows; splits."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

from lit_rlhf.data.files import DataError
from lit_rlhf.data.sources import Dropped, encode_rows, load_rows, load_split, split_rows

ROWS = [{"text": "été", "n": 1}, {"text": 'a, "b"\nc', "n": None}, {"text": "", "n": 3}]


def all_rows(rows) -> list[dict]:
    return [rows[i] for i in range(len(rows))]


def write(path: Path, rows=ROWS) -> str:
    """Write rows in the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with gzip.open(path, "wt") if path.name.endswith(".gz") else path.open("w") as file:
        if kind == "json":
            json.dump(rows, file)
        elif kind == "jsonl":
            file.write("\n".join(json.dumps(row) for row in rows))
        else:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.gz", "r.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = load_rows(write(tmp_path / name))
    assert all_rows(rows) == ROWS
    assert rows.columns == ("text", "n")


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_csv_values_stay_text(tmp_path, name):
    assert all_rows(load_rows(write(tmp_path / name)))[:2] == [
        {"text": "été", "n": "1"},
        {"text": 'a, "b"\nc', "n": ""},
    ]


def test_a_json_name_may_hold_lines_and_rows_may_differ_in_type_and_columns(tmp_path):
    (tmp_path / "r.json").write_text('{"a": 1}\n\n{"a": "x", "b": [{"c": 2}]}\n')
    rows = load_rows(str(tmp_path / "r.json"))
    assert all_rows(rows) == [{"a": 1}, {"a": "x", "b": [{"c": 2}]}]
    assert rows.columns == ("a", "b")
    assert rows.place(1).endswith("r.json, line 3")


def test_a_folder_is_read_by_split_or_whole(tmp_path):
    write(tmp_path / "named" / "train-0.jsonl", [{"a": 1}])
    write(tmp_path / "named" / "train-1.jsonl", [{"a": 2}])
    write(tmp_path / "named" / "test.jsonl", [{"a": 3}])
    write(tmp_path / "plain" / "x.jsonl", [{"a": 4}])
    write(tmp_path / "plain" / "y.csv", [{"a": 5}])
    assert [row["a"] for row in all_rows(load_rows(str(tmp_path / "named")))] == [1, 2]
    assert [row["a"] for row in all_rows(load_rows(str(tmp_path / "named"), "test"))] == [3]
    plain = load_rows(str(tmp_path / "plain"))
    assert [row["a"] for row in all_rows(plain)] == [4, "5"]
    assert [Path(plain.place(i)).name for i in range(2)] == ["x.jsonl, line 1", "y.csv, line 2"]
    with pytest.raises(DataError, match=r'no file of split "validation"; it holds test.jsonl, train-0.jsonl'):
        load_rows(str(tmp_path / "named"), "validation")


def test_sets_saved_to_disk_are_read_by_split(tmp_path):
    data = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    assert all_rows(load_rows(str(tmp_path / "one"))) == [{"a": 1}, {"a": 2}]
    assert all_rows(load_rows(str(tmp_path / "many"), "test")) == [{"a": 2}]
    with pytest.raises(DataError, match='no split "dev"; it has train, test'):
        load_rows(str(tmp_path / "many"), "dev")


def test_a_path_that_is_not_there_is_no_hub_error(tmp_path):
    write(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"does not exist .*did you mean pairs.jsonl\?"):
        load_rows(str(tmp_path / "pear.jsonl"))
    with pytest.raises(DataError, match="is the last that does"):
        load_rows(str(tmp_path / "no" / "folder" / "x"))
    with pytest.raises(DataError, match=r"my_data\.csv does not exist"):
        load_rows("my_data.csv")


def test_a_hub_id_that_cannot_be_had_says_both(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing is neither a file or folder here .* nor did the hub give"):
        load_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "line 2: expected one JSON object a line"),
        ("r.jsonl", b'{"a": 1}\n3\n', "line 2: expected a JSON object with named columns, got int"),
        ("r.json", b'[{"a": 1}, null]', "row 2: expected a JSON object with named columns, got NoneType"),
        ("r.json", b'[{"a": 1},\n {"a"]', "line 2: not JSON"),
        ("r.jsonl", b'{"a": "\xff"}\n', "line 1: expected UTF-8 text"),
        ("r.jsonl.gz", b'{"a": 1}\n', "cannot be read"),
        ("r.parquet", b"none", "cannot be read"),
        ("r.csv", b"a,b\n1,2\n1,2,3\n", "line 3: has more fields than the header"),
        ("r.txt", b"a", "expected a name that ends with"),
        ("r.jsonl", b"\n\n", "has no rows"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=error) as caught:
        load_rows(str(tmp_path / name))
    assert name in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        load_rows(str(tmp_path))


def test_a_fraction_is_held_out_by_seed(tmp_path):
    rows = load_rows(write(tmp_path / "r.jsonl", [{"i": i} for i in range(50)]))
    parts = [
        tuple([row["i"] for row in all_rows(side)] for side in split_rows(rows, fraction=0.2, seed=s))
        for s in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]
    train, val = parts[0]
    assert len(val) == 10
    assert sorted(train + val) == list(range(50))
    assert rows.place(3).endswith("line 4")
    assert split_rows(rows, fraction=0.2)[1].place(0).endswith(f"line {val[0] + 1}")


def test_split_by_keeps_the_rows_of_one_key_together(tmp_path):
    rows = load_rows(write(tmp_path / "r.jsonl", [{"user": {"id": i % 7}, "i": i} for i in range(70)]))
    train, val = split_rows(rows, fraction=0.25, split_by="user", seed=3)
    sides = [{row["user"]["id"] for row in all_rows(side)} for side in (train, val)]
    assert not sides[0] & sides[1]
    assert len(train) + len(val) == 70
    assert len(val) == 20


def test_split_by_needs_two_keys_and_its_column(tmp_path):
    rows = load_rows(write(tmp_path / "r.jsonl", [{"user_id": 1}] * 5))
    with pytest.raises(DataError, match='2 different values of "user_id", found 1'):
        split_rows(rows, fraction=0.5, split_by="user_id")
    with pytest.raises(DataError, match=r'no column "userid"; did you mean user_id\? It has: user_id'):
        split_rows(rows, fraction=0.5, split_by="userid")
    with pytest.raises(DataError, match="val_fraction must lie between 0 and 1"):
        split_rows(rows, fraction=1.5)


def test_a_named_validation_file_may_not_share_keys(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"user": 1}, {"user": 2}])
    val = write(tmp_path / "b.jsonl", [{"user": 3}, {"user": 2}])
    knobs = {"split": "train", "val_split": None, "val_fraction": 0.05, "seed": 0}
    with pytest.raises(DataError, match=r'b.jsonl, line 2: "user" = 2 also stands among the training rows'):
        load_split(train, val, split_by="user", **knobs)
    rows, held_out = load_split(train, val, split_by=None, **knobs)
    assert (len(rows), len(held_out)) == (2, 2)


def test_limits_and_no_validation(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"i": i} for i in range(40)])
    knobs = {"split": "train", "val_split": None, "split_by": None, "seed": 0}
    train, val = load_split(source, None, val_fraction=0.5, limit=7, val_limit=3, **knobs)
    assert (len(train), len(val)) == (7, 3)
    train, val = load_split(source, None, val_fraction=0, **knobs)
    assert (len(train), val) == (40, None)


def test_val_split_takes_another_split_of_the_same_source(tmp_path):
    write(tmp_path / "train.jsonl", [{"a": 1}])
    write(tmp_path / "test.jsonl", [{"a": 2}])
    knobs = {"split": "train", "val_fraction": 0.05, "split_by": None, "seed": 0}
    _, val = load_split(str(tmp_path), None, val_split="test", **knobs)
    assert all_rows(val) == [{"a": 2}]


def test_dropped_rows_are_counted_by_reason_and_bounded(tmp_path):
    rows = load_rows(write(tmp_path / "r.jsonl", [{"i": i} for i in range(10)]))

    def encode(row: dict) -> int:
        if row["i"] % 5 == 0:
            raise Dropped("by fives")
        return row["i"]

    records, kept, dropped = encode_rows(rows, encode, max_dropped=0.2)
    assert (records, kept, dropped) == ([1, 2, 3, 4, 6, 7, 8, 9],) * 2 + ({"by fives": 2},)
    with pytest.raises(DataError, match=r"2 of 10 rows would be dropped \(2 by fives\), more than max_dropped=0.1"):
        encode_rows(rows, encode, max_dropped=0.1)
    with pytest.raises(DataError, match="no row is left"):
        encode_rows(rows.pick([0]), encode, max_dropped=1.0)


def test_a_wrong_row_is_named_with_its_place(tmp_path):
    rows = load_rows(write(tmp_path / "r.jsonl", [{"i": i} for i in range(10)]))
    with pytest.raises(DataError, match=r"r.jsonl, line 6: invalid literal"):
        encode_rows(rows.pick([1, 5]), lambda row: int("x" if row["i"] == 5 else 1), max_dropped=0)
