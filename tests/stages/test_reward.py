"""The reward model: its loss by hand, K-wise weights, margins, accumulation, held-out statistics, learning."""

from __future__ import annotations

import itertools
import math

import arena
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_rlhf.batch import Pairs
from lit_rlhf.models import sequence_scores
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.stages import Optim, RewardModeling
from lit_rlhf.stages.held_out import HeldOut


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
        losses, scores = stage.compare(batch)
        losses.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in stage.reward.parameters()])
        results.append((len(passes), losses.detach(), scores.detach(), gradient))
    assert results[0][0] == 1 < results[1][0]
    for whole, parted in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(parted, whole, atol=1e-5, rtol=0)


# --- rankings of K responses ------------------------------------------------------------------------------------------


def rankings(sizes: list[int], seed: int = 0) -> Pairs:
    """Prompts with so many responses each, best first: the better, the higher its token ids; no ties."""
    generator = torch.Generator().manual_seed(seed)
    ids, better, worse, groups, first = [], [], [], [], 0
    for prompt, size in enumerate(sizes):
        for place in range(size):
            low = 3 + (8 - place) * 28
            ids.append(torch.randint(low, low + 28, (8,), generator=generator))
        for i, j in itertools.combinations(range(size), 2):
            better.append(first + i)
            worse.append(first + j)
            groups.append(prompt)
        first += size
    mask = torch.arange(8) < torch.randint(4, 9, (first, 1), generator=generator)
    comparisons = (torch.tensor(rows) for rows in (better, worse, groups))
    return Pairs(torch.stack(ids).where(mask, 0), mask, *comparisons)


def scored(stage: RewardModeling, batch: Pairs, scores: list[float]) -> torch.Tensor:
    """The stage's loss of each prompt if its network gave these scores."""
    stage.reward = torch.nn.Identity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_rlhf.stages.reward.read_ranked", lambda *_: torch.tensor(scores))
        return stage.compare(batch)[0]


def test_k_wise_is_instructgpts_formula_by_hand(model_folder):
    """−1 / C(K, 2)·Σ log σ(r_w − r_l): three comparisons of one prompt, one of the other, each prompt weighing 1."""
    losses = scored(reward(model_folder), rankings([3, 2]), [2.0, 0.5, 1.0, -1.0, 0.0])
    sigma = {m: 1 / (1 + math.exp(-m)) for m in (1.5, 1.0, -0.5, -1.0)}
    by_hand = [-(math.log(sigma[1.5]) + math.log(sigma[1.0]) + math.log(sigma[-0.5])) / 3, -math.log(sigma[-1.0])]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_best_of_k_is_torchs_cross_entropy(model_folder):
    """K differs from prompt to prompt; the best response is class 0."""
    scores = torch.tensor([0.3, 2.0, -1.0, 0.5, 1.5, -0.5, 0.0, 3.0, 1.0])
    losses = scored(reward(model_folder, loss="best_of_k"), rankings([4, 2, 3]), scores.tolist())
    expected = [F.cross_entropy(row.unsqueeze(0), torch.tensor([0])).item() for row in scores.split([4, 2, 3])]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_tied_best_responses_stand_against_the_worse_ones_alone(model_folder):
    """Responses 0 and 1 are tied before 2 and 3, which are compared as well; the next prompt is a pair."""
    better, worse = torch.tensor([0, 0, 1, 1, 2, 5]), torch.tensor([2, 3, 2, 3, 3, 4])
    base = rankings([4, 2])
    batch = Pairs(base.ids, base.mask, better, worse, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert batch.best.tolist() == [True, True, False, False, False, True]
    losses = scored(reward(model_folder, loss="best_of_k"), batch, [1.0, 2.0, 0.5, -0.5, 0.0, 0.7])
    rest = math.exp(0.5) + math.exp(-0.5)
    tied = [math.log((math.exp(score) + rest) / math.exp(score)) for score in (1.0, 2.0)]
    assert losses.tolist() == pytest.approx([sum(tied) / 2, math.log(1 + math.exp(-0.7))], rel=1e-6)


def test_smoothed_labels_by_hand_and_a_loss_for_its_settings_only(model_folder):
    (loss,) = scored(reward(model_folder, label_smoothing=0.1), rankings([2]), [1.0, 0.0]).tolist()
    assert loss == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1)), rel=1e-6)
    for wrong, error in [
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, expected 0 or more and less than 0.5"),
        ({"label_smoothing": 0.1, "loss": "best_of_k"}, "loss=best_of_k has no use for it"),
        ({"loss": "best"}, "loss is 'best', expected"),
        ({"normalize": "bias"}, "normalize is 'bias', expected"),
    ]:
        with pytest.raises(ValueError, match=error):
            reward(model_folder, **wrong)
    batch = arena.pairs(2).with_(margin=torch.ones(2))
    with pytest.raises(ValueError, match="no use for the data's margin column: set margin to false"):
        reward(model_folder, loss="best_of_k").compare(batch)
    assert reward(model_folder, loss="best_of_k", margin=False).compare(batch)[0].shape == (2,)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("loss", "chance"), [("pairwise", math.log(2)), ("best_of_k", math.log(4))])
