"""The reward model: its loss by hand, K-wise weights, margins, accumulation, held-out statistics, learning."""

from __future__ import annotations

import math

import arena
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_rlhf.batch import Pairs
from lit_rlhf.models import sequence_scores
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.stages import Optim, RewardModeling


def reward(folder: str, **knobs) -> RewardModeling:
    return RewardModeling(folder, **{"optim": Optim(lr=1e-3), **knobs})


def part(batch: Pairs, start: int, count: int) -> Pairs:
    """Pairs ``start`` to ``start + count`` of a batch of plain pairs."""
    rows, numbers = slice(2 * start, 2 * (start + count)), torch.arange(count)
    return Pairs(batch.ids[rows], batch.mask[rows], 2 * numbers, 2 * numbers + 1, numbers)


def test_loss_is_bradley_terry_by_hand(model_folder):
    stage, batch, log = reward(model_folder), arena.pairs(3), arena.Log()
    with torch.no_grad():
        scores = sequence_scores(stage.reward, batch.ids, batch.mask).tolist()
    by_hand = [math.log(1 + math.exp(scores[2 * i + 1] - scores[2 * i])) for i in range(3)]
    arena.fit(stage, [batch], callbacks=[log])
    assert log.rows[0]["loss"] == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert log.rows[0]["margin"] == pytest.approx(
        sum(scores[2 * i] - scores[2 * i + 1] for i in range(3)) / 3, rel=1e-4
    )


def test_every_prompt_weighs_the_same_however_many_comparisons_it_has(model_folder):
    """Prompt 0 has three ranked responses (three comparisons), prompt 1 a single pair."""
    stage, log = reward(model_folder), arena.Log()
    base = arena.pairs(3)
    better, worse = torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 2, 4])
    batch = Pairs(base.ids[:5], base.mask[:5], better, worse, torch.tensor([0, 0, 0, 1]))
    with torch.no_grad():
        s = sequence_scores(stage.reward, batch.ids, batch.mask)
        losses = -torch.nn.functional.logsigmoid(s[better] - s[worse])
    arena.fit(stage, [batch], callbacks=[log])
    assert log.rows[0]["loss"] == pytest.approx(float(losses[:3].mean() + losses[3]) / 2, rel=1e-5)


@pytest.mark.parametrize("knobs", [{"margin": False}, {"center": 0.5}])
def test_margin_and_centering_reach_the_loss(knobs, model_folder):
    batch = arena.pairs(4).with_(margin=torch.full((4,), 2.0))
    losses = []
    for chosen in ({}, knobs):
        log = arena.Log()
        arena.fit(reward(model_folder, **chosen), [batch], callbacks=[log])
        losses.append(log.rows[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_accumulation_changes_nothing(model_folder):
    batch, results = arena.pairs(8), []
    for size in (8, 2, 3):
        stage = reward(model_folder)
        batches = [part(batch, start, min(size, 8 - start)) for start in range(0, 8, size)]
        arena.fit(stage, batches, accumulate_grad_batches=len(batches), gradient_clip_val=0.1)
        results.append(arena.weights(stage))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_the_preference(seed, model_folder):
    stage = reward(model_folder, seed=seed, optim=Optim(lr=3e-3))
    batches = [arena.pairs(8, seed=100 * seed + i) for i in range(40)]
    run = arena.fit(stage, batches, [arena.pairs(16, seed=999 + seed)])
    assert float(run.callback_metrics["val/accuracy"]) > 0.9
    assert float(run.callback_metrics["val/loss"]) < math.log(2) / 2


def test_dropout_is_off_while_it_trains(model_folder):
    stage, batch = reward(model_folder), arena.pairs(4)
    stage.train()
    one, two = (sequence_scores(stage.reward, batch.ids, batch.mask) for _ in range(2))
    assert torch.equal(one, two)


def test_held_out_mean_and_std_are_saved_with_a_standard_folder(model_folder, tmp_path):
    stage, held_out = reward(model_folder), arena.pairs(8, seed=5)
    arena.fit(stage, [arena.pairs(8)], [part(held_out, 0, 5), part(held_out, 5, 3)])
    stage.eval()
    with torch.no_grad():
        scores = sequence_scores(stage.reward, held_out.ids, held_out.mask)
    stage.export(str(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.reward_mean == pytest.approx(float(scores.mean()), abs=1e-5)
    assert config.reward_std == pytest.approx(float(scores.std(correction=0)), rel=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    row, length = held_out.ids[3], int(held_out.mask[3].sum())
    assert model(row[None, :length]).logits.item() == pytest.approx(float(scores[3]), abs=1e-5)


def test_the_resumed_model_keeps_its_statistics(model_folder, tmp_path):
    stage = reward(model_folder)
    run = arena.fit(stage, [arena.pairs(8)], [arena.pairs(8, seed=5)])
    run.save_checkpoint(tmp_path / "reward.ckpt")
    again = RewardModeling.load_from_checkpoint(tmp_path / "reward.ckpt")
    assert float(again.score_std) == float(stage.score_std) != 1.0


def test_reading_in_parts_changes_nothing_but_the_padding(model_folder, monkeypatch):
    results, batch = [], arena.pairs(8)
    for overhead in (10**6, 1):
        monkeypatch.setitem(PASS_TOKENS, "cpu", overhead)
        stage = reward(model_folder)
        passes = []
        stage.reward.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        losses, better, worse = stage.compare(batch)
        losses.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in stage.reward.parameters()])
        results.append((len(passes), losses.detach(), better.detach(), worse.detach(), gradient))
    assert results[0][0] == 1 < results[1][0]
    for whole, parted in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(parted, whole, atol=1e-5, rtol=0)
