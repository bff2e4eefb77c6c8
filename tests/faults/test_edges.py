"""Rollouts and tokenizers at their edges: nothing to learn, nothing to read, too much to read, no token for it."""

from __future__ import annotations

import json
import logging

import arena
import pytest
import tiny
import torch

from lit_rlhf.batch import Rollout
from lit_rlhf.data import DataError, PreferenceData, PromptData, SFTData
from lit_rlhf.models import load_tokenizer
from lit_rlhf.rollout import DecodeSampler, Sampling
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Optim, RewardModeling
from lit_rlhf.stages.spread import networks

ADAM = Optim(lr=1e-3)
RL = {GRPO: {"group_size": 4, "kl": KL(0.0)}, PPO: {}}
STAGES = {SFT: SFTData, RewardModeling: PreferenceData, PPO: PromptData, GRPO: PromptData}


def rl(stage, folder, reward=arena.low_ids, **knobs):
    return stage(folder, [reward], **{"sampling": arena.SHORT, "optim": ADAM, **RL[stage], **knobs})


def trained(module, batches: int = 1):
    """Its weights before and after, and the log."""
    before, log = arena.weights(module).clone(), arena.Log()
    arena.fit(module, [arena.prompts(4, seed=i) for i in range(batches)], callbacks=[log])
    after = arena.weights(module)
    assert after.isfinite().all()
    assert all(abs(value) < float("inf") for row in log.rows for value in row.values())
    return before, after, log.rows


# -- responses -------------------------------------------------------------------------------------------------------


class Edited(DecodeSampler):
    """Responses cut to some lengths, or marked as cut off by the limit; from the ``first`` rollout on."""

    def __init__(self, lengths: list[int] | None = None, ended: bool = True, first: int = 0) -> None:
        super().__init__()
        self.lengths, self.ended, self.left = lengths, ended, first

    def __call__(self, *args, **kwargs) -> Rollout:
        rollout = super().__call__(*args, **kwargs)
        if self.left:
            self.left -= 1
            return rollout.with_(ended=torch.ones_like(rollout.ended))
        lengths = torch.tensor(self.lengths or [8]).repeat(len(rollout))[: len(rollout)]
        width = int(lengths.max())
        mask = rollout.mask[:, :width] & (torch.arange(width) < lengths[:, None])
        texts = tuple(text * bool(length) for text, length in zip(rollout.completions, lengths, strict=True))
        return rollout.with_(
            mask=mask,
            response_ids=rollout.response_ids[:, :width].where(mask, 0),
            sampler_logprobs=rollout.sampler_logprobs[:, :width].where(mask, 0.0),
            ended=torch.full_like(rollout.ended, self.ended),
            completions=texts,
        )


def test_groups_of_equal_scores_teach_nothing_but_the_kl(model_folder):
    before, after, rows = trained(rl(GRPO, model_folder, arena.constant))
    assert torch.equal(before, after)
    assert rows[0]["groups/zero_std_fraction"] == 1
    assert rows[0]["policy/grad_norm"] == rows[0]["loss"] == 0
    module = rl(GRPO, model_folder, arena.constant, kl=KL(1.0, "k3", "loss"))
    with torch.no_grad():
        module.policy.lm_head.weight.mul_(1.5)  # away from the reference
    before, after, rows = trained(module)
    assert rows[0]["policy/loss"] == 0 < rows[0]["policy/kl_loss"]
    assert not torch.equal(before, after)


def test_equal_scores_in_ppo_are_what_the_critic_learns(model_folder):
    _, _, rows = trained(rl(PPO, model_folder, arena.constant), batches=12)
    assert rows[-1]["value/loss"] < rows[0]["value/loss"] / 2


