"""SFT: the token-weighted mean that accumulation does not change, what is learned, what is logged and saved."""

from __future__ import annotations

import json
import math

import arena
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, MambaConfig

from lit_rlhf.batch import Examples
from lit_rlhf.data import SFTData
from lit_rlhf.models import Lora, Network, load_scalar, save_scalar
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.rewards import RewardModel
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import SFT, Optim


def sft(folder: str, **knobs) -> SFT:
    return SFT(folder, **{"optim": Optim(lr=1e-3), "sampling": Sampling(max_new_tokens=4), **knobs})


def rows(batch: Examples, chosen: slice) -> Examples:
    return batch.select(torch.arange(len(batch))[chosen])


def naive_loss(folder: str, batch: Examples) -> torch.Tensor:
    """Cross-entropy of transformers' own logits, the unlearned positions ignored."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    labels = batch.ids.where(batch.loss_mask, -100)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).detach()


def test_loss_and_first_step_equal_cross_entropy_on_transformers_logits(model_folder):
    batch, log = arena.examples(8), arena.Log()
    stage = sft(model_folder, optim=Optim(lr=1e-3, eps=1.0))  # a large ε makes Adam's step proportional to the gradient
    before = arena.weights(stage)
    arena.fit(stage, [batch], callbacks=[log])
    expected = naive_loss(model_folder, batch)
    assert log.rows[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert log.rows[0]["perplexity"] == pytest.approx(math.exp(float(expected)), rel=1e-4)
    model = tiny.tiny_llama(0)
    labels = batch.ids.where(batch.loss_mask, -100)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    step = before - arena.weights(stage)
    torch.testing.assert_close(step, 1e-3 * gradient / (gradient.abs() + 1.0), atol=1e-7, rtol=1e-2)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_changes_nothing_however_ragged_the_batches(clip, model_folder):
    batch, results = arena.examples(8), []
    for size in (8, 2, 1):
        stage = sft(model_folder)
        batches = [rows(batch, slice(i, i + size)) for i in range(0, 8, size)]
        arena.fit(stage, batches, accumulate_grad_batches=8 // size, gradient_clip_val=clip)
        results.append(arena.weights(stage))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=0)


def test_a_step_is_divided_by_its_own_tokens(model_folder):
    """At a learning rate of 0 the second step's gradient is the first one's."""
    gradients = []
    for steps in (1, 2):
        stage = sft(model_folder, optim=Optim(lr=0.0))
        arena.fit(stage, [arena.examples(4)] * steps)
        gradients.append(torch.cat([p.grad.flatten() for p in stage.policy.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=0)


def test_what_stands_outside_the_loss_mask_is_not_learned(model_folder):
    batch = arena.examples(4)
    nothing = batch.with_(loss_mask=torch.zeros_like(batch.loss_mask))
    stage = sft(model_folder)
    before = arena.weights(stage)
    arena.fit(stage, [nothing])
    torch.testing.assert_close(arena.weights(stage), before, atol=0, rtol=0)


def test_validation_is_token_weighted_and_shows_samples(model_folder):
    stage, held_out = sft(model_folder, sample_prompts=2), arena.examples(6, seed=3)
    run = arena.trainer()
    metrics = run.validate(
        stage, arena.loader([rows(held_out, slice(0, 1)), rows(held_out, slice(1, 6))]), verbose=False
    )
    assert metrics[0]["val/loss"] == pytest.approx(float(naive_loss(model_folder, held_out)), rel=1e-5)
    assert metrics[0]["val/perplexity"] == pytest.approx(math.exp(metrics[0]["val/loss"]), rel=1e-5)
    assert [sample["mode"] for sample in stage.samples] == ["greedy", "sampled"] * 2  # the first batch has one row
    assert {sample["score"] for sample in stage.samples} == {None}
    assert "val/score" not in metrics[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_to_count_and_to_end(seed, model_folder):
    """On counting sequences the loss falls from ln 259 to next to nothing and greedy continuation counts on."""
    batches = [arena.examples(16, seed=100 * seed + i) for i in range(120)]
    stage, log = sft(model_folder, optim=Optim(lr=5e-3, schedule="cosine"), seed=seed), arena.Log()
    run = arena.fit(stage, batches, [arena.examples(16, seed=999 + seed)], callbacks=[log])
    assert log.rows[0]["loss"] > 5
    assert float(run.callback_metrics["val/loss"]) < 1.0
    assert float(run.callback_metrics["val/token_accuracy"]) > 0.8
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-4, rel=1e-2)  # cosine to 10 %


def test_lora_trains_the_adapter_only_and_exports_merged(model_folder, tmp_path):
    stage = sft(model_folder, network=Network(lora=Lora(r=4, alpha=8)), optim=Optim(lr=1e-2))
    assert all("lora_" in name for name, p in stage.policy.named_parameters() if p.requires_grad)
    arena.fit(stage, [arena.examples(8)])
    stage.export(str(tmp_path / "merged"))
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), arena.examples(4).ids
    stage.eval()
    torch.testing.assert_close(merged(ids).logits, stage.policy(ids).logits, atol=1e-5, rtol=0)
    assert not torch.equal(merged(ids).logits, AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits)


def test_checkpoint_loads_weights_only_and_rebuilds_the_stage(model_folder, tmp_path):
    stage = sft(model_folder, network=Network(lora=Lora(r=4, alpha=8)))
    run = arena.fit(stage, [arena.examples(8)])
    run.save_checkpoint(tmp_path / "sft.ckpt")
    torch.load(tmp_path / "sft.ckpt", weights_only=True)
    again = SFT.load_from_checkpoint(tmp_path / "sft.ckpt")
    assert again.optim == stage.optim
    torch.testing.assert_close(arena.weights(again), arena.weights(stage), atol=0, rtol=0)


def test_reading_in_parts_changes_nothing_but_the_padding(model_folder, monkeypatch):
    """Loss, gradient, counts and validation of a batch that is cut into several parts are those of the whole."""
    results = []
    for overhead in (10**6, 1):
        monkeypatch.setitem(PASS_TOKENS, "cpu", overhead)
        stage, log = sft(model_folder, optim=Optim(lr=1.0, eps=1.0), sample_prompts=0), arena.Log()
        passes = []
        stage.policy.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        run = arena.fit(stage, [arena.examples(8)], [arena.examples(8, seed=3)], callbacks=[log])
        held_out = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")}
        results.append((len(passes), arena.weights(stage), log.rows[0], held_out))
    (whole, whole_weights, whole_row, whole_held_out), (parted, weights, row, held_out) = results
    assert parted > whole + 2
    torch.testing.assert_close(weights, whole_weights, atol=1e-5, rtol=0)
    assert row == pytest.approx(whole_row, rel=1e-5)
    assert held_out == pytest.approx(whole_held_out, rel=1e-3)  # of weights that differ in the last bits
    assert (row["tokens"], row["token_accuracy"]) == (whole_row["tokens"], whole_row["token_accuracy"])


def test_continuations_are_judged_over_as_many_prompts_as_asked_for(model_folder, tmp_path):
    """Three prompts in two batches: ``val/score`` is the mean over all three, the same at every validation."""
    held_out, judge = arena.examples(6, seed=3), arena.low_ids
    batches = [rows(held_out, slice(0, 1)), rows(held_out, slice(1, 6))]
    stage = sft(model_folder, sample_prompts=3, rewards=[judge])
    metrics = [arena.trainer().validate(stage, arena.loader(batches), verbose=False)[0] for _ in range(2)]
    scores = [sample["score"] for sample in stage.samples if sample["mode"] == "sampled"]
    assert len(scores) == 3
    assert metrics[0]["val/score"] == metrics[1]["val/score"] == pytest.approx(sum(scores) / 3, rel=1e-6)
    assert {"val/loss", "val/perplexity"} < set(metrics[0])


def test_a_reward_model_judges_and_is_in_no_checkpoint(model_folder, tmp_path):
    save_scalar(load_scalar(model_folder), tiny.tiny_tokenizer(), tmp_path / "reward")
    stage = sft(model_folder, rewards=[RewardModel(str(tmp_path / "reward"))])
    run = arena.fit(stage, [arena.examples(4)], [arena.examples(4)])
    assert math.isfinite(run.callback_metrics["val/score"])
    run.save_checkpoint(tmp_path / "sft.ckpt")
    kept = torch.load(tmp_path / "sft.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in kept} == {"policy", "tokens", "skipped_updates", "skipped_in_a_row"}
    assert SFT.load_from_checkpoint(tmp_path / "sft.ckpt").rewards is None


def test_packing_changes_rows_and_passes_but_no_number(model_folder):
    """Loss, step, counts and validation are those of one example a row, also under noise."""
    results = []
    for packing in (False, True):
        stage = sft(model_folder, optim=Optim(lr=1.0, eps=1.0), sample_prompts=0, packing=packing, neftune_alpha=5.0)
        log, read = arena.Log(), list[torch.Size]()
        hook = stage.policy.model.register_forward_pre_hook
        hook(lambda _, args, kwargs, read=read: read.append(kwargs["input_ids"].shape), with_kwargs=True)
        run = arena.fit(stage, [arena.examples(8)], [arena.examples(8, seed=3)], callbacks=[log])
        held_out = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")}
        results.append((read[-1], arena.weights(stage), log.rows[0], held_out))
    (_, plain_weights, plain_row, plain_held_out), (shape, weights, row, held_out) = results
    assert shape[0] < 8
    torch.testing.assert_close(weights, plain_weights, atol=1e-5, rtol=0)
    assert row == pytest.approx(plain_row, rel=1e-5)
    assert held_out == pytest.approx(plain_held_out, rel=1e-3)  # of weights that differ in the last bits


def test_a_model_that_cannot_be_packed_stops_the_run_by_name(tmp_path):
    config = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    stage = sft(str(tmp_path), packing=True, network=Network(attention="eager"))
    with pytest.raises(ValueError, match=r"MambaForCausalLM lets examples .* set packing: false"):
        arena.fit(stage, [arena.examples(4)])


def test_neftune_noise_moves_the_loss_and_not_the_validation(model_folder):
    losses, held_out = [], set()
    for alpha in (0.0, 5.0, 15.0, 5.0):
        stage = sft(model_folder, optim=Optim(lr=0.0), sample_prompts=0, neftune_alpha=alpha)
        log = arena.Log()
        run = arena.fit(stage, [arena.examples(8)], [arena.examples(8, seed=3)], callbacks=[log])
        losses.append(log.rows[0]["loss"])
        held_out.add(float(run.callback_metrics["val/loss"]))
        assert not stage.policy.model.embed_tokens._forward_hooks
    assert len(set(losses)) == 3
    assert losses[1] == losses[3]
    assert len(held_out) == 1


def test_every_batch_has_noise_and_dropout_of_its_own(model_folder):
    """At a learning rate of 0 equal batches differ only in what is drawn, also those of one accumulated step."""
    for knobs in ({"neftune_alpha": 5.0}, {"network": Network(residual_dropout=0.2)}):
        log = arena.Log()
        stage = sft(model_folder, optim=Optim(lr=0.0), **knobs)
        arena.fit(stage, [arena.examples(4)] * 4, callbacks=[log], accumulate_grad_batches=2)
        assert len({row["loss"] for row in log.rows}) == 4


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_draws_the_same_noise_and_dropout(steps, model_folder, tmp_path):
    """Bitwise, within an accumulated epoch, whatever else the resuming process drew."""
    knobs = {"neftune_alpha": 5.0, "network": Network(residual_dropout=0.2, dropout=0.1, lora=Lora(r=4, dropout=0.1))}
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in range(2, 10)))
    callback = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    settings, rows_of_two = {"accumulate_grad_batches": 2, "max_epochs": 2}, {"val_fraction": 0, "batch_size": 2}
    ckpt = tmp_path / f"step={steps}.ckpt"
    whole, again = sft(model_folder, **knobs), sft(model_folder, **knobs)
    arena.trainer(callbacks=[callback], enable_checkpointing=True, **settings).fit(
        whole, datamodule=SFTData(str(source), **rows_of_two)
    )
    torch.rand(7)
    arena.trainer(**settings).fit(again, datamodule=SFTData(str(source), **rows_of_two), ckpt_path=ckpt)
    torch.testing.assert_close(arena.weights(again), arena.weights(whole), atol=0, rtol=0)


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_noise_of_no_sensible_size_is_refused(alpha, model_folder):
    with pytest.raises(ValueError, match="neftune_alpha is"):
        sft(model_folder, neftune_alpha=alpha)
