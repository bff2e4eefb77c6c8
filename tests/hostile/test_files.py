"""Files and folders of rows: an error that names them, or all of their rows."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny
from hostile.files import FILES, JSONL, File

from lit_rlhf.data import DataError, SFTData


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_file_that_cannot_be_read_is_named(case: File, tmp_path: Path, tokenizer_folder: str) -> None:
    source = case.source.removeprefix("=") if case.source.startswith("=") else str(tmp_path / case.source)
    if callable(case.write):
        case.write(Path(source))
    elif not case.source.startswith("=") and "a/b" not in case.source:
        Path(source).write_bytes(case.write)
    data = SFTData(source, tokenizer=tokenizer_folder, val_fraction=0)
    if case.ends == "read":
        data.setup("fit")
        assert [data.tokenizer.decode(ids) for ids, _ in data._train] == ["Q: A é</s>"] * 3
        return
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    said = str(caught.value)
    assert re.search(case.says, said, re.DOTALL), said
    assert source.removeprefix("./")[:40] in said
    assert len(said) < 900


def test_a_file_without_permission(tokenizer_folder: str) -> None:
    """As somebody who is not root, who may read everything."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder, me = Path(name), os.geteuid()
        folder.chmod(0o755)
        tokenizer = shutil.copytree(tokenizer_folder, folder / "tokenizer")
        for one in (tokenizer, *tokenizer.rglob("*")):
            one.chmod(0o755)
        path = folder / "rows.jsonl"
        path.write_text(JSONL, encoding="utf-8")
        path.chmod(0)
        data = SFTData(str(path), tokenizer=str(tokenizer))
        os.seteuid(65534 if me == 0 else me)
        try:
            with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: .*Permission denied"):
                data.setup("fit")
        finally:
            os.seteuid(me)


def test_a_held_out_split_of_a_file_that_has_none(tmp_path: Path, tokenizer_folder: str) -> None:
    """A file gives the same rows whatever split is asked for: validating on them would say nothing."""
    (tmp_path / "rows.jsonl").write_text(JSONL, encoding="utf-8")
    data = SFTData(str(tmp_path / "rows.jsonl"), val_split="test", tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match='has no split "test" of its own; name val, or set val_fraction'):
        data.setup("fit")
