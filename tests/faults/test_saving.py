"""What is saved when, what stays, and a run whose disk is full or whose machine is taken away."""

from __future__ import annotations

import os
import re
import signal
from datetime import timedelta
from pathlib import Path

import arena
import lightning as L
import pytest
import torch

from lit_rlhf import GRPO, SFT, checkpoints
from lit_rlhf.callbacks import Checkpoint, ExportFolder, Preemption, SafeCheckpointIO
from lit_rlhf.checkpoints import CheckpointError, read
from lit_rlhf.models import Lora, Network
from lit_rlhf.stages.optim import Optim
from lit_rlhf.stages.resume import differences

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each run has its own


def sft(folder, **knobs) -> SFT:
    return SFT(folder, sample_prompts=0, **knobs)


def train(stage, saver: Checkpoint, *more, steps: int = 6, **settings) -> L.Trainer:
    batches = [arena.examples(4, seed=i) for i in range(steps)]
    return arena.fit(stage, batches, callbacks=[*more, saver], enable_checkpointing=True, **settings)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saver(folder: Path, **knobs) -> Checkpoint:
    return Checkpoint(str(folder), **{"filename": "{step}", "save_last": "link", "every_n_train_steps": 2, **knobs})


def test_the_newest_two_stay_and_the_link_is_to_the_newest(model_folder, tmp_path):
    for keep, kept in ((2, ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]), (1, ["last.ckpt", "step=6.ckpt"])):
        trainer = train(sft(model_folder), saver(tmp_path / str(keep), keep=keep))
        assert type(trainer.strategy.checkpoint_io) is SafeCheckpointIO
        assert names(tmp_path / str(keep)) == kept
        assert (tmp_path / str(keep) / "last.ckpt").resolve().name == "step=6.ckpt"
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoint(keep=0)


def test_the_link_is_never_left_hanging(model_folder, tmp_path, monkeypatch):
    """With one to keep, the old one goes only when the link is to the new one."""
    unlinked, last = [], tmp_path / "last.ckpt"
    real = SafeCheckpointIO.remove_checkpoint

    def watched(io, path):
        unlinked.append((Path(path).name, last.resolve().name))
        real(io, path)

    monkeypatch.setattr(SafeCheckpointIO, "remove_checkpoint", watched)
    train(sft(model_folder), saver(tmp_path, keep=1))
    assert unlinked == [("step=2.ckpt", "step=4.ckpt"), ("step=4.ckpt", "step=6.ckpt")]


def test_by_steps_and_by_minutes_whichever_comes_first_and_at_the_end(model_folder, tmp_path, monkeypatch):
    clock = iter(range(0, 6000, 20))  # each look is 20 seconds after the last; one look a step and one at the start
    monkeypatch.setattr("lightning.pytorch.callbacks.model_checkpoint.time.monotonic", lambda: next(clock))
    steps = {
        "both": {"every_n_train_steps": 4, "train_time_interval": timedelta(minutes=1)},
        "minutes": {"every_n_train_steps": None, "train_time_interval": timedelta(minutes=1)},
        "end": {"every_n_train_steps": 100},
    }
    wanted = {"both": [3, 4, 6, 7], "minutes": [3, 6, 7], "end": [7]}
    for name, knobs in steps.items():
        train(sft(model_folder), saver(tmp_path / name, keep=9, **knobs), steps=7)
        found = sorted(int(path.stem.split("=")[1]) for path in (tmp_path / name).glob("step=*"))
        assert (name, found) == (name, wanted[name])


def test_with_a_metric_watched_last_is_the_newest_all_the_same(model_folder, tmp_path):
    """The loss rises: the first is the best, and the link would stay there."""

    class Rising(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.log("rising", float(trainer.global_step))

    train(sft(model_folder), saver(tmp_path, monitor="rising", filename="best-{step}"), Rising())
    assert names(tmp_path) == ["best-step=2.ckpt", "last.ckpt"]
    assert read(tmp_path / "last.ckpt")["global_step"] == 6


class Disk:
    """A disk that is full at the named saves, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_at: range) -> None:
        self.saves, real = 0, checkpoints.torch.save

        def save(what, file):
            self.saves += 1
            if self.saves in full_at:
                file.write(b"some")
                raise OSError(28, "No space left on device")
            real(what, file)

        monkeypatch.setattr(checkpoints.torch, "save", save)


def test_a_full_disk_loses_neither_the_run_nor_the_checkpoint_before(model_folder, tmp_path, monkeypatch):
    Disk(monkeypatch, range(2, 3))
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(names(tmp_path) if tmp_path.exists() else [])

    with pytest.warns(match=r"NOT SAVED at step 4: .*step=4.ckpt: No space left on device \(errno 28\).*step=2.ckpt"):
        train(sft(model_folder), saver(tmp_path, keep=1), Look())
    assert seen[4] == seen[2] == ["last.ckpt", "step=2.ckpt"]
    assert names(tmp_path) == ["last.ckpt", "step=6.ckpt"]
    assert read(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_run_whose_end_cannot_be_saved_says_so_after_it_trained(model_folder, tmp_path, monkeypatch):
    disk, stage, count = Disk(monkeypatch, range(2, 99)), sft(model_folder), arena.Log()
    with (
        pytest.warns(match="NOT SAVED"),
        pytest.raises(CheckpointError, match=r"ended at step 6 .*No space left.*newest checkpoint is .*step=2.ckpt"),
    ):
        train(stage, saver(tmp_path), count)
    assert len(count.rows) == 6
    assert disk.saves == 4  # steps 2, 4 and 6, and once more when all was over
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(match="none yet"), pytest.raises(CheckpointError, match="no checkpoint of this run"):
        train(sft(model_folder), saver(tmp_path / "file" / "folder"))


class Signal(L.Callback):
    """Sends this process a signal in the middle of a batch."""

    def __init__(self, name: str, batch: int) -> None:
        self.number, self.batch = signal.Signals[name], batch

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batch:
            for _ in range(2):  # as many a scheduler does
                os.kill(os.getpid(), self.number)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
def test_a_signal_waits_for_the_optimizer_step_and_leaves_without_validation_or_export(model_folder, tmp_path):
    """Two batches a step, the signal in the first of the second step's: step 2 is made, saved, and that is all."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}
    settings = {
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "held_out": [arena.examples(4)],
        "num_sanity_val_steps": 0,
    }
    checkpoint = saver(tmp_path / "saved", every_n_train_steps=100)
    export, validated = ExportFolder(str(tmp_path / "out")), []

    class Look(L.Callback):
        def on_validation_epoch_start(self, *_):
            validated.append(1)

    with pytest.raises(SystemExit) as left:
        train(sft(model_folder), checkpoint, Signal("SIGUSR1", 2), Preemption(), Look(), export, **settings)
    assert left.value.code == 128 + signal.SIGUSR1
    assert read(tmp_path / "saved" / "last.ckpt")["global_step"] == 2
    assert not (tmp_path / "out").exists()
    assert not validated
    assert {one: signal.getsignal(one) for one in before} == before


def test_which_signals_are_taken(model_folder, tmp_path):
    with pytest.raises(ValueError, match="no signal SIGNOTHING"):
        Preemption(("SIGNOTHING",))
    taken = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_):
            taken.append(getattr(signal.getsignal(signal.SIGUSR1), "__name__", ""))

    train(sft(model_folder), saver(tmp_path), Preemption(), Look(), steps=1)
    train(sft(model_folder), saver(tmp_path / "b"), Preemption(("SIGTERM",)), Look(), steps=1)
    assert taken == ["_note", ""]


