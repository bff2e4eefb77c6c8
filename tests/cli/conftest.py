"""The pipeline as a user runs it: every shipped config, two steps, through ``main``, each on the last one's folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning  # noqa: F401  before any test captures stderr: its log handler keeps the stream it finds
import pytest
import tiny

from lit_rlhf.cli import main

SHORT = ["--model.sampling.max_new_tokens", "6"]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model (1,024 positions) and a small file for each kind of data."""
    folder = tmp_path_factory.mktemp("workspace")
    model = tiny.tiny_llama(max_position_embeddings=1024)
    model.save_pretrained(folder / "base")
    tiny.tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "sft.jsonl", [{"prompt": f"Q{i}:", "completion": f" answer {i}"} for i in range(24)])
    texts = [(f"Q{i}:", f" good {i}", f" bad {i}") for i in range(24)]
    write_rows(folder / "pref.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts])
    ranked = [{"prompt": f"Q{i}:", "responses": [" best", " good", " fair", " bad"][: 2 + i % 3]} for i in range(24)]
    write_rows(folder / "ranked.jsonl", ranked)
    write_rows(folder / "math.jsonl", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(24)])
    return folder


class Runner:
    """Runs ``main`` in the workspace, and puts directory, environment and warnings back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *args: str) -> None:
        here, environment = Path.cwd(), dict(os.environ)
        os.chdir(self.folder)
        try:
            with warnings.catch_warnings():
                main([str(arg) for arg in args])
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)

    def fit(self, config: str, data: str, *more: str) -> None:
        overlay = ["--config", "tiny.yaml", "--trainer.enable_progress_bar", "false"]
        self("fit", "--config", config, *overlay, "--data.train", data, *more)


@pytest.fixture(scope="session")
def cli(workspace: Path) -> Runner:
    return Runner(workspace)


@pytest.fixture(scope="session")
def sft_run(cli: Runner) -> Path:
    cli.fit("sft.yaml", "sft.jsonl", "--model.model", "base", *SHORT)
    return cli.folder / "runs" / "sft"


@pytest.fixture(scope="session")
def reward_run(cli: Runner, sft_run: Path) -> Path:
    cli.fit("reward.yaml", "pref.jsonl")
    return cli.folder / "runs" / "reward"


@pytest.fixture(scope="session")
def ranking_run(cli: Runner, sft_run: Path) -> Path:
    cli.fit("ranking.yaml", "ranked.jsonl")
    return cli.folder / "runs" / "ranking"


@pytest.fixture(scope="session")
def ppo_run(cli: Runner, reward_run: Path) -> Path:
    """PPO with the LoRA overlay on top."""
    cli.fit("ppo.yaml", "sft.jsonl", *SHORT, "--config", "lora.yaml")
    return cli.folder / "runs" / "ppo"


@pytest.fixture(scope="session")
def grpo_run(cli: Runner) -> Path:
    cli.fit("grpo.yaml", "math.jsonl", "--model.model", "base", *SHORT)
    return cli.folder / "runs" / "grpo"


@pytest.fixture
def refused(cli: Runner, capsys: pytest.CaptureFixture[str]) -> Iterator:
    """Run a command that must be refused; gives the lines it printed to the error stream."""

    def run(*args: str) -> list[str]:
        with pytest.raises(SystemExit) as stopped:
            cli(*args)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) <= 4, lines
        return lines

    return run
