"""The commands of docs/algorithms.md name configs, options and classes that there are."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from lit_rlhf.cli import command

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
COMMANDS = [line.strip() for line in BLOCKS.splitlines() if line.strip().startswith("lit-rlhf")]


def test_the_page_has_its_commands() -> None:
    assert sorted(line.split()[1] for line in COMMANDS) == ["best-of-n", "fit", "fit", "fit", "pairs", "test"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[1] in ("fit", "test")])
def test_a_training_command_parses(line: str, cli, capsys: pytest.CaptureFixture[str]) -> None:
    (round2,) = re.findall(r"`round2.yaml` names the judge: `(.+?)`", TEXT)
    (cli.folder / "round2.yaml").write_text(round2, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli(*shlex.split(line)[1:], "--print_config")
    assert stop.value.code in (0, None)
    assert "class_path: lit_rlhf" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[1] not in ("fit", "test")])
def test_the_options_of_another_command_exist(line: str) -> None:
    options = inspect.signature(command(line.split()[1])).parameters
    assert {name.split(".")[0] for name in re.findall(r" --([\w.]+)", line)} <= set(options)
