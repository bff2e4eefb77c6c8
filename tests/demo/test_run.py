"""The whole demo, shrunk to a few steps of everything: it runs, writes what it promises and tells the truth."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf import cli
from lit_rlhf.demo.picture import read_curves
from lit_rlhf.demo.run import main


@dataclass
class Ran:
    folder: Path
    code: int
    said: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, said = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(str(folder), seed=0, fast=True)
    return Ran(folder, code, said.getvalue())


def test_it_writes_everything(ran: Ran) -> None:
    files = {str(path.relative_to(ran.folder)) for path in ran.folder.rglob("*") if path.is_file()}
    assert {"results.md", "results.json", "curves.png"} <= files
    assert {f"data/{name}.jsonl" for name in ("stories", "pair_prompts", "pairs", "prompts", "held_out")} <= files
    assert {f"logs/{name}/metrics.csv" for name in ("sft", "reward", "ppo", "grpo")} <= files
    assert not [name for name in files if name.endswith(".ckpt")]


def test_held_out_prompts_are_held_out(ran: Ran) -> None:
    def prompts(name: str) -> set[str]:
        lines = (ran.folder / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["prompt"] for line in lines}

    held_out = prompts("held_out")
    assert len(held_out) == 16
    assert not held_out & (prompts("stories") | prompts("pair_prompts") | prompts("prompts"))


def test_the_folders_are_models_of_their_kind(ran: Ran) -> None:
    for name in ("base", "sft", "ppo", "grpo"):
        AutoModelForCausalLM.from_pretrained(ran.folder / name)
    reward = AutoModelForSequenceClassification.from_pretrained(ran.folder / "reward")
    assert reward.config.num_labels == 1
    assert reward.config.reward_std > 0
    vocabularies = [AutoTokenizer.from_pretrained(ran.folder / name).get_vocab() for name in ("base", "reward", "ppo")]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_the_exit_code_is_what_was_measured(ran: Ran) -> None:
    results = json.loads((ran.folder / "results.json").read_text(encoding="utf-8"))
    sft, ppo, grpo = results["policies"]
    assert [policy["name"] for policy in (sft, ppo, grpo)] == ["SFT", "PPO", "GRPO"]
    assert all(len(policy[key]) == 16 for policy in (sft, ppo, grpo) for key in policy if key != "name")
    assert max(map(abs, sft["kl"])) < 1e-4
    assert sum(map(abs, ppo["kl"])) > 1e-3
    assert sum(map(abs, grpo["kl"])) > 1e-3
    assert ran.code == (0 if results["passed"] else 1)
    assert ran.said.count("PASSED ") + ran.said.count("FAILED ") == 2
    assert results["passed"] == ("FAILED " not in ran.said)


def test_it_prints_table_texts_and_a_next_command_that_works(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert "| policy | gold score" in ran.said
    assert ran.said.count("Tell a story about") >= 4
    assert all(ran.said.count(f"  {name}:") >= 4 for name in ("SFT", "PPO", "GRPO"))
    (command,) = [line.removeprefix("Next: ") for line in ran.said.splitlines() if line.startswith("Next: ")]
    program, *arguments = shlex.split(command)
    assert program == "lit-rlhf"
    cli.main(arguments)
    assert len(capsys.readouterr().out.split()) > 10


def test_curves_hold_a_point_a_rollout(ran: Ran) -> None:
    for name in ("ppo", "grpo"):
        curves = read_curves(ran.folder / f"logs/{name}/metrics.csv")
        assert len(curves["step"]) == 3
        assert curves["kl"][0] == pytest.approx(0, abs=1e-4)
        assert curves["kl"][-1] != pytest.approx(0, abs=1e-4)