@pytest.mark.parametrize(
    ("stage", "edited", "knobs"),
    [
        (GRPO, {"ended": False}, {"truncated": "mask"}),
        (GRPO, {"lengths": [0]}, {}),
        (PPO, {"lengths": [0]}, {}),
    ],
)
def test_where_no_token_counts_no_weight_moves(stage, edited, knobs, model_folder):
    """Nor by the moments of the rollouts before."""
    sampler = Edited(**edited, first=1)
    module = rl(stage, model_folder, lambda prompts, completions: [len(c) / 9 for c in completions], **knobs)
    module.sampler, snapshots = sampler, []
    before_step = module.on_train_batch_start
    module.on_train_batch_start = lambda *a: (snapshots.append(arena.weights(module).clone()), before_step(*a))[1]
    with pytest.warns(UserWarning, match="rollout 1: no token of its .* counts"):
        _, after, rows = trained(module, batches=2)
    start, one = snapshots
    assert not torch.equal(start, one)
    assert torch.equal(one, after)
    assert rows[1]["loss"] == 0
    assert rows[1]["response/truncated_fraction"] == (not edited.get("ended", True))


@pytest.mark.parametrize("stage", RL)
def test_responses_all_cut_off_count_unless_masked(stage, model_folder):
    before, after, rows = trained(rl(stage, model_folder, sampling=Sampling(max_new_tokens=8, stop_ids=())))
    assert not torch.equal(before, after)
    assert (rows[0]["response/truncated_fraction"], rows[0]["response/length_mean"]) == (1, 8)


@pytest.mark.parametrize("stage", RL)
def test_an_end_token_at_once_is_a_response_of_one_token(stage, model_folder):
    before, after, rows = trained(rl(stage, model_folder, sampling=Sampling(max_new_tokens=8, stop_ids=range(259))))
    assert not torch.equal(before, after)
    assert (rows[0]["response/eos_fraction"], rows[0]["response/length_mean"]) == (1, 1)


@pytest.mark.parametrize("stage", RL)
def test_some_responses_without_tokens_leave_the_others_as_they_are(stage, model_folder):
    """An empty response weighs nothing: its log-probs, values and advantages are of no token."""
    module = rl(stage, model_folder, lambda prompts, completions: [float(len(c)) for c in completions])
    module.sampler, parts = Edited([0, 3, 5, 2]), []
    assess = module.assess
    module.assess = lambda rollout: parts.append(assess(rollout)) or parts[-1]
    before, after, rows = trained(module)
    assert not torch.equal(before, after)
    assert rows[0]["response/length_mean"] == 2.5
    assert not parts[0].advantages[parts[0].lengths == 0].any()


# -- tokenizers, vocabularies, context -------------------------------------------------------------------------------


def rows_of(stage, text: str = " answer", count: int = 8) -> list[dict]:
    if stage is RewardModeling:
        return [{"prompt": f"Q{i}:", "chosen": f"{text}{i}", "rejected": " no"} for i in range(count)]
    return [{"prompt": f"Q{i}:", "completion": f"{text}{i}"} for i in range(count)]


