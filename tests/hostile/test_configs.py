"""Configs and arguments through the command line: a few lines that say what is wrong, exit code 2, no traceback."""

from __future__ import annotations

import re
from pathlib import Path

import lightning  # noqa: F401  before any test captures stderr: its log handler keeps the stream it finds
import pytest
from hostile import door
from hostile.configs import SETTINGS, TEXTS, Setting, Text


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    door.make_workspace(folder)
    return folder


def check(found: door.Outcome, says: str) -> None:
    if isinstance(found.code, BaseException):
        raise AssertionError("a traceback") from found.code
    assert found.is_door, (found.code, found.said)
    assert re.search(says, found.said, re.DOTALL), found.said
    lines = found.said[found.said.index("error: ") :].strip().splitlines()
    assert len(lines) <= 5, found.said
    assert len(found.said) < 1500, found.said


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_a_wrong_config_file(case: Text, workspace: Path) -> None:
    path = workspace / "bad.yaml"
    if callable(case.text):
        case.text(path)
    else:
        path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    try:
        check(door.run(workspace, ["fit", "--config", "bad.yaml"]), case.says)
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert not (workspace / "ran").exists(), "the config ran something"


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: f"{case.stage} {case.args}")
def test_a_wrong_setting(case: Setting, workspace: Path) -> None:
    given = [f"--{one}" for one in case.args.split(" ")]
    if case.args.startswith("checkpoint."):
        given.append("--trainer.enable_checkpointing=true")
    check(door.run(workspace, ["fit", "--config", f"{case.stage}.yaml", *given]), case.says)
