"""Every command and the Python example of the README run as they stand, the placeholders filled in."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`?(lit-rlhf [a-z]+[^`\n#]*)", README)))
FILLED = {
    "my/model/folder": "base",
    "my/stories.jsonl": "sft.jsonl",
    "my.module.judge": "lit_rlhf.rewards.LengthBounds --reward.max 20 --reward.unit characters",
    "--policy FOLDER": "--policy base",
    "--model FOLDER": "--model base",
    "--prompts FILE": "--prompts sft.jsonl",
    "--checkpoint FILE --folder FOLDER": "--checkpoint runs/sft/version_0/checkpoints/last.ckpt --folder exported",
    "runs/ppo/…/last.ckpt": "runs/ppo/version_0/checkpoints/last.ckpt",
}


def test_the_readme_names_its_commands() -> None:
    """So that the tests below do not pass over an empty list."""
    assert len(COMMANDS) >= 10
    assert {line.split()[1] for line in COMMANDS} >= {"demo", "fit", "generate", "pairs", "export", "validate"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if " fit " in line])
def test_a_fit_command_parses_and_shows_its_config(line: str, cli, capsys: pytest.CaptureFixture[str]) -> None:
    for written, filled in FILLED.items():
        line = line.replace(written, filled)
    config = [] if "--config" in line else ["--config", "ppo.yaml"]
    with pytest.raises(SystemExit) as stop:
        cli(*shlex.split(line)[1:], *config, "--print_config")
    assert stop.value.code in (0, None)
    assert "class_path: lit_rlhf" in capsys.readouterr().out


def test_the_fit_on_ones_own_files_runs(cli) -> None:
    (line,) = [line for line in COMMANDS if "my/stories.jsonl" in line]
    for written, filled in FILLED.items():
        line = line.replace(written, filled)
    short = ["--model.sampling.max_new_tokens", "6", "--trainer.default_root_dir", "readme"]
    cli(*shlex.split(line)[1:], "--trainer.enable_progress_bar", "false", *short)
    assert (cli.folder / "readme" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize("name", ["generate", "pairs", "best-of-n", "export"])
def test_the_other_commands_run(name: str, cli, sft_run: Path) -> None:
    (line,) = [line for line in COMMANDS if line.split()[1] == name]
    for written, filled in FILLED.items():
        line = line.replace(written, filled)
    length = {"generate": 6, "pairs": 24, "best-of-n": 6}
    more = ["--sampling.max_new_tokens", str(length[name])] if name in length else []
    cli(*shlex.split(line)[1:], *more)
    left = {"pairs": "pairs.jsonl", "best-of-n": "best.jsonl", "export": "exported/model.safetensors"}
    assert name not in left or (cli.folder / left[name]).is_file()


def test_make_knows_the_two_set_up_commands() -> None:
    for target in re.findall(r"^make (\w+)", README, re.M):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_python_example_runs(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = (
        code.replace("my/sft/folder", "base").replace("my/grpo/folder", "example").replace("prompts.jsonl", "sft.jsonl")
    )
    code = code.replace("max_steps=100", "max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False")
    code = code.replace("max_new_tokens=128", "max_new_tokens=6")
    monkeypatch.chdir(cli.folder)
    exec(compile(code, "README.md", "exec"), {})
    assert (cli.folder / "example" / "model.safetensors").is_file()
