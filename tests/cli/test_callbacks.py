"""The callbacks in a Trainer that a user builds himself: knobs, files, and what the bar shows."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import arena
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import Checkpoint, ExportFolder, Progress, SampleTable, Throughput, throughput
from lit_rlhf.models import Lora, Network
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import GRPO, PPO, SFT, Optim, Updates

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Throughput, each look at the clock is one second after the last."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: float(next(seconds))))


def test_speed_and_shares_of_sft_are_over_the_steps_since_the_last_log(model_folder, clock) -> None:
    """Looks: start 0, batch 1 to 2, batch 3 to 4, log 5: of five seconds two are updates."""
    batches = [arena.examples(8, seed=seed) for seed in range(4)]
    tokens = sum(int(batch.mask.sum()) for batch in batches[:2])
    log = arena.Log()
    arena.fit(sft(model_folder), batches, callbacks=[Throughput(), log], log_every_n_steps=2)
    assert [("share/update" in row) for row in log.rows] == [False, True, True, True]
    assert log.rows[1]["throughput/tokens_per_second"] == pytest.approx(tokens / 5)
    assert log.rows[1]["share/update"] == pytest.approx(2 / 5)
    assert log.rows[1]["share/other"] == pytest.approx(3 / 5)
    assert "mfu" not in log.rows[1]  # nobody knows a CPU's peak


def test_accumulated_batches_count_to_their_step(model_folder, clock) -> None:
    batches, log = [arena.examples(8, seed=seed) for seed in range(2)], arena.Log()
    arena.fit(sft(model_folder), batches, callbacks=[Throughput(), log], accumulate_grad_batches=2)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    assert log.rows[1]["throughput/tokens_per_second"] == pytest.approx(tokens / 5)


def test_validation_is_a_phase_and_slows_no_training(model_folder, clock) -> None:
    """Looks: start 0, batch 1 to 2, log 3, start 4, validation 5 to 6, batch 7 to 8, log 9."""
    batches, log = [arena.examples(8)] * 2, arena.Log()
    stage = sft(model_folder, sample_prompts=0)
    arena.fit(stage, batches, [arena.examples(4)], callbacks=[Throughput(), log], val_check_interval=1)
    last = log.rows[1]
    assert (last["share/validation"], last["share/update"]) == (pytest.approx(1 / 5), pytest.approx(1 / 5))
    assert last["throughput/tokens_per_second"] == pytest.approx(int(batches[0].mask.sum()) / 4)


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_mfu_of_sft_counts_six_a_trained_weight_and_four_a_frozen_one(lora, model_folder, clock, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 10**9)
    stage, batch, log = sft(model_folder, network=Network(lora=lora)), arena.examples(8), arena.Log()
    arena.fit(stage, [batch], callbacks=[Throughput(), log])
    flops = sum(p.numel() * (6 if p.requires_grad else 4) for p in stage.parameters())
    assert log.rows[0]["mfu"] == pytest.approx(int(batch.mask.sum()) * flops / 10**9)  # one second


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_phases_of_a_rollout_are_taken_from_the_stage(kind, model_folder, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 10**9)
    group = {"group_size": 2} if kind is GRPO else {}
    stage = kind(model_folder, [arena.low_ids], sampling=QUICK, updates=Updates(epochs=3, minibatches=2), **group)
    log, batch = arena.Log(), arena.prompts(4)
    arena.fit(stage, [batch] * 2, callbacks=[Throughput(), log])
    for before, row in zip([{"tokens": 0.0}, log.rows[0]], log.rows, strict=True):
        responses = row["tokens"] - before["tokens"]
        shares = {key: value for key, value in row.items() if key.startswith("share/")}
        assert set(shares) == {"share/rollout", "share/score", "share/update", "share/other"}
        assert sum(shares.values()) == pytest.approx(1)
        assert row["share/score"] / row["share/update"] == pytest.approx(
            row["time/score"] / row["time/update"], rel=1e-3
        )
        for phase in ("score", "update"):
            speed = row[f"throughput/{phase}_tokens_per_second"]
            assert speed == pytest.approx(responses / row[f"time/{phase}"], rel=1e-3)
        weights = sum(p.numel() for p in stage.parameters() if p.requires_grad)
        read = 3 * (int(batch.mask.sum()) * stage.samples_per_prompt + responses)
        assert row["mfu"] == pytest.approx(6 * weights * read / row["time/update"] / 10**9, rel=1e-3)


def test_peak_flops_and_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    names = iter(["NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", "Some Card"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert throughput.peak_flops(gpu, "bf16-mixed") == throughput.peak_flops(gpu, "16-true") == 312 * 10**12
    assert throughput.peak_flops(gpu, "bf16-mixed") is None
    assert throughput.peak_flops(cpu, "32-true") is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_500_000_000)
    assert throughput.peak_memory(gpu) == {"memory/peak_gb": 7.5}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there what is expected")
def test_peak_memory_of_a_process() -> None:
    peak = throughput.peak_memory(torch.device("cpu"))["memory/peak_gb"]
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak == pytest.approx(int(kib) * 1024 / 1e9, rel=0.02)
