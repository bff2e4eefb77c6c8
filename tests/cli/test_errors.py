"""What is said when a command line or a config is wrong: a few lines, the place, the nearest right key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_rlhf.commands.parser import problems


def overlay(folder: Path, text: str) -> str:
    path = folder / "overlay.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("config", "text", "place", "hint"),
    [
        ("ppo.yaml", "model: {init_args: {kl: {coeff: 1}}}", "model.kl.coeff is no option of lit_rlhf.PPO.kl", "coef"),
        (
            "ppo.yaml",
            "model: {init_args: {optim: {learning: 1}, network: {lora: {alfa: 1}}}}",
            "model.network.lora.alfa is no option of",
            "alpha",
        ),
        (
            "grpo.yaml",
            "model: {init_args: {rewards: [{class_path: lit_rlhf.rewards.LengthBounds, init_args: {maxi: 1}}]}}",
            "model.rewards.maxi is no option of lit_rlhf.rewards.LengthBounds",
            "max",
        ),
        ("sft.yaml", "data: {init_args: {trian: x}}", "data.trian is no option of lit_rlhf.SFTData", "train"),
        ("sft.yaml", "trainer: {max_stepz: 1}", "trainer.max_stepz is no option", "trainer.max_steps"),
        ("sft.yaml", "exports: {folder: x}", "exports.folder is no option", "export"),
        ("sft.yaml", "model: {class_path: lit_rlhf.SFTT}", "model: lit_rlhf has no SFTT", "SFT"),
    ],
)
def test_unknown_key_in_a_yaml(refused, tmp_path: Path, config: str, text: str, place: str, hint: str) -> None:
    lines = refused("fit", "--config", config, "--config", overlay(tmp_path, text))
    assert place in lines[0]
    assert lines[1].strip().startswith("did you mean")
    assert hint in lines[1].replace("?", "").split()


def test_unknown_key_on_the_command_line(refused) -> None:
    lines = refused("fit", "--config", "ppo.yaml", "--model.optim.lrr", "1")
    assert "model.optim.lrr is no option of lit_rlhf.PPO.optim" in lines[0]
    assert "did you mean lr?" in lines[1]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.updates.epochs", "many"], "model.updates.epochs: expected int, got many"),
        (["--model.value.lr", "fast"], "model.value.lr: expected float, got fast"),
        (["--model.network.dtype", "int3"], "model.network.dtype: expected one of 'float32'"),
        (["--trainer.max_steps", "1.5"], "trainer.max_steps: expected int, got 1.5"),
    ],
)
def test_wrong_type_or_value(refused, args: list[str], expected: str) -> None:
    assert expected in refused("fit", "--config", "ppo.yaml", *args)[0]


def test_value_that_a_stage_refuses(refused) -> None:
    own = ("--model.model", "base", "--data.train", "sft.jsonl")
    lines = refused("fit", "--config", "sft.yaml", *own, "--model.sampling.temperature", "-1")
    assert "sampling.temperature is -1.0" in lines[-1]


def test_missing_files(refused, cli, workspace: Path) -> None:
    lines = refused("fit", "--config", "stf.yaml")
    assert "no config" in lines[0]
    assert "did you mean sft.yaml" in lines[1]
    tiny = ("--config", "tiny.yaml", "--trainer.logger", "false")
    lines = refused("fit", "--config", "sft.yaml", *tiny, "--model.model", "./nowhere", "--data.train", "sft.jsonl")
    assert "./nowhere" in lines[-1]
    lines = refused("fit", "--config", "sft.yaml", *tiny, "--model.model", "base", "--data.train", "./none.jsonl")
    assert "none.jsonl" in lines[-1]
    lines = refused("export", "--checkpoint", "none.ckpt", "--folder", "out")
    assert "none.ckpt" in lines[0]
    lines = refused("generate", "--model", "./nowhere", "--prompt", "x")
    assert "./nowhere" in lines[0]


def test_forgotten_arguments(refused) -> None:
    assert set(refused("fit")[0].removeprefix("error: not given: ").split(", ")) == {"model", "data"}
    assert "not given: data.train" in refused("fit", "--model", "SFT", "--model.model", "m", "--data", "SFTData")[0]
    assert "either --prompt TEXT or --prompts FILE" in refused("generate", "--model", "base")[0]
    for name in ("pairs", "best-of-n"):
        assert "not given: reward, output" in refused(name, "--policy", "base", "--prompts", "x")[0]


def test_unknown_command_and_option(refused) -> None:
    assert "no command 'fitt'" in refused("fitt")[0]
    lines = refused("generate", "--model", "base", "--promt", "x")
    assert "promt is no option of lit-rlhf generate" in lines[0]
    assert "did you mean prompt" in lines[1]


def test_yaml_that_cannot_be_read_keeps_line_and_column(refused, tmp_path: Path) -> None:
    lines = refused("fit", "--config", overlay(tmp_path, "trainer: {a: 1\n"))
    assert "line 1, column 10" in lines[1]


def test_an_explanation_that_is_no_tree_is_kept_whole() -> None:
    assert [problem.text for problem in problems("something else is wrong")] == ["something else is wrong"]


def test_short_class_names_are_enough(cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli("fit", "--model", "SFT", "--model.model", "m", "--data", "SFTData", "--data.train", "x", "--print_config")
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "lit_rlhf.SFT"
