"""Model folders: an error that names them, before anything is trained; nothing in them is run."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from hostile.folders import FOLDERS, Folder

from lit_rlhf.models import Lora, Network, load_causal, load_scalar, load_tokenizer


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.name)
def test_a_model_folder_that_cannot_be_loaded_is_named(
    case: Folder, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    case.spoil(folder)
    network = Network(lora=Lora(targets=["nope"], **case.knobs)) if case.knobs else Network()
    load = {
        "tokenizer": load_tokenizer,
        "policy": partial(load_causal, network=network),
        "reward": partial(load_scalar, network=network),
    }
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load[case.loads](str(folder))
    said = str(caught.value)
    assert re.search(case.says, said, re.DOTALL), said
    assert case.knobs or str(folder) in said
    assert len(said) < 700
    assert not (tmp_path / "ran").exists(), "code of the folder was run"
