"""The door as a shell sees it: processes of their own, and what of an error reaches the user."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import lightning  # noqa: F401  before any test captures stderr: its log handler keeps the stream it finds
import pytest
from faults import runs
from hostile import door

from lit_rlhf.stages import SFT

USER = {
    "a key": (["--model.lrr=1"], "model.lrr is no option"),
    "a row": (["--data.train=bad.jsonl"], 'bad.jsonl, line 2: column "completion": expected text'),
    "a model": (["--model.model=empty"], "empty has no tokenizer"),
    "a batch": (["--data.train=new.jsonl", "--data.tokenizer=other", "--model.tokenizer=other"], "token id 26"),
    "a command": (["--config", "run.yaml"], "no tag makes or runs anything"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    folder = tmp_path_factory.mktemp("workspace")
    door.make_workspace(folder)
    good = '{"prompt": "Q:", "completion": " A"}\n'
    (folder / "bad.jsonl").write_text(good + '{"prompt": "Q:", "completion": 5}\n' + good * 4, encoding="utf-8")
    (folder / "new.jsonl").write_text('{"prompt": "Q:", "completion": "<x3>"}\n' * 4, encoding="utf-8")
    (folder / "run.yaml").write_text("model: !!python/object/apply:os.system ['touch ran']\n", encoding="utf-8")
    (folder / "empty").mkdir()
    other = tiny.tiny_tokenizer()
    other.add_tokens([f"<x{i}>" for i in range(4)])
    other.save_pretrained(folder / "other")
    return folder


def test_a_shell_sees_one_message_and_a_code(workspace: Path) -> None:
    """One process from its very start, as the installed script starts it."""
    command = [sys.executable, "-m", "lit_rlhf.cli", "fit", "--config", "sft.yaml", "--data.train=bad.jsonl"]
    root = Path(door.__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    ended = subprocess.run(
        command, cwd=workspace, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert USER["a row"][1] in ended.stderr


@pytest.mark.parametrize("name", USER)
def test_a_process_ends_with_code_2_and_no_traceback(name: str, workspace: Path, tmp_path: Path) -> None:
    args, says = USER[name]
    process = runs.Run(Forked(workspace), ["fit", "--config", "sft.yaml", *args], tmp_path / "log")
    assert process.wait(60) == 2
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert says in said
    assert not (workspace / "ran").exists()


class Forked:
    """Starts processes from the server of ``runs``, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def Process(self, target, args):  # noqa: N802 - that of multiprocessing
        return runs.server().Process(target=_in_folder, args=(str(self.folder), target, args))


def _in_folder(folder: str, target, args) -> None:
    os.chdir(folder)
    multiprocessing.current_process().name = "lit-rlhf"
    target(*args)


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug"), RuntimeError("a bug"), TypeError("a bug")])
def test_a_bug_keeps_its_traceback(error: Exception, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise error

    monkeypatch.setattr(SFT, "training_step", broken)
    assert door.run(workspace, ["fit", "--config", "sft.yaml"]).code is error


@pytest.mark.parametrize("stage", runs.STAGES)
def test_the_good_config_runs(stage: str, workspace: Path) -> None:
    """What the tables change works when it is left alone."""
    found = door.run(workspace, ["fit", "--config", f"{stage}.yaml"])
    assert found.code == 0, found


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--model", "base", "--prompt", "x", "--samples", "0"], "samples"),
        (["generate", "--model", "base", "--prompt", ""], "prompt"),
        (["generate", "--model", "base", "--prompts", "bad.jsonl", "--prompt_column", "q"], 'no column "q"'),
        (["generate", "--model", "base", "--prompt", "x", "--output", "base/config.json/x"], "config.json"),
        (["generate", "--model", "base", "--prompt", "x", "--device", "gpu9"], "device"),
        (["export", "--checkpoint", "sft.jsonl", "--folder", "out"], "no checkpoint that torch.save wrote"),
        (["export", "--checkpoint", "base", "--folder", "out"], "is a folder"),
        (["configs", "--verbose"], "no option|nrecognized"),
        (["fit", "--config"], "expected"),
    ],
)
def test_the_short_commands(args: list[str], says: str, workspace: Path) -> None:
    found = door.run(workspace, args)
    assert found.is_door, found
    assert any(word in found.said for word in says.split("|")), found.said
