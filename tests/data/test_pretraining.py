"""The pretraining stream beside the prompts: what it holds, its order, its ranks, its place on resume."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.batch import Examples, Prompts
from lit_rlhf.data import DataError, PromptData
from lit_rlhf.data.mixture import Mixture
from lit_rlhf.data.pretraining import PretrainingStream

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")


@pytest.fixture
def prompts(rows_file) -> str:
    return rows_file([{"prompt": f"p{i}"} for i in range(10)])


@pytest.fixture
def texts(rows_file) -> str:
    """Seven texts of two letters, so of three tokens with EOS."""
    return rows_file([{"text": f"t{i}", "more": f"m{i}m{i}"} for i in range(7)], "texts.jsonl")


class Recorder(L.LightningModule):
    """Learns one number; notes the texts that come with its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tiny.tiny_tokenizer()
        self.seen: list[tuple[str, ...]] = []

    def training_step(self, batch, batch_idx):
        beside = batch.pretraining
        self.seen.append(
            tuple(self.tokenizer.batch_decode([i[m] for i, m in zip(beside.ids, beside.mask, strict=True)]))
        )
        return self.weight * len(batch)

    def validation_step(self, batch, batch_idx):
        assert batch.pretraining is None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, *, ckpt=None, save=None, **settings) -> list[tuple[str, ...]]:
    module = Recorder()
    callbacks = [ModelCheckpoint(save, "{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=callbacks, enable_checkpointing=bool(save),
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 3, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module.seen


def data_of(prompts, texts, **knobs) -> PromptData:
    knobs = {"batch_size": 2, "val_fraction": 0.2, "pretraining_batch_size": 3, **knobs}
    return PromptData(prompts, pretraining=texts, **knobs)


def test_every_training_batch_comes_with_texts_and_each_pass_reads_all_in_a_new_order(prompts, texts):
    seen = fit(data_of(prompts, texts), max_epochs=4)
    assert {len(batch) for batch in seen} == {3}
    stream = [text for batch in seen for text in batch]
    passes = [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)]
    assert len(passes) == 6  # 4 epochs of 4 batches: 48 texts
    assert all(sorted(one) == [f"t{i}</s>" for i in range(7)] for one in passes)
    assert len({tuple(one) for one in passes}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_the_texts_on_where_it_stopped(prompts, texts, tmp_path, workers):
    """Four steps an epoch: 3 lies within one, 4 at its end; the texts' passes end elsewhere."""
    whole = fit(data_of(prompts, texts, num_workers=workers), save=tmp_path)
    for step in (3, 4, 7) if workers == 0 else (3, 4):
        resumed = fit(data_of(prompts, texts, num_workers=workers), ckpt=tmp_path / f"step={step}.ckpt")
        assert resumed == whole[step:], step
    stored = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert stored["PromptData"] == {"epoch": 0, "rows": 6, "pretraining": 9}


def test_a_new_trainer_starts_again_and_the_seed_decides(prompts, texts):
    data = data_of(prompts, texts)
    first = fit(data)
    assert fit(data) == first
    assert fit(data_of(prompts, texts, seed=1)) != first


def test_overfitting_on_a_batch_has_texts_too(prompts, texts):
    with pytest.warns(UserWarning, match="overfit"):
        assert len(fit(data_of(prompts, texts), overfit_batches=1)) == 3


def test_texts_are_learned_whole_but_for_their_first_token(prompts, texts, tokenizer_folder):
    data = data_of(prompts, texts, tokenizer=tokenizer_folder, pretraining_column="more")
    data.setup()
    beside = next(iter(data.train_dataloader())).pretraining
    assert beside.ids.shape == (3, 5)
    assert beside.mask.all()
    assert beside.loss_mask.tolist() == [[False, True, True, True, True]] * 3


def test_long_texts_are_cut_into_equal_pieces_and_all_of_them_is_read(prompts, rows_file, tokenizer_folder):
    text = "".join(chr(97 + i) for i in range(20))
    texts = rows_file([{"text": text}, {"text": "z"}], "long.jsonl")
    data = data_of(prompts, texts, tokenizer=tokenizer_folder, pretraining_length=9, pretraining_batch_size=4)
    data.setup()
    beside = next(iter(data.train_dataloader())).pretraining
    pieces = sorted(data.tokenizer.decode(ids[mask]) for ids, mask in zip(beside.ids, beside.mask, strict=True))
    assert pieces == ["abcdefg", "hijklmn", "opqrst</s>", "z</s>"]
    assert (beside.ids[~beside.mask] == tiny.PAD).all()
    assert not (beside.loss_mask & ~beside.mask).any()


def test_sources_of_texts_are_mixed_by_weight(prompts, texts, rows_file):
    other = rows_file([{"text": "o"}], "other.jsonl")
    seen = fit(data_of(prompts, [{"path": texts, "weight": 2}, {"path": other, "weight": 7}]), max_epochs=7)
    stream = [text for batch in seen for text in batch]
    for i in range(0, 84, 21):
        assert stream[i : i + 21].count("o</s>") == 7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_reads_the_same_texts_on_any_number_of_processes(world):
    pieces = [np.array([i, i]) for i in range(10)]
    mixture = Mixture.of([10], [1.0])
    alone = PretrainingStream(pieces, mixture, batch_size=6, seed=4)
    ranks = [PretrainingStream(pieces, mixture, batch_size=6 // world, seed=4) for _ in range(world)]
    for start in (0, 6, 12, 600):
        each = [stream.rows(start, rank, world) for rank, stream in enumerate(ranks)]
        assert [i for row in zip(*each, strict=True) for i in row] == alone.rows(start, 0, 1)
    assert sorted(alone.rows(0, 0, 1) + alone.rows(6, 0, 1)[:4]) == list(range(10))


def test_the_texts_travel_with_the_prompts_and_are_not_theirs():
    beside = Examples(torch.ones(5, 3).long(), torch.ones(5, 3).bool(), torch.ones(5, 3).bool())
    prompts = Prompts(torch.ones(2, 4).long(), torch.ones(2, 4).bool(), ("a", "b"), pretraining=beside)
    assert prompts.repeat(3).pretraining is beside
    assert prompts.select(torch.tensor([1])).pretraining is beside
    moved = prompts.to("meta").pretraining
    assert moved.ids.device.type == moved.loss_mask.device.type == "meta"


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"pretraining_batch_size": 0}, "pretraining_batch_size must be at least 1, got 0"),
        ({"pretraining_length": 1}, "pretraining_length must be at least 2, got 1"),
        ({"pretraining_column": "txt"}, r'texts.jsonl has no column "txt"; did you mean text\?'),
        ({"pretraining": []}, "pretraining: expected a path or a list of at least one source"),
        ({"pretraining": [{"path": "./x.jsonl", "weight": 0}]}, r"pretraining, source 1 \(./x.jsonl\): weight is 0"),
        ({"pretraining": "./x.jsonl"}, "x.jsonl does not exist"),
    ],
)
def test_wrong_knobs_are_named(prompts, texts, tokenizer_folder, knobs, error):
    data = PromptData(prompts, tokenizer=tokenizer_folder, **{"pretraining": texts, **knobs})
    with pytest.raises(DataError, match=error):
        data.setup()


def test_an_empty_text_is_named_with_its_line(prompts, rows_file, tokenizer_folder):
    texts = rows_file([{"text": "a"}, {"text": " "}], "texts.jsonl")
    with pytest.raises(DataError, match=r'texts.jsonl, line 2: column "text": the text is empty'):
        data_of(prompts, texts, tokenizer=tokenizer_folder).setup()


def test_copies_of_a_numbered_prompt_have_numbers_of_their_own():
    """A row draws by its number: with the prompt's own, all answers to it would be the same."""
    ids = torch.ones(2, 3, dtype=torch.long)
    prompts = Prompts(ids, ids.bool(), ("a", "b"), rows=torch.tensor([3, 5]))
    assert prompts.repeat(2).rows.tolist() == [6, 7, 10, 11]
