"""A reward model that is adapters on the policy's base: the scores of the whole one, and nothing else moves."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import arena
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lit_rlhf.models import Lora, Network, load_causal, load_scalar, save_scalar, sequence_scores
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.models.switches import adapter_of
from lit_rlhf.rewards import RewardAdapter, RewardModel, Rewards
from lit_rlhf.stages import RewardModeling

LORA = Network(lora=Lora(r=2))


def trained_reward(model_folder: str):
    """What `arena.reward_on_adapters` writes, as it was before it was written."""
    return arena.stir(load_scalar(model_folder, Network(lora=Lora(r=3)), seed=5), seed=7).eval()


@pytest.fixture
def folder(model_folder: str, tmp_path: Path) -> str:
    return arena.reward_on_adapters(model_folder, tmp_path / "reward", mean=0.25, std=2.0)


def rolled(rows: int = 7):
    """Responses to different prompts, ragged."""
    batch, lengths = arena.prompts(rows), [5, 3, 1, 4, 0, 8, 2][:rows]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 259, mask.shape, generator=torch.Generator().manual_seed(1))
    return arena.rollout(lengths).with_(
        prompt_ids=batch.ids, prompt_mask=batch.mask, response_ids=ids.where(mask, 0), mask=mask
    )


def attached(folder: str, policy, **knobs) -> RewardAdapter:
    reward = RewardAdapter(folder, **knobs)
    Rewards([reward]).bind(tiny.tiny_tokenizer(), policy)
    return reward


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_the_whole_reward_model(batch_size, folder, model_folder, tmp_path) -> None:
    policy = arena.stir(load_causal(model_folder, LORA))
    scores = attached(folder, policy, batch_size=batch_size).score_rollout(rolled())
    whole = trained_reward(model_folder)
    torch.testing.assert_close(
        scores, sequence_scores(whole, rolled().input_ids, rolled().input_mask).detach(), atol=2e-6, rtol=1e-6
    )
    save_scalar(whole, tiny.tiny_tokenizer(), tmp_path / "merged")
    torch.testing.assert_close(
        scores, RewardModel(str(tmp_path / "merged")).score_rollout(rolled()), atol=1e-5, rtol=1e-5
    )
    assert not scores.requires_grad


def test_scoring_leaves_the_policy_as_it_was(folder, model_folder) -> None:
    policy = arena.stir(load_causal(model_folder, LORA))
    ids = rolled().input_ids
    before, trained = policy(ids).logits, {name: p for name, p in policy.named_parameters() if p.requires_grad}
    reward = attached(folder, policy)
    reward.score_rollout(rolled())
    assert torch.equal(policy(ids).logits, before)
    assert policy.training
    assert {name: p for name, p in policy.named_parameters() if p.requires_grad}.keys() == trained.keys()
    assert not any(p.requires_grad for p in reward.parameters())
    assert [name for name, _ in reward.named_parameters()] == ["head.weight"]  # the policy is no part of it


def test_a_prompt_is_read_once_for_the_answers_to_it(folder, model_folder, monkeypatch) -> None:
    reward = attached(folder, load_causal(model_folder, LORA), batch_size=6)
    twice = rolled(4).select(torch.tensor([0, 1, 2, 3] * 3))
    plain = reward.score_rollout(twice)
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)
    reward.score_rollout(twice)  # the model is known from here on
    read: list[int] = []
    policy = reward.host[0]
    policy.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    torch.testing.assert_close(reward.score_rollout(twice), plain, atol=2e-6, rtol=1e-5)
    assert sum(read) < 0.7 * int(twice.input_mask.sum())


def test_several_rewards_on_one_base(folder, model_folder, tmp_path) -> None:
    other = arena.stir(trained_reward(model_folder), seed=11)
    save_scalar(other, tiny.tiny_tokenizer(), tmp_path / "other", merge=False)
    policy, rewards = load_causal(model_folder, LORA), [RewardAdapter(folder), RewardAdapter(str(tmp_path / "other"))]
    judges = Rewards(rewards)
    judges.bind(tiny.tiny_tokenizer(), policy)
    assert {adapter_of(name) for name, _ in policy.named_parameters()} == {None, "default", "reward", "reward_2"}
    _, parts = judges(rolled())
    expected = [
        attached(folder, load_causal(model_folder, LORA)),
        attached(str(tmp_path / "other"), load_causal(model_folder, LORA)),
    ]
    for found, alone in zip(parts.values(), expected, strict=True):
        assert torch.equal(found, alone.score_rollout(rolled()))
    assert not torch.allclose(*parts.values())


def test_normalize_uses_the_moments_saved_with_the_adapters(folder, model_folder, tmp_path) -> None:
    raw, scaled = (
        attached(folder, load_causal(model_folder, LORA), normalize=normalize).score_rollout(rolled())
        for normalize in (False, True)
    )
    torch.testing.assert_close(scaled, (raw - 0.25) / 2.0)
    bare = arena.reward_on_adapters(model_folder, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"normalize asks for reward_mean and reward_std .*found nan and nan"):
        attached(bare, load_causal(model_folder, LORA), normalize=True)


def test_a_policy_whose_base_moves_is_refused(folder, model_folder) -> None:
    with pytest.raises(ValueError, match=r"trains all its weights.*set network\.lora"):
        attached(folder, load_causal(model_folder))


def test_without_a_policy_it_cannot_score(folder) -> None:
    with pytest.raises(ValueError, match="no policy to sit on"):
        RewardAdapter(folder).score_rollout(rolled())
    with pytest.raises(ValueError, match="batch_size is 0"):
        RewardAdapter(folder, batch_size=0)


def test_another_vocabulary_is_refused(folder, model_folder) -> None:
    path = Path(folder) / "tokenizer.json"
    kept = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"!": 3,', '"§": 3,', kept), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != kept
    with pytest.raises(
        ValueError, match=r"RewardAdapter: .* another vocabulary than the policy: 1 of the policy's 259"
    ):
        attached(folder, load_causal(model_folder, LORA))
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    attached(folder, load_causal(model_folder, LORA))  # the base is the policy's, and so is its vocabulary


# -- what the reward stage writes --------------------------------------------------------------------------------------


def test_a_trained_reward_model_is_exported_as_adapters_and_head(model_folder, tmp_path) -> None:
    stage = RewardModeling(model_folder, network=LORA)
    arena.fit(stage, [arena.pairs(4)] * 3, [arena.pairs(4, seed=1)])
    stage.export(str(tmp_path), merge=False)
    assert not (tmp_path / "model.safetensors").exists()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 28 + 1
    assert "base_model.model.score.weight" in names
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns about missing or unknown keys
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own use
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    rows, reward = rolled(), attached(str(tmp_path), load_causal(model_folder, LORA), normalize=True)
    with torch.no_grad():
        expected = sequence_scores(stage.reward.eval(), rows.input_ids, rows.input_mask)
        for i, (ids, mask) in enumerate(zip(rows.input_ids, rows.input_mask, strict=True)):
            assert float(loaded(input_ids=ids[mask][None]).logits) == pytest.approx(float(expected[i]), abs=1e-5)
    moments = float(stage.score_mean), float(stage.score_std)
    assert (reward.mean, reward.std) == pytest.approx(moments)
    torch.testing.assert_close(reward.score_rollout(rows), (expected - moments[0]) / moments[1], atol=1e-5, rtol=1e-5)


def test_without_adapters_there_is_only_the_whole(model_folder, tmp_path) -> None:
    save_scalar(load_scalar(model_folder), tiny.tiny_tokenizer(), tmp_path, merge=False)
    assert (tmp_path / "model.safetensors").is_file()
