"""The mechanism under PPO and GRPO: plan, identity at the first minibatch, invariance, counters, guards, resume."""

from __future__ import annotations

import arena
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import Lora, Network
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.stages import GRPO, PPO, Optim
from lit_rlhf.stages.settings import Updates
from lit_rlhf.stages.updates import Plan


def ppo(folder: str, **knobs) -> PPO:
    settings = {"sampling": arena.SHORT, "optim": Optim(lr=1e-3, eps=1e-5), **knobs}
    return PPO(folder, rewards=[arena.low_ids], **settings)


def grpo(folder: str, **knobs) -> GRPO:
    settings = {"sampling": arena.SHORT, "optim": Optim(lr=1e-3), "group_size": 4, **knobs}
    return GRPO(folder, rewards=[arena.low_ids], **settings)


BOTH = pytest.mark.parametrize("build", [ppo, grpo])


def test_plan_covers_every_row_once_an_epoch_and_starts_in_sampled_order():
    plan = Plan(Updates(epochs=3, minibatches=2, micro_batch_tokens=10))
    plan.draw_up(arena.rollout([3, 1, 1, 3, 2, 2, 2, 2]), seed=1, max_over_ranks=lambda counts: counts)
    assert len(plan.steps) == plan.count == 6
    assert [sorted(torch.cat(step).tolist()) for step in plan.steps[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [rows.tolist() for rows in plan.steps[0]] == [[1, 2], [0, 3]]  # like lengths together, within the bound
    assert [rows.tolist() for rows in plan.steps[1]] == [[4, 5], [6, 7]]
    later = [torch.cat([torch.cat(step) for step in plan.steps[2 * e : 2 * e + 2]]).tolist() for e in (1, 2)]
    assert sorted(later[0]) == sorted(later[1]) == list(range(8))
    assert set(later[0][:4]) != set(later[1][:4]) != {0, 1, 2, 3}
    assert plan.parts(like_updates=True) == plan.steps[0] + plan.steps[1]
    assert sorted(torch.cat(plan.parts(like_updates=False)).tolist()) == list(range(8))
    assert len(plan.parts(like_updates=False)) < 4


def test_all_processes_plan_as_many_passes():
    counts = []
    for lengths in ([3, 3, 3, 3], [9, 1, 1, 1], [9, 9, 9, 9]):
        Plan(Updates(micro_batch_tokens=14)).draw_up(
            arena.rollout(lengths), seed=1, max_over_ranks=lambda found: counts.append(found) or found
        )
    most = torch.stack(counts).amax(dim=0)
    for lengths in ([3, 3, 3, 3], [9, 1, 1, 1], [9, 9, 9, 9]):
        plan = Plan(Updates(micro_batch_tokens=14))
        plan.draw_up(arena.rollout(lengths), seed=1, max_over_ranks=lambda found: torch.maximum(found, most))
        assert [len(step) for step in plan.steps] + [len(plan.wide)] == most.tolist()
        assert sorted(torch.cat(plan.steps[0]).tolist()) == [0, 1, 2, 3]


def test_rows_that_do_not_divide_into_minibatches_are_refused(model_folder):
    with pytest.raises(MisconfigurationException, match="does not divide into minibatches=3"):
        arena.fit(ppo(model_folder, updates=Updates(minibatches=3)), [arena.prompts(4)])


@BOTH
@pytest.mark.parametrize("micro_batch_tokens", [None, 30])
def test_first_minibatch_has_ratio_exactly_one(build, micro_batch_tokens, model_folder):
    """Same weights, same rows, same padding: the trainer's log-probs are those of the scoring pass to the last bit."""
    updates = Updates(epochs=2, minibatches=2, micro_batch_tokens=micro_batch_tokens, sampler_gap=0.0)
    stage = build(model_folder, updates=updates)
    seen: list[dict[str, float]] = []
    mean_metrics = stage.updates.mean_metrics

    def watch(step=None):
        if not seen:
            first = mean_metrics(0)
            seen.append({key: float(value) for key, value in first.items()})
            seen.append({key: float(value) for key, value in mean_metrics(3).items()})
        return mean_metrics(step)

    stage.updates.mean_metrics = watch
    arena.fit(stage, [arena.prompts(4)])
    first, last = seen
    assert (first["policy/ratio_mean"], first["policy/ratio_var"]) == (1.0, 0.0)
    assert (first["policy/approx_kl"], first["policy/clip_fraction"]) == (0.0, 0.0)
    assert last["policy/approx_kl"] > 0


@BOTH
def test_microbatches_change_nothing(build, model_folder):
    results = []
    for micro_batch_tokens in (None, 1, 30):
        stage = build(model_folder, updates=Updates(epochs=2, minibatches=2, micro_batch_tokens=micro_batch_tokens))
        log = arena.Log()
        # One rollout: the next would be drawn from weights that differ in their last digits, and a draw may tip over.
        arena.fit(stage, [arena.prompts(4)], callbacks=[log], gradient_clip_val=1.0)
        results.append((arena.weights(stage), log.rows[-1]))
    for weights, metrics in results[1:]:
        torch.testing.assert_close(weights, results[0][0], atol=2e-5, rtol=0)
        assert metrics["loss"] == pytest.approx(results[0][1]["loss"], abs=1e-4)


@BOTH
def test_one_batch_of_prompts_is_one_global_step(build, model_folder):
    stage = build(model_folder, updates=Updates(epochs=3, minibatches=2))
    log = arena.Log()
    run = arena.fit(stage, [arena.prompts(4), arena.prompts(4, seed=1)], callbacks=[log])
    assert run.global_step == 2
    assert log.rows[-1]["updates"] == 12
    assert log.rows[-1]["episodes"] == 8 * stage.samples_per_prompt
    assert log.rows[-1]["tokens"] > log.rows[-1]["episodes"]


@BOTH
def test_target_kl_stops_the_updates_of_a_rollout(build, model_folder):
    log = arena.Log()
    stage = build(model_folder, updates=Updates(epochs=8, target_kl=1e-4), optim=Optim(lr=1e-2))
    arena.fit(stage, [arena.prompts(4)], callbacks=[log])
    assert log.rows[0]["updates"] == 2  # the first update is made at KL 0, the second sees it exceeded and is the last


@BOTH
def test_every_setting_of_the_updates_moves_the_weights(build, model_folder):
    def trained(**settings) -> torch.Tensor:
        stage = build(model_folder, updates=Updates(**{"epochs": 3, **settings}))
        arena.fit(stage, [arena.prompts(4), arena.prompts(4, seed=1)])
        return arena.weights(stage)

    plain = trained()
    assert torch.equal(plain, trained())
    changes = [{"epochs": 2}, {"minibatches": 2}, {"target_kl": 1e-6}]
    assert not [change for change in changes if torch.equal(plain, trained(**change))]


def test_accumulating_over_rollouts_is_refused(model_folder):
    with pytest.raises(MisconfigurationException, match="micro_batch_tokens"):
        arena.fit(grpo(model_folder), [arena.prompts(4)], accumulate_grad_batches=2)


def test_half_precision_weights_are_refused(model_folder):
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        arena.fit(grpo(model_folder), [arena.prompts(4)], precision="bf16-true")


@BOTH
def test_bf16_mixed_trains(build, model_folder):
    stage = build(model_folder, frozen_dtype="bfloat16")
    before = arena.weights(stage)
    arena.fit(stage, [arena.prompts(4)], precision="bf16-mixed")
    after = arena.weights(stage)
    assert after.dtype == torch.float32
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@BOTH
@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_resume_continues_bit_for_bit_and_the_checkpoint_holds_no_frozen_weights(build, lora, model_folder, tmp_path):
    """Four rollouts at once, and two, a checkpoint, two more: the same weights, metrics and counters."""
    batches = [arena.prompts(4, seed=i) for i in range(4)]
    knobs = {
        "updates": Updates(epochs=2, minibatches=2),
        "network": Network(lora=lora),
        "optim": Optim(lr=1e-3, schedule="linear"),
    }

    def keep():
        return ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    log, whole = arena.Log(), build(model_folder, **knobs)
    arena.fit(whole, batches, callbacks=[keep(), log], enable_checkpointing=True, max_steps=4)

    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert state["hyper_parameters"]["updates"]["epochs"] == 2
    assert not [key for key in state["state_dict"] if key.startswith(("reference.", "rewards."))]
    if lora:
        assert not [key for key in state["state_dict"] if key.startswith("policy.") and "lora_" not in key]

    # A plain loader has no position of its own: the resumed run is given what is left first, as the DataModule would.
    resumed, again = build(model_folder, **knobs), arena.Log()
    left_first, settings = batches[2:] + batches[:2], {"enable_checkpointing": True, "max_steps": 4}
    path = str(tmp_path / "step=2.ckpt")
    arena.fit(resumed, left_first, callbacks=[keep(), again], ckpt_path=path, **settings)
    torch.testing.assert_close(arena.weights(resumed), arena.weights(whole), rtol=0, atol=0)
    timeless = [key for key in log.rows[-1] if not key.startswith(("time/", "throughput/"))]
    assert {k: again.rows[-1][k] for k in timeless} == {k: log.rows[-1][k] for k in timeless}


@BOTH
def test_the_samplers_log_probs_serve_while_they_are_the_trainers(build, model_folder):
    """With a bound that fp32 keeps, no pass over all rows; with one it does not keep, or none, the pass is made."""

    def old_logprobs(**settings):
        stage, seen = build(model_folder, updates=Updates(**settings)), []
        fill = stage.updates.fill
        stage.updates.fill = lambda rollout, *more: (seen.append(rollout), fill(rollout, *more))
        log = arena.Log()
        arena.fit(stage, [arena.prompts(16)], callbacks=[log])
        assert 0 < log.rows[0]["sampler/logprob_gap_max"] < 1e-5
        assert abs(log.rows[0]["policy/ratio_mean"] - 1) < 1e-5
        return seen[0].old_logprobs, seen[0].sampler_logprobs

    old, sampled = old_logprobs()
    assert torch.equal(old, sampled)
    for settings in ({"sampler_gap": 0.0}, {"sampler_gap": 1e-12}):
        old, sampled = old_logprobs(**settings)
        assert not torch.equal(old, sampled)
        torch.testing.assert_close(old, sampled, atol=1e-5, rtol=0)


@pytest.fixture
def cheap_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass costs next to nothing, so that even a tiny rollout's prompts are shared."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)


def test_a_plan_keeps_the_answers_to_a_prompt_together(cheap_passes):
    lengths = [3, 9, 1, 5, 2, 8, 4, 7] * 2
    rollout = arena.rollout(lengths)
    prompts = torch.arange(4).repeat_interleave(4)[:, None].expand(16, 6) + 7
    rollout = rollout.with_(prompt_ids=prompts, prompt_mask=prompts > 0)
    plan, plain = (Plan(Updates(epochs=2, minibatches=2, micro_batch_tokens=30)) for _ in range(2))
    plan.draw_up(rollout, seed=1, max_over_ranks=lambda counts: counts, shares=True)
    plain.draw_up(rollout, seed=1, max_over_ranks=lambda counts: counts)
    groups = [sorted({int(prompts[row, 0]) - 7 for row in rows}) for rows in plan.parts(like_updates=True)]
    assert groups == [[0], [1], [2], [3]]
    assert len(plain.parts(like_updates=True)) > 4
    for step, other in zip(plan.steps, plain.steps, strict=True):
        assert sorted(torch.cat(step).tolist()) == sorted(torch.cat(other).tolist())
    more = Plan(Updates(epochs=2, minibatches=2, micro_batch_tokens=30))
    more.draw_up(rollout, seed=1, max_over_ranks=lambda counts: counts + 1, shares=True)
    assert [len(step) for step in [*more.steps, more.wide]] == [len(step) + 1 for step in [*plan.steps, plan.wide]]


def tokens_read(stage: GRPO) -> list[int]:
    seen: list[int] = []
    stage.policy.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("micro_batch_tokens", [None, 60])
def test_shared_prompts_change_nothing_but_the_time(micro_batch_tokens, cheap_passes, model_folder, monkeypatch):
    """And the first minibatch's ratio is exactly one: scoring and updates read the same microbatches alike."""
    results, updates = [], Updates(2, 2, micro_batch_tokens, sampler_gap=0.0)
    for is_shared in (True, False):
        if not is_shared:
            for room in ("stages.inner_loop", "models.causal"):
                monkeypatch.setattr(f"lit_rlhf.{room}.can_share", lambda model: False)
        stage, log, first = grpo(model_folder, updates=updates), arena.Log(), []
        seen, mean_metrics = tokens_read(stage), stage.updates.mean_metrics
        stage.updates.mean_metrics = lambda step=None, f=first, m=mean_metrics: f.append(m(0)) or m(step)
        arena.fit(stage, [arena.prompts(4), arena.prompts(4, seed=1)], callbacks=[log])
        assert (float(first[0]["policy/ratio_mean"]), float(first[0]["policy/approx_kl"])) == (1.0, 0.0)
        results.append((arena.weights(stage), log.rows[-1]["loss"], sum(seen)))
    (shared, loss, fewer), (whole, other, more) = results
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=0)
    assert loss == pytest.approx(other, abs=1e-4)
    assert fewer < 0.85 * more