def test_learns_from_rankings_of_several_sizes(loss, chance, seed, model_folder):
    """The best of K alone says little of the order among the rest, so its bar is the loss rather than the accuracy."""
    stage = reward(model_folder, loss=loss, seed=seed, optim=Optim(lr=3e-3))
    batches = [rankings([2 + (i + j) % 4 for j in range(4)], seed=100 * seed + i) for i in range(40)]
    run = arena.fit(stage, batches, [rankings([4] * 12, seed=999 + seed)])
    assert float(run.callback_metrics["val/loss"]) < 0.3 * chance
    assert float(run.callback_metrics["val/accuracy"]) > (0.9 if loss == "pairwise" else 0.6)


# --- what is said of held-out comparisons -----------------------------------------------------------------------------


def judged(scores: list[float], batch: Pairs) -> tuple[dict[str, float], dict[str, list[dict]]]:
    held_out = HeldOut()
    for half in (batch, batch):
        held_out.update(half, torch.zeros(len(half)), torch.tensor(scores))
    metrics, tables = held_out.compute()
    return {name: float(value) for name, value in metrics.items()}, tables


def test_calibration_table_by_hand():
    """Leads of 2, −2 and 0.05: confidence .88 (bin .85 to .9), right once in two, and .51, right."""
    metrics, tables = judged([2.0, 0.0, 0.0, 2.0, 0.05, 0.0], arena.pairs(3))
    table = {row["confidence_from"]: row for row in tables["calibration"]}
    assert len(table) == 10
    assert sum(row["count"] for row in table.values()) == 6  # the batch came twice
    sure = table[0.85]
    assert (sure["count"], sure["accuracy"], sure["confidence"]) == (
        4,
        0.5,
        pytest.approx(1 / (1 + math.exp(-2)), abs=1e-4),
    )
    assert sure["lead_from"] == pytest.approx(math.log(0.85 / 0.15), abs=1e-3)
    assert (table[0.5]["count"], table[0.5]["accuracy"]) == (2, 1.0)
    assert table[0.7]["accuracy"] is None
    from_table = sum(row["count"] / 6 * abs(row["accuracy"] - row["confidence"]) for row in (sure, table[0.5]))
    assert metrics["calibration_error"] == pytest.approx(from_table, abs=1e-4)


def test_length_is_that_of_the_response_and_its_correlation_by_hand():
    lengths, scores = torch.tensor([5, 1, 2, 4, 3, 3]), [1.0, 0.0, 0.0, 3.0, 2.0, 1.0]
    batch = arena.pairs(3).with_(lengths=lengths)
    metrics, tables = judged(scores, batch)
    x, y = [s - 7 / 6 for s in scores], [n - 3 for n in lengths.tolist()]
    by_hand = sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert metrics["score_length_correlation"] == pytest.approx(by_hand, rel=1e-5)
    assert (metrics["accuracy_longer"], metrics["accuracy_shorter"]) == (1.0, 0.0)
    rows = {row["preferred_is"]: (row["count"], row["accuracy"]) for row in tables["length_bias"]}
    assert rows == {"shorter": (2, 0.0), "as long": (2, 1.0), "longer": (2, 1.0)}
    whole, _ = judged(scores, arena.pairs(3))  # without lengths all of a row counts
    assert whole["score_length_correlation"] != pytest.approx(by_hand, rel=1e-2)


def test_saved_statistics_shift_the_best_responses_to_0(model_folder, tmp_path):
    """Three ranked responses and a pair: the mean of two best ones, each counted once, and no scale."""
    stage, held_out = reward(model_folder, normalize="demonstrations"), rankings([3, 2], seed=3)
    run = arena.fit(stage, [arena.pairs(4)], [held_out])
    stage.eval()
    with torch.no_grad():
        scores = sequence_scores(stage.reward, held_out.ids, held_out.mask)
    stage.export(str(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.reward_mean == pytest.approx(float(scores[[0, 3]].mean()), abs=1e-5)
    assert config.reward_std == 1.0
    assert float(run.callback_metrics["val/score_mean"]) == pytest.approx(float(scores.mean()), abs=1e-5)