def fit(stage, folder: str, rows: list[dict], tmp_path, data: dict | None = None, **knobs):
    """Train a step on rows of a file, with a validation; the stage and its data."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    module = rl(stage, folder, **knobs) if stage in RL else stage(folder, optim=ADAM, **knobs)
    served = STAGES[stage](str(path), batch_size=2, val_fraction=0.25, **(data or {}))
    arena.trainer(max_steps=1, limit_val_batches=1).fit(module, datamodule=served)
    assert arena.weights(module).isfinite().all()
    return module, served


def folder_with(tmp_path, model=None, **special) -> str:
    """A model folder whose tokenizer has other special tokens."""
    tokenizer = tiny.tiny_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    (model or tiny.tiny_llama()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("special", [{"pad_token": "</s>"}, {"pad_token": None}])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_that_is_the_end_token_changes_nothing(stage, special, model_folder, tmp_path, caplog):
    plain, _ = fit(stage, model_folder, rows_of(stage), tmp_path)
    assert "told apart by lengths" not in caplog.text
    with caplog.at_level(logging.INFO):
        other, served = fit(stage, folder_with(tmp_path, **special), rows_of(stage), tmp_path)
    assert "padding is the end token (2), told apart by lengths" in caplog.text
    assert torch.equal(arena.weights(plain), arena.weights(other))
    if stage is SFT:  # the end is learned
        batch = next(iter(served.train_dataloader()))
        last = batch.mask.sum(dim=1) - 1
        assert batch.ids.gather(1, last[:, None]).eq(2).all()
        assert batch.loss_mask.gather(1, last[:, None]).all()


def test_neither_padding_nor_end_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        load_tokenizer(folder_with(tmp_path, pad_token=None, eos_token=None))


@pytest.mark.parametrize("stage", STAGES)
def test_messages_without_a_chat_template(stage, tmp_path):
    folder = folder_with(tmp_path, chat_template=None)
    with pytest.raises(DataError, match=r"rows\.jsonl.*1.*no chat template.*set chat_template .*dialogue"):
        fit(stage, folder, rows_of(stage), tmp_path, {"chat": True})
    fit(stage, folder, rows_of(stage), tmp_path, {"chat": True, "chat_template": "dialogue"})


@pytest.mark.parametrize("stage", STAGES)
def test_a_vocabulary_larger_than_the_tokenizer_trains(stage, tmp_path):
    model = tiny.tiny_llama()
    with torch.random.fork_rng():
        model.resize_token_embeddings(320)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 100  # so that tokens are drawn which the tokenizer does not know
    trained, _ = fit(stage, folder_with(tmp_path, model), rows_of(stage), tmp_path)
    assert networks(trained)[0].get_input_embeddings().num_embeddings == 320


@pytest.mark.parametrize("stage", STAGES)
def test_a_vocabulary_smaller_than_the_tokenizer_is_an_error_that_names_row_and_id(stage, tmp_path):
    folder = folder_with(tmp_path, tiny.tiny_llama(vocab_size=200))
    rows = rows_of(stage, count=8)
    rows[3]["prompt"] = "a blank"  # the byte tokenizer's last ids are those of blanks and control characters
    with pytest.raises(DataError, match=r"rows\.jsonl.*token id 2\d\d is beyond the model's vocabulary of 200"):
        fit(stage, folder, rows, tmp_path)


def exactly(stage, tokens: int) -> list[dict]:
    """Rows of so many tokens, one a byte, what is put before and behind text included; one of them a token longer."""
    beside = {SFT: 3 + 2 + 1, RewardModeling: 3 + 2 + 1, PPO: 0, GRPO: 0}[stage]
    rows = rows_of(stage)
    for i, row in enumerate(rows):
        long = "x" * (tokens - beside + (i == 5)) if stage in RL else "x" * (tokens - 3 - 1 + (i == 5))
        row["prompt" if stage in RL else "completion" if stage is SFT else "chosen"] = long
    return rows


@pytest.mark.parametrize("model", [tiny.tiny_llama(max_position_embeddings=40), tiny.tiny_gpt2()])
@pytest.mark.parametrize("stage", STAGES)
def test_rows_at_the_context_limit_train_and_longer_ones_are_named(stage, model, tmp_path):
    if stage is RewardModeling and model.config.model_type == "gpt2":
        model = tiny.tiny_llama(max_position_embeddings=256)
    folder, limit = folder_with(tmp_path, model), model.config.max_position_embeddings
    longest = limit - arena.SHORT.max_new_tokens if stage in RL else limit
    rows, what = exactly(stage, longest), "what the model's" if stage in RL else "the model's positions"
    with pytest.raises(DataError, match=rf"rows\.jsonl.*6.*{longest + 1} tokens are more than {what}.*drop"):
        fit(stage, folder, rows, tmp_path)
    _, served = fit(stage, folder, rows, tmp_path, {"too_long": "drop", "max_dropped": 0.2})
    assert sum(served.dropped.values()) == 1
    batch = next(iter(served.train_dataloader()))
    assert int(batch.mask.sum(dim=1).max()) == longest
