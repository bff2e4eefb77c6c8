"""The callbacks in a Trainer that a user builds himself: knobs, files, and what the bar shows."""

from __future__ import annotations

import json
import types
from pathlib import Path

import arena
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import Checkpoint, ExportFolder, Progress, SampleTable
from lit_rlhf.models import Lora, Network
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import GRPO, SFT, Optim

QUICK = Sampling(max_new_tokens=4)


def sft(folder: str, **knobs) -> SFT:
    return SFT(folder, optim=Optim(lr=1e-3), sampling=QUICK, **knobs)


def test_the_bar_shows_phase_score_and_kl_in_rl(model_folder, capsys: pytest.CaptureFixture[str]) -> None:
    stage = GRPO(model_folder, [arena.low_ids], sampling=QUICK, group_size=2)
    arena.fit(stage, [arena.prompts(2)] * 2, callbacks=[Progress()], enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert shown.index("phase=rollout") < shown.index("phase=update") < shown.index("score=")
    assert "kl=" in shown
    assert "tok/s=" in shown
    assert "loss=" not in shown


def test_the_bar_shows_loss_elsewhere_and_can_be_slowed(model_folder, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [arena.examples(4)] * 4
    arena.fit(sft(model_folder), batches, callbacks=[Progress()], enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "loss=" in shown
    assert "phase" not in shown
    assert "1/4" in shown
    arena.fit(sft(model_folder), batches, callbacks=[Progress(refresh_rate=4)], enable_progress_bar=True)
    assert "1/4" not in capsys.readouterr().out


class Shower(torch.nn.Module):
    """Stands for a stage: SampleTable reads nothing else of it."""

    samples = [  # noqa: RUF012
        {"step": 1, "mode": "greedy", "prompt": [{"role": "user", "content": f"é{i}"}], "completion": "ok", "score": i}
        for i in range(3)
    ]


def test_sample_table_keeps_the_first_rows_and_sends_every_nth_table(tmp_path: Path) -> None:
    sent = []
    logger = types.SimpleNamespace(log_table=lambda key, **table: sent.append((key, table)))
    place = types.SimpleNamespace(
        log_dir=str(tmp_path / "run"),
        default_root_dir=str(tmp_path),
        is_global_zero=True,
        sanity_checking=False,
        loggers=[logger],
        global_step=7,
    )
    table = SampleTable(rows=2, wandb_every=2)
    for _ in range(3):
        table.on_validation_end(place, Shower())
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["user: é0", "user: é1"] * 3
    assert len(sent) == 2
    assert sent[0][0] == "samples"
    assert (sent[0][1]["step"], len(sent[0][1]["data"])) == (7, 2)
    SampleTable(wandb_every=0).on_validation_end(place, Shower())
    assert len(sent) == 2


def test_export_folder_takes_the_runs_own_folder_and_can_keep_adapters(model_folder, tmp_path: Path) -> None:
    stage = sft(model_folder, network=Network(lora=Lora(r=2)))
    logger = CSVLogger(str(tmp_path), name="")
    arena.fit(stage, [arena.examples(4)], logger=logger, callbacks=[ExportFolder()])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "version_0" / "export").config.vocab_size == 259
    arena.fit(stage, [arena.examples(4)], callbacks=[ExportFolder(str(tmp_path / "kept"), merge=False)])
    assert (tmp_path / "kept" / "adapter_config.json").is_file()


def test_checkpoint_saves_the_end_once(model_folder, tmp_path: Path) -> None:
    """Every 2 of 3 steps: Lightning's own would leave step 3 out. After every 2 of 2 there is nothing left to save."""
    settings = {"enable_checkpointing": True, "folder": tmp_path}
    batches = [arena.examples(4)] * 3
    for steps, names in ((3, {"last.ckpt", "step=2.ckpt", "step=3.ckpt"}), (2, {"last.ckpt", "step=2.ckpt"})):
        folder = tmp_path / str(steps)
        saver = Checkpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
        arena.fit(sft(model_folder), batches, callbacks=[saver], max_steps=steps, **settings)
        assert {path.name for path in folder.iterdir()} == names
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_rehearsal_leaves_no_files(model_folder, tmp_path: Path) -> None:
    callbacks = [ExportFolder(), SampleTable()]
    stage = sft(model_folder)
    arena.fit(stage, [arena.examples(4)], [arena.examples(4)], callbacks=callbacks, fast_dev_run=True, folder=tmp_path)
    assert not list(tmp_path.rglob("*"))
