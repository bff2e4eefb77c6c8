"""The loaders under a real Trainer: exact resume, epochs, validation, ranks, sizes that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pair import run_launched

from lit_rlhf.data import DataError, PromptData
from lit_rlhf.data.loader import RankSampler
from lit_rlhf.data.position import Position

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*checkpoint directory.*exists and is not empty:UserWarning",
    "ignore:.*callbacks used to create the checkpoint:UserWarning",
    "ignore:.*treespec:FutureWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*use of fork:DeprecationWarning",
)


class Recorder(L.LightningModule):
    """Learns one number; notes which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tiny.tiny_tokenizer()
        self.seen: list[list[int]] = []
        self.held_out: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(list(batch.columns["i"]))
        return self.weight * len(batch)

    def validation_step(self, batch, batch_idx):
        self.held_out.append(list(batch.columns["i"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def source(rows_file) -> str:
    return rows_file([{"prompt": "p" * (1 + i % 5), "i": i} for i in range(22)])


def fit(data, *, ckpt=None, save=None, **settings) -> Recorder:
    """Train a fresh module; ``save`` is where a checkpoint of every step goes."""
    module = Recorder()
    callbacks = [ModelCheckpoint(save, "{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    settings = {"max_epochs": 3, "limit_val_batches": 0, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(save),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_on_where_it_stopped(source, tmp_path, workers):
    """22 rows in batches of 4: five steps an epoch; 3 and 8 lie within an epoch, 5 and 10 at its end."""
    knobs = {"val_fraction": 0, "batch_size": 4, "num_workers": workers}
    whole = fit(PromptData(source, **knobs), save=tmp_path).seen
    assert len(whole) == 15
    assert whole[:5] != whole[5:10]
    for step in (3, 5, 8, 10) if workers == 0 else (3, 5):
        resumed = fit(PromptData(source, **knobs), ckpt=tmp_path / f"step={step}.ckpt").seen
        assert resumed == whole[step:], step


def test_a_resumed_run_reads_on_when_epochs_are_cut_short(source, tmp_path):
    knobs = {"val_fraction": 0, "batch_size": 4}
    whole = fit(PromptData(source, **knobs), save=tmp_path, limit_train_batches=3).seen
    for step in (2, 3, 7):
        resumed = fit(PromptData(source, **knobs), ckpt=tmp_path / f"step={step}.ckpt", limit_train_batches=3).seen
        assert resumed == whole[step:], step


def test_a_resumed_run_reads_on_when_the_length_was_asked_for_first(source, tmp_path, monkeypatch):
    """Asking the Trainer for its steps builds the loader before the checkpoint is restored."""
    knobs = {"val_fraction": 0, "batch_size": 4}
    whole = fit(PromptData(source, **knobs), save=tmp_path).seen
    plain = Recorder.configure_optimizers
    monkeypatch.setattr(
        Recorder, "configure_optimizers", lambda self: self.trainer.estimated_stepping_batches and plain(self)
    )
    assert fit(PromptData(source, **knobs), ckpt=tmp_path / "step=3.ckpt").seen == whole[3:]


def test_a_place_can_be_restored_before_there_is_a_trainer(source):
    knobs = {"val_fraction": 0, "batch_size": 4}
    whole = fit(PromptData(source, **knobs)).seen
    data = PromptData(source, **knobs)
    data.load_state_dict({"epoch": 1, "rows": 8})
    assert fit(data, max_epochs=1, limit_train_batches=3).seen == whole[7:10]


def test_a_new_trainer_starts_again(source):
    data = PromptData(source, val_fraction=0, batch_size=4)
    assert fit(data).seen == fit(data).seen


def test_reloading_the_loader_each_epoch_still_goes_on(source):
    knobs = {"val_fraction": 0, "batch_size": 4}
    plain = fit(PromptData(source, **knobs)).seen
    assert fit(PromptData(source, **knobs), reload_dataloaders_every_n_epochs=1).seen == plain


def test_an_epoch_reads_each_row_at_most_once_and_batches_are_full(source):
    seen = fit(PromptData(source, val_fraction=0, batch_size=4), max_epochs=1).seen
    assert {len(batch) for batch in seen} == {4}
    assert len({i for batch in seen for i in batch}) == 20


def test_seed_decides_the_order_and_torchs_stream_is_left_alone(source):
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        before = torch.get_rng_state()
        data = PromptData(source, val_fraction=0, batch_size=4, seed=seed)
        data.tokenizer = tiny.tiny_tokenizer()
        orders.append(fit(data, max_epochs=1).seen)
        assert torch.equal(before, torch.get_rng_state())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_reads_every_row_once_in_order(source, workers):
    data = PromptData(source, val=source, batch_size=4, val_batch_size=5, num_workers=workers)
    module = fit(data, max_epochs=1, limit_val_batches=1.0, num_sanity_val_steps=0)
    assert [i for batch in module.held_out for i in batch] == list(range(22))
    assert [len(batch) for batch in module.held_out] == [5, 5, 5, 5, 2]


def test_held_out_rows_are_not_trained_on(source):
    module = fit(PromptData(source, val_fraction=0.2, batch_size=2), limit_val_batches=1.0, num_sanity_val_steps=0)
    held_out = {i for batch in module.held_out for i in batch}
    assert len(held_out) == 4
    assert not held_out & {i for batch in module.seen for i in batch}


def test_without_validation_rows_a_fit_runs(source):
    assert fit(PromptData(source, val_fraction=0, batch_size=4), max_epochs=1, limit_val_batches=1.0).held_out == []


def test_overfitting_on_one_batch_runs(source):
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(PromptData(source, val_fraction=0, batch_size=4), overfit_batches=1).seen
    assert seen[0] == seen[1] == seen[2]


def test_the_tokenizer_is_the_modules_unless_named(source):
    data = PromptData(source, val_fraction=0, batch_size=4)
    module = fit(data, max_epochs=1)
    assert data.tokenizer is module.tokenizer


def test_another_modules_tokenizer_encodes_the_rows_anew(source, monkeypatch):
    data = PromptData(source, val_fraction=0, batch_size=4)
    fit(data, max_epochs=1)
    before = next(iter(data.train_dataloader())).ids.max()
    shifted = tiny.tiny_tokenizer()
    shifted.add_tokens(["pp"])
    monkeypatch.setattr(tiny, "tiny_tokenizer", lambda: shifted)
    fit(data, max_epochs=1)
    assert next(iter(data.train_dataloader())).ids.max() == len(shifted) - 1 > before


def test_a_tokenizer_that_is_not_the_models_is_refused(source, tmp_path):
    other = tiny.tiny_tokenizer()
    other.add_tokens(["pp"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has other tokens than the model's own"):
        fit(PromptData(source, val_fraction=0, batch_size=4, tokenizer=str(tmp_path)))


def test_a_set_smaller_than_a_batch_names_the_knob(source):
    with pytest.raises(DataError, match="22 training rows do not fill one batch: batch_size=64 on 1 process"):
        fit(PromptData(source, val_fraction=0, batch_size=64))


def test_a_module_can_be_read_without_a_trainer(source, tokenizer_folder):
    data = PromptData(source, val_fraction=0, batch_size=4, tokenizer=tokenizer_folder)
    data.setup()
    loader = data.train_dataloader()
    first = [batch.columns["i"] for batch in loader]
    assert len(loader) == len(first) == 5
    assert [batch.columns["i"] for batch in loader] != first
    assert data.state_dict() == {"epoch": 1, "rows": 20}


def test_hyperparameters_are_plain(source, tmp_path):
    fit(PromptData(source, val_fraction=0, batch_size=4), save=tmp_path, max_epochs=1)
    stored = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert stored["datamodule_hyper_parameters"]["batch_size"] == 4
    assert stored["PromptData"] == {"epoch": 0, "rows": 4}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_reads_the_same_block_of_rows_on_any_number_of_processes(world):
    order = list(RankSampler(12, rank=0, world=1, shuffle=True, seed=5))
    ranks = [list(RankSampler(12, rank=rank, world=world, shuffle=True, seed=5)) for rank in range(world)]
    assert sorted(i for rank in ranks for i in rank) == list(range(12))
    assert [i for row in zip(*ranks, strict=True) for i in row] == order


def test_validation_gives_every_rank_as_many_rows_even_if_there_are_fewer_than_ranks():
    ranks = [list(RankSampler(2, rank=rank, world=5, shuffle=False, seed=0)) for rank in range(5)]
    assert ranks == [[0], [1], [2], [3], [4]]  # past the last row they come again, and are not counted


def test_a_place_beyond_the_last_full_batch_is_the_next_epoch():
    place = Position(epoch=2, rows=20)
    place.begin(usable=20)
    assert (place.epoch, place.rows) == (3, 0)
    place.begin(usable=20)
    assert place.epoch == 4


def test_two_processes_read_different_rows_and_resume(source, rows_file, tmp_path):
    """Gloo, two processes: disjoint rows, the same number of batches, exact resume, an error if rows are too few."""
    val = rows_file([{"prompt": "v", "i": i} for i in range(5)], "val.jsonl")
    run_launched(Path(__file__).with_name("two_ranks.py"), source, val, str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    alone = fit(PromptData(source, val_fraction=0, batch_size=6), max_epochs=2).seen
    steps = [sorted(a + b) for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert steps == [sorted(batch) for batch in alone]  # one step on two ranks = one step on one with twice the batch
    for rank in ranks:
        assert {len(batch) for batch in rank["seen"]} == {3}
        assert rank["resumed"] == rank["seen"][2:]
        assert "batch_size=12 on 2 process(es) takes 24" in rank["error"]
    assert sorted(i for rank in ranks for batch in rank["held_out"] for i in batch) == [0, *range(5)]