def test_under_slurm_lightnings_requeue_is_put_aside_and_done_at_the_safe_point(model_folder, tmp_path, monkeypatch):
    """Lightning would save inside the handler, wherever it strikes, and leave hpc_ckpt_1.ckpt."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    asked = []

    def run(command, **_):
        asked.append(command)
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr("lit_rlhf.callbacks.preemption.subprocess.run", run)
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda *_, **__: 0)
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "LOCALID": "0", "NODEID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plugin, folder = SLURMEnvironment(auto_requeue=True), tmp_path / "saved"
    callbacks = [Signal("SIGUSR1", 2), Preemption(("SIGTERM",))]
    with pytest.raises(SystemExit) as left, pytest.warns(match="job 77 could not be requeued"):
        train(sft(model_folder), saver(folder), *callbacks, plugins=[plugin], folder=tmp_path)
    assert left.value.code == 128 + signal.SIGUSR1
    assert asked == [["scontrol", "requeue", "77"]]
    assert read(folder / "last.ckpt")["global_step"] == 3
    assert not list(tmp_path.glob("hpc*"))


def test_a_resume_says_what_it_restores_and_what_changed(model_folder, tmp_path, capfd, caplog):
    train(sft(model_folder), saver(tmp_path), steps=2)
    path = str(tmp_path / "last.ckpt")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):  # the demo's tests quieten Lightning
        train(sft(model_folder, optim=Optim(lr=3e-4)), saver(tmp_path / "b"), ckpt_path=path, max_steps=4, max_epochs=2)
    said = [record.message for record in caplog.records if "going on" in record.message]
    assert said == ["going on after step 2; changed since: optim.lr 1e-05 → 0.0003"]


def test_another_runs_checkpoint_is_refused(model_folder, tmp_path):
    import tiny

    train(sft(model_folder), saver(tmp_path), steps=2)
    path = str(tmp_path / "last.ckpt")
    other = tiny.save_tiny(tmp_path / "other", seed=1)
    grpo = GRPO(model_folder, [arena.low_ids])
    with pytest.raises(CheckpointError, match=r"one of lit_rlhf.stages.sft.SFT, this run is one of .*GRPO"):
        arena.fit(grpo, [arena.prompts(4)], ckpt_path=path)
    with pytest.raises(CheckpointError, match=rf"model {re.escape(model_folder)} → {re.escape(other)}"):
        train(sft(other), saver(tmp_path / "b"), ckpt_path=path)
    with pytest.raises(CheckpointError, match=r"network.lora None → \{'r': 2"):
        train(sft(model_folder, network=Network(lora=Lora(r=2))), saver(tmp_path / "b"), ckpt_path=path)


def test_a_folder_may_move_under_its_own_name(tmp_path):
    (tmp_path / "new" / "model").mkdir(parents=True)
    (tmp_path / "old" / "other").mkdir(parents=True)
    new = str(tmp_path / "new" / "model")
    assert not list(differences({"model": "gone/model"}, {"model": new}, ""))
    assert not list(differences({"model": new + "/"}, {"model": new}, ""))
    assert list(differences({"model": str(tmp_path / "old" / "other")}, {"model": new}, ""))
    assert list(differences({"name": "gone/model"}, {"name": new}, ""))


def test_a_run_killed_between_its_last_step_and_the_export_exports_when_started_again(model_folder, tmp_path):
    stage, out = sft(model_folder), tmp_path / "out"
    train(stage, saver(tmp_path / "saved"), max_steps=6)
    again = sft(model_folder)
    train(again, saver(tmp_path / "b"), ExportFolder(str(out)), max_steps=6, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert (out / "model.safetensors").is_file()
    assert torch.equal(arena.weights(again), arena.weights(stage))
