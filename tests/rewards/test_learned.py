"""A reward model as a reward: scores by token ids, frozen, the same whatever surrounds a row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lit_rlhf.batch import Rollout
from lit_rlhf.models import load_scalar, save_scalar
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.rewards import RewardModel, Rewards

LENGTHS = [(5, 7), (2, 3), (9, 1), (1, 12), (4, 4), (6, 0), (3, 9)]  # prompt, response


def rollout() -> Rollout:
    """Seven rows of different lengths; padding is the id of the end token, and every text is a lie."""
    generator = torch.Generator().manual_seed(5)
    rows, prompt, response = len(LENGTHS), 10, 13
    ids = torch.randint(3, 259, (rows, prompt + response), generator=generator)
    prompt_mask = torch.stack([torch.arange(prompt) >= prompt - length for length, _ in LENGTHS])
    mask = torch.stack([torch.arange(response) < length for _, length in LENGTHS])
    return Rollout(
        prompt_ids=ids[:, :prompt].masked_fill(~prompt_mask, tiny.EOS),
        prompt_mask=prompt_mask,
        response_ids=ids[:, prompt:].masked_fill(~mask, tiny.EOS),
        mask=mask,
        ended=torch.ones(rows, dtype=torch.bool),
        prompts=("not this",) * rows,
        completions=("nor this",) * rows,
    )


def expected(folder: Path, rolled: Rollout) -> torch.Tensor:
    """Each row alone, without padding, through transformers' own model: the head at the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    with torch.no_grad():
        for ids, mask in zip(rolled.input_ids, rolled.input_mask, strict=True):
            hidden = model.model(input_ids=ids[mask].unsqueeze(0)).last_hidden_state
            scores.append(model.score(hidden[:, -1]).squeeze())
    return torch.stack(scores)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_scores_are_those_of_each_row_alone(reward_folder: Path, batch_size: int) -> None:
    scores = RewardModel(str(reward_folder), batch_size=batch_size).score_rollout(rollout())
    torch.testing.assert_close(scores, expected(reward_folder, rollout()), atol=2e-6, rtol=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize("others", [1, 4, 6])
def test_sharded_it_makes_as_many_passes_as_the_process_with_most_rows(reward_folder, others, monkeypatch) -> None:
    """Else that one would wait forever for weights; a pass more changes no score."""
    monkeypatch.setattr("lit_rlhf.rewards.learned.is_sharded", lambda model: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, op: count.clamp_(min=others))
    judge, passes = RewardModel(str(reward_folder), batch_size=2), []
    judge.model.register_forward_hook(lambda *_: passes.append(1))
    scores = judge.score_rollout(rollout())
    torch.testing.assert_close(scores, expected(reward_folder, rollout()), atol=2e-6, rtol=1e-5)
    assert len(passes) == max(4, others)


def test_a_forward_pass_is_no_wider_than_its_longest_row(reward_folder: Path) -> None:
    model = RewardModel(str(reward_folder), batch_size=2)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((*kwargs["input_ids"].shape,)), with_kwargs=True
    )
    model.score_rollout(rollout())
    assert [rows for rows, _ in shapes] == [2, 2, 2, 1]
    assert max(width for _, width in shapes) <= 15  # 23 with all padding


def test_a_prompt_is_read_once_for_the_answers_to_it(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)
    alone = rollout()
    rolled = alone.select(torch.tensor([2, 0, 2, 5, 0, 2, 5, 5]))
    model, read = RewardModel(str(reward_folder), batch_size=6), []
    model.score_rollout(rolled)  # the model is known from here on
    model.model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    scores = model.score_rollout(rolled)
    torch.testing.assert_close(scores, expected(reward_folder, rolled), atol=2e-6, rtol=1e-5)
    assert sum(read) < 0.7 * int(rolled.input_mask.sum())


def test_normalize_uses_the_moments_saved_with_the_model(reward_folder: Path) -> None:
    raw = RewardModel(str(reward_folder)).score_rollout(rollout())
    scaled = RewardModel(str(reward_folder), normalize=True).score_rollout(rollout())
    torch.testing.assert_close(scaled, (raw - 0.25) / 2.0)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.0, None), (0.0, 0.0)])
def test_normalize_without_usable_moments_is_refused(
    model_folder: str, tmp_path: Path, mean: float | None, std: float | None
) -> None:
    save_scalar(load_scalar(model_folder), tiny.tiny_tokenizer(), tmp_path, mean=mean, std=std)
    RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match="normalize asks for reward_mean and reward_std"):
        RewardModel(str(tmp_path), normalize=True)


def test_bfloat16_weights_give_float32_scores(reward_folder: Path) -> None:
    model = RewardModel(str(reward_folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    scores = model.score_rollout(rollout())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected(reward_folder, rollout()), atol=0.05, rtol=0.01)


def test_it_is_frozen_and_stays_in_evaluation_mode(reward_folder: Path) -> None:
    holder = nn.Sequential(Rewards([RewardModel(str(reward_folder))]))
    holder.train()
    model = holder[0].rewards[0]
    assert holder.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_language_model_is_refused(model_folder: str) -> None:
    with pytest.raises(ValueError, match="has no trained scalar head, it is a language model"):
        RewardModel(model_folder)


def test_a_batch_size_of_nothing_is_refused(reward_folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        RewardModel(str(reward_folder), batch_size=0)


def test_the_policys_own_tokenizer_is_accepted(reward_folder: Path) -> None:
    Rewards([RewardModel(str(reward_folder))]).bind(tiny.tiny_tokenizer())


def test_another_vocabulary_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    """Also one of the same size and tokens in another order, which would score nonsense without a complaint."""
    model = RewardModel(str(reward_folder))
    grown = tiny.tiny_tokenizer()
    grown.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"1 of the policy's 260 tokens differ, first '<extra>', id 259 .* unknown in"):
        model.bind(grown)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    swapped = type(grown).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 of the policy's 259 tokens differ, first 'b'"):
        model.bind(swapped)


def test_a_reward_model_without_a_tokenizer_is_named(reward_folder: Path, tmp_path: Path) -> None:
    for path in reward_folder.glob("*"):
        if "token" not in path.name:
            shutil.copy(path, tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        RewardModel(str(tmp_path)).bind(tiny.tiny_tokenizer())


def test_it_is_one_reward_among_others(reward_folder: Path) -> None:
    rewards = Rewards(
        [RewardModel(str(reward_folder), name="gold"), lambda completions: [1.0] * len(completions)], [2, 3]
    )
    scores, parts = rewards(rollout())
    raw = expected(reward_folder, rollout())
    torch.testing.assert_close(parts["gold"], raw, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(scores, 2 * raw + 3, atol=1e-5, rtol=1e-5)
