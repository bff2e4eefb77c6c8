"""What a checkpoint must hold, and when none may be written, so that a resumed run goes on exactly."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path

import arena
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import SFT
from lit_rlhf.callbacks import Checkpoint, SampleTable
from lit_rlhf.callbacks.generators import put_back, states
from lit_rlhf.checkpoints import read, write
from lit_rlhf.models import Network
from lit_rlhf.stages import Optim, RewardModeling

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*This step is left out")


def saver(folder: Path, **knobs) -> Checkpoint:
    return Checkpoint(str(folder), **{"filename": "{step}", "every_n_train_steps": 1, "keep": 99, **knobs})


def train(stage: L.LightningModule, *callbacks: L.Callback, batches: int = 6, **settings) -> L.Trainer:
    made = arena.pairs if isinstance(stage, RewardModeling) else arena.examples
    given = [made(4, seed=i) for i in range(batches)]
    return arena.fit(stage, given, callbacks=list(callbacks), enable_checkpointing=True, **settings)


@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 1}, {"every_n_train_steps": None, "train_time_interval": timedelta(0)}]
)
def test_nothing_is_saved_while_gradients_add_up(when, model_folder, tmp_path):
    """They are in no checkpoint. A resumed run has not saved the step it begins at, and Lightning's would at once."""
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 3, "held_out": [arena.examples(4)]}
    settings["num_sanity_val_steps"] = 0
    train(SFT(model_folder, sample_prompts=0), saver(tmp_path / "a", **when), **settings)
    first = tmp_path / "a" / "step=1.ckpt"
    train(SFT(model_folder, sample_prompts=0), saver(tmp_path / "b", **when), ckpt_path=first, **settings)
    files = [*(tmp_path / "a").glob("*.ckpt"), *(tmp_path / "b").glob("*.ckpt")]
    assert len(files) == 3 + 2
    for file in files:
        batches = read(file)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
        assert batches == 2 * read(file)["global_step"]


def test_steps_left_out_in_a_row_are_counted_across_a_resume(model_folder, tmp_path):
    class Infinite(SFT):
        def read(self, batch, noise=None):
            logprobs, correct, learned = super().read(batch, noise)
            return logprobs - torch.inf, correct, learned

    def stage() -> Infinite:
        return Infinite(model_folder, optim=Optim(nonfinite="skip", most_skips=3))

    train(stage(), saver(tmp_path), max_steps=2)
    again = stage()
    with pytest.raises(FloatingPointError, match="step 4 in a row to be left out"):
        train(again, saver(tmp_path / "b"), ckpt_path=tmp_path / "step=2.ckpt")
    assert int(again.skipped_updates) == 3


def test_dropout_of_a_reward_model_goes_by_seed_and_batch(model_folder, tmp_path):
    """So a resume is exact with any checkpoint callback, and every process drops other elements."""

    def end(seed: int, *callbacks: L.Callback, **settings) -> torch.Tensor:
        torch.manual_seed(seed)
        stage = RewardModeling(model_folder, network=Network(residual_dropout=0.2), optim=Optim(lr=1e-3), seed=5)
        train(stage, *callbacks, max_steps=6, **settings)
        return arena.weights(stage)

    whole = end(1, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1))
    assert torch.equal(end(2), whole)


def test_validations_are_counted_across_a_resume():
    table, other = SampleTable(wandb_every=3), SampleTable(wandb_every=3)
    table.seen = 4
    other.load_state_dict(table.state_dict())
    assert other.seen == 4


def test_generators_go_on_from_a_file_that_holds_plain_values_only(tmp_path):
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]

    draw()  # of two normal numbers the second waits for the next call
    write({"state_dict": {}, "generators": [states(torch.device("cpu"))]}, tmp_path / "x.ckpt")
    expected = [draw() for _ in range(5)]
    put_back(read(tmp_path / "x.ckpt")["generators"][0], torch.device("cpu"))
    assert [draw() for _ in range(5)] == expected


def test_a_save_that_waited_for_its_metric_is_made_once(model_folder, tmp_path):
    """At the end of an epoch it has been made, after the validation, and no later validation makes it up."""
    watched = saver(tmp_path, monitor="val/loss", save_top_k=-1, every_n_train_steps=4)
    settings = {"held_out": [arena.examples(4)], "num_sanity_val_steps": 0, "max_epochs": 2, "val_check_interval": 2}
    train(SFT(model_folder, sample_prompts=0), watched, batches=4, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_no_save_waits_for_a_validation_without_rows(model_folder, tmp_path):
    """A moment later the epoch, which ``max_steps`` cuts short, would count as finished."""
    trainer = arena.trainer(max_steps=3, enable_checkpointing=True, callbacks=[saver(tmp_path)], val_check_interval=1)
    batches = arena.loader([arena.examples(4, seed=i) for i in range(6)])
    trainer.fit(SFT(model_folder), batches, [])
    assert read(tmp_path / "step=3.ckpt")["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 0
