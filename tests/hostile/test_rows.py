"""Every malformed row is an error with file, line and column, or is left out and counted; odd ones are read whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from hostile.rows import KINDS, ROWS, Row

from lit_rlhf.data import DataError, PromptData


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def line(case: Row) -> str:
    """The case's line of the file."""
    if isinstance(case.row, str):
        return case.row
    row = {**KINDS[case.kind][1], **case.row}
    return json.dumps({key: value for key, value in row.items() if key not in case.gone})


def loaded(case: Row, folder: Path, tokenizer: str):
    """The data module, set up with the case's file."""
    kind, good = KINDS[case.kind]
    path = folder / "rows.jsonl"
    path.write_text("\n".join([json.dumps(good), json.dumps(good), line(case)]) + "\n", encoding="utf-8")
    longest = "max_prompt_length" if kind is PromptData else "max_length"
    data = kind(str(path), tokenizer=tokenizer, val_fraction=0, max_dropped=0.99, **{longest: 64, **case.knobs})
    data.setup("fit")
    return data


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_a_malformed_row_is_named_or_counted(case: Row, tmp_path: Path, tokenizer_folder: str) -> None:
    if case.ends == "error":
        with pytest.raises(DataError) as caught:
            loaded(case, tmp_path, tokenizer_folder)
        said = str(caught.value)
        assert f"{tmp_path / 'rows.jsonl'}, line 3" in said
        assert case.says in said
        assert len(said) < 700
        return
    data = loaded(case, tmp_path, tokenizer_folder)
    assert len(data._train) == (3 if case.ends == "read" else 2), "a row was lost in silence"
    if case.ends == "dropped":
        ((why, count),) = data.dropped.items()
        assert (count, case.says in why) == (1, True)
    else:
        ids = data._train[2][0]
        assert data.tokenizer.decode(ids, skip_special_tokens=True).endswith(case.says[-60:])
