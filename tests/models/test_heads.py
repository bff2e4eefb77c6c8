"""Scalar models: the head's start, scores blind to padding and company, values before each token, folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf.batch import Rollout
from lit_rlhf.models import Lora, Network, load_scalar, response_values, save_scalar, sequence_scores, token_scores

ROWS = [[5, 6, 7, tiny.EOS], [40], [9, 10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.tiny_gpt2().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["llama", "gpt2"])
def scalar(request, model_folder, gpt2_folder):
    return load_scalar(model_folder if request.param == "llama" else gpt2_folder, seed=1).eval()


def padded(rows, side, extra, pad):
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at] = torch.tensor(row), True
    return ids, mask


def by_definition(model, row):
    """The head on the last hidden state at every position of one unpadded row."""
    return model.score(model.base_model(torch.tensor([row])).last_hidden_state)[0, :, 0]


@torch.no_grad()
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS, 50_000], ids=["pad", "pad is eos", "pad beyond the vocabulary"])
@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("left", 7), ("right", 0), ("right", 3)])
def test_scores_are_the_definition_whatever_the_padding(scalar, side, extra, pad):
    ids, mask = padded(ROWS, side, extra, pad)
    tokens, scores = token_scores(scalar, ids, mask), sequence_scores(scalar, ids, mask)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(tokens[i, mask[i]], by_definition(scalar, row), atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[i], by_definition(scalar, row)[-1], atol=1e-5, rtol=0)
        assert (tokens[i, ~mask[i]] == 0).all()


@torch.no_grad()
def test_a_row_without_tokens_scores_zero(scalar):
    ids, mask = padded(ROWS, "right", 0, 0)
    mask[1] = False
    assert sequence_scores(scalar, ids, mask)[1] == 0


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 3])
def test_values_are_those_of_the_state_before_each_token(scalar, left):
    prompt_ids, prompt_mask = padded([[5, 6], [40, 41, 42]], "left", left, 0)
    response_ids, mask = padded([[7, 8, tiny.EOS], [43]], "right", 2, 0)
    rollout = Rollout(prompt_ids, prompt_mask, response_ids, mask, mask.any(1), ("",) * 2, ("",) * 2)
    values = response_values(scalar, rollout)
    assert values.shape == mask.shape
    torch.testing.assert_close(values[0, :3], by_definition(scalar, [5, 6, 7, 8, 2])[1:4], atol=1e-5, rtol=0)
    torch.testing.assert_close(values[1, :1], by_definition(scalar, [40, 41, 42, 43])[2:3], atol=1e-5, rtol=0)
    assert (values[~mask] == 0).all()


@torch.no_grad()
def test_values_after_a_prompt_of_one_token_or_none(scalar):
    ids, mask = torch.tensor([[0, 5], [0, 0]]), torch.tensor([[False, True], [False, False]])
    response = torch.tensor([[7, 8], [7, 8]])
    rollout = Rollout(ids, mask, response, response > 0, mask[:, 0], ("",) * 2, ("",) * 2)
    values = response_values(scalar, rollout)
    torch.testing.assert_close(values[0], by_definition(scalar, [5, 7]), atol=1e-5, rtol=0)
    assert values[1, 0] == 0  # nothing stands before it
    torch.testing.assert_close(values[1, 1:], by_definition(scalar, [7]), atol=1e-5, rtol=0)


def test_gradients_reach_head_and_body_and_the_forward_is_itself_again(scalar):
    ids, mask = padded(ROWS, "right", 0, 0)
    sequence_scores(scalar, ids, mask).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scalar.parameters())
    assert scalar(input_ids=ids, attention_mask=mask.long()).logits.shape == (3, 1)


def test_a_new_head_has_the_variance_of_stiennon_and_its_seed(tmp_path):
    tiny.tiny_llama(hidden_size=2048, intermediate_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    weights = [load_scalar(str(tmp_path), seed=seed).score.weight for seed in (0, 0, 1)]
    assert load_scalar(str(tmp_path)).score.bias is None
    # 2048 draws: the sample variance lies within 4 standard errors (12.5 %) of 1/(d + 1).
    assert weights[0].var().item() == pytest.approx(1 / 2049, rel=0.125)
    assert abs(weights[0].mean().item()) < 4 / 2049
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loading_leaves_the_global_random_state_alone(model_folder):
    before = torch.get_rng_state()
    load_scalar(model_folder, Network(lora=Lora(r=2)), seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_reward_model_is_a_standard_folder_with_equal_scores(scalar, tokenizer, tmp_path):
    assert scalar.head_is_new
    save_scalar(scalar, tokenizer, tmp_path, mean=0.25, std=2.0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"], config["pad_token_id"]) == (0.25, 2.0, tiny.PAD)
    standard = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = padded(ROWS, "right", 1, tiny.PAD)
    with torch.no_grad():
        expected = sequence_scores(scalar, ids, mask)
        found = standard(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        again = load_scalar(str(tmp_path), seed=99).eval()
        torch.testing.assert_close(sequence_scores(again, ids, mask), expected)
    assert not again.head_is_new
    save_scalar(again, tokenizer, tmp_path / "again")
    assert "reward_mean" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_lora_trains_adapters_and_head_and_saves_merged(model_folder, tokenizer, tmp_path):
    model = load_scalar(model_folder, Network(lora=Lora(r=2, targets=["q_proj"]))).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"})
    assert len(trained) == 5
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_scalar(model, tokenizer, tmp_path)
    ids, mask = padded(ROWS, "right", 0, 0)
    with torch.no_grad():
        expected = sequence_scores(model, ids, mask)
        found = sequence_scores(load_scalar(str(tmp_path)).eval(), ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pad_equal_to_eos_is_said_at_saving(scalar, tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(UserWarning, match="share id 2"):
        save_scalar(scalar, tokenizer, tmp_path)


def test_a_classifier_with_several_labels_is_refused(model_folder, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        load_scalar(str(tmp_path))


def test_a_reward_folder_without_its_head_is_refused(model_folder, tmp_path):
    save_scalar(load_scalar(model_folder), None, tmp_path)
    shutil.copy(Path(model_folder) / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights: score\.weight"):
        load_scalar(str(tmp_path))
