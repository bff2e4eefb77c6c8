"""Configs stack without loss, runs log where they should, and on resume the config wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_rlhf.callbacks import SafeWandbLogger
from lit_rlhf.commands.train import CLI, loggers
from lit_rlhf.models.deferred import _DEFERS


def test_stacked_configs_lose_no_callback(cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stop.yaml"
    path.write_text("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}")
    with pytest.raises(SystemExit):
        cli("fit", "--config", "sft.yaml", "--config", "wandb.yaml", "--config", str(path), "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["checkpoint"]["save_last"] == "link"
    assert config["export"]["folder"] == "runs/sft/model"
    assert config["samples"]["rows"] == 16
    assert config["progress"]["refresh_rate"] == 1
    assert [one["class_path"].split(".")[-1] for one in config["trainer"]["callbacks"]] == ["EarlyStopping"]
    assert config["trainer"]["logger"]["init_args"]["project"] == "lit-rlhf"
    assert (config["trainer"]["log_every_n_steps"], config["trainer"]["inference_mode"]) == (1, False)


def test_own_callbacks_and_wandb_beside_the_sections(cli, sft_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with W&B (offline) and a callback of the user's keeps CSV log, config, samples, checkpoint and export."""
    root = cli.folder / "runs" / "both"
    cli.fit(
        "sft.yaml",
        "sft.jsonl",
        *("--config", "wandb.yaml", "--model.model", "base", "--model.sampling.max_new_tokens", "4"),
        *("--trainer.default_root_dir", str(root), "--trainer.callbacks+=LearningRateMonitor"),
        *("--export.folder", "null"),
    )
    run = root / "version_0"
    names = {path.name for path in run.iterdir()}
    assert names == {"metrics.csv", "hparams.yaml", "config.yaml", "samples.jsonl", "checkpoints", "export"}
    assert "lr-AdamW" in (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    offline = list((cli.folder / "runs" / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    (table,) = offline[0].glob("files/media/table/samples_*.table.json")
    shown = json.loads(table.read_text(encoding="utf-8"))
    assert shown["columns"] == ["step", "mode", "score", "prompt", "completion"]
    assert len(shown["data"]) == len((run / "samples.jsonl").read_text(encoding="utf-8").splitlines())


def test_csv_log_comes_first_and_only_false_turns_it_off() -> None:
    other = WandbLogger(offline=True)
    own = CSVLogger("elsewhere")
    assert [type(one) for one in loggers(None, "runs")] == [CSVLogger]
    assert [type(one) for one in loggers(other, "runs")] == [CSVLogger, SafeWandbLogger]
    first, second = loggers([other, own], "runs")
    assert first is own
    assert vars(second)["_wandb_init"] is vars(other)["_wandb_init"]
    assert loggers(False, "runs") is False


def saved_optimizer(folder: Path) -> tuple[dict, dict, dict]:
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return saved["optimizer_states"][0]["param_groups"][0], saved["lr_schedulers"][0], saved["hyper_parameters"]


def plain(root: Path, steps: int, *more: str) -> list[str]:
    return [
        *("--model.model", "base", "--model.sample_prompts", "0", "--export.folder", str(root / "model")),
        *("--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(root), *more),
    ]


def test_on_resume_the_config_wins(cli, sft_run: Path) -> None:
    """The checkpoint was made with lr 3e-6 on a cosine; a new lr and a new ε take its place on the schedule."""
    root, last = cli.folder / "runs" / "faster", sft_run / "version_0" / "checkpoints" / "last.ckpt"
    new = ("--model.optim.lr", "5e-3", "--model.optim.eps", "1e-4", "--ckpt_path", str(last))
    cli.fit("sft.yaml", "sft.jsonl", *plain(root, 3, *new))
    before, _, _ = saved_optimizer(sft_run / "version_0")
    assert (before["initial_lr"], before["eps"]) == (3.0e-6, 1.0e-5)
    group, schedule, settings = saved_optimizer(root / "version_0")
    assert (group["initial_lr"], group["eps"], schedule["base_lrs"]) == (5e-3, 1e-4, [5e-3])
    assert group["lr"] == schedule["_last_lr"][0] <= 5e-3
    assert settings["optim"]["lr"] == 5e-3


def test_a_run_that_is_resumed_from_its_end_is_the_longer_run(cli) -> None:
    """Two steps and one more give the weights of three, to the last bit: the epoch goes on where max_steps cut it."""
    constant = ("--model.optim.schedule", "constant", "--model.optim.lr", "1e-3")
    whole, half, rest = (cli.folder / "runs" / name for name in ("whole", "half", "rest"))
    cli.fit("sft.yaml", "sft.jsonl", *plain(whole, 3, *constant))
    cli.fit("sft.yaml", "sft.jsonl", *plain(half, 2, *constant))
    last = half / "version_0" / "checkpoints" / "last.ckpt"
    cli.fit("sft.yaml", "sft.jsonl", *plain(rest, 3, *constant, "--ckpt_path", str(last)))
    weights = [(root / "model" / "model.safetensors").read_bytes() for root in (whole, half, rest)]
    assert weights[2] == weights[0] != weights[1]


@pytest.mark.parametrize(
    ("strategy", "shards"),
    [
        ("fsdp2", True),
        (Namespace(class_path="lit_rlhf.strategies.FSDP2Strategy"), True),
        (Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy"), False),
        ("auto", False),
        (Namespace(class_path="lightning.pytorch.strategies.DDPStrategy"), False),
    ],
)
def test_no_process_loads_whole_what_will_be_sharded(strategy, shards, monkeypatch):
    seen = []
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda cli: seen.append(_DEFERS.get()))
    cli = object.__new__(CLI)
    cli.subcommand, cli.config = "fit", Namespace(fit=Namespace(trainer=Namespace(strategy=strategy)))
    cli.instantiate_classes()
    assert seen == [shards]
    assert not _DEFERS.get()
