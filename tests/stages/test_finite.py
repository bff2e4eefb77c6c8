"""NaN and infinity planted in losses, log-probs and gradients: they never reach the weights, and are named."""

from __future__ import annotations

import types

import arena
import pytest
import torch

from lit_rlhf.stages import GRPO, PPO, SFT, Optim, RewardModeling, Updates
from lit_rlhf.stages.finite import Watch
from lit_rlhf.stages.penalties import steer_kl
from lit_rlhf.stages.settings import KL

NAN, INF = float("nan"), float("inf")
STAGES = [SFT, RewardModeling, PPO, GRPO]
EVERY = pytest.mark.parametrize("stage", STAGES)
SKIP = {"nonfinite": "skip"}


def build(stage, folder, updates=None, **optim):
    knobs = {"optim": Optim(lr=1e-3, **optim)}
    if stage in (PPO, GRPO):
        knobs |= {"rewards": [arena.low_ids], "sampling": arena.SHORT, "updates": updates or Updates()}
    if stage is GRPO:
        knobs["group_size"] = 4
    return stage(folder, **knobs)


def batches(stage, count):
    make = {SFT: arena.examples, RewardModeling: arena.pairs}.get(stage, arena.prompts)
    return [make(4, seed=i) for i in range(count)]


def network(module):
    return module.reward if isinstance(module, RewardModeling) else module.policy


def plant(module, steps, value=NAN):
    """Put ``value`` into the gradient of one weight at the given backward passes of the policy, counted from 0."""
    weight, passes = next(network(module).parameters()), []

    def spoil(grad):
        passes.append(1)
        return grad.index_fill(0, torch.tensor([3]), value) if len(passes) - 1 in steps else grad

    weight.register_hook(spoil)
    return module


def fit(module, given, **settings):
    log = arena.Log()
    run = arena.fit(module, given, callbacks=[log], **settings)
    (optimizer,) = run.optimizers
    moments = [torch.cat([state[key].flatten() for key in sorted(state)]) for state in optimizer.state.values()]
    return arena.weights(module), moments, log.rows


# -- a step that is skipped is as if it had never been ----------------------------------------------------------------


@pytest.mark.parametrize("stage", [SFT, RewardModeling])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.1, "algorithm": "value"}])
def test_a_run_with_a_skipped_step_is_the_run_without_that_batch(stage, value, clip, model_folder):
    clip = {key.replace("algorithm", "gradient_clip_algorithm"): given for key, given in clip.items()}
    given = batches(stage, 3)
    module = plant(build(stage, model_folder, **SKIP), [1], value)
    with pytest.warns(UserWarning, match=rf"{stage.__name__}, step 1: not finite: the gradient of .*weight.*left out"):
        weights, moments, rows = fit(module, given, **clip)
    expected, expected_moments, _ = fit(build(stage, model_folder, **SKIP), [given[0], given[2]], **clip)
    assert torch.equal(weights, expected)
    assert all(torch.equal(a, b) for a, b in zip(moments, expected_moments, strict=True))
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1]


@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_a_skipped_update_of_a_rollout_leaves_the_others(stage, model_folder):
    given = batches(stage, 1)
    module = plant(build(stage, model_folder, Updates(epochs=2), weight_decay=0.1, **SKIP), [1])
    with pytest.warns(UserWarning, match="update 2 of the rollout's 2"):
        weights, moments, rows = fit(module, given)
    expected, expected_moments, _ = fit(build(stage, model_folder, Updates(epochs=1), weight_decay=0.1), given)
    assert torch.equal(weights, expected)
    assert all(torch.equal(a, b) for a, b in zip(moments, expected_moments, strict=True))
    assert (rows[0]["updates"], rows[0]["skipped_updates"]) == (1, 1)


def test_the_very_first_step_can_be_skipped(model_folder):
    module = build(SFT, model_folder, weight_decay=1.0, **SKIP)
    before = arena.weights(module)
    with pytest.warns(UserWarning, match="left out"):
        weights, moments, _ = fit(plant(module, [0]), batches(SFT, 1))
    assert torch.equal(weights, before)
    assert not moments


# -- what is not finite is named, and stops the run by default --------------------------------------------------------


@EVERY
def test_a_bad_gradient_stops_the_run_before_it_moves_a_weight(stage, model_folder):
    module = plant(build(stage, model_folder), [0])
    before = arena.weights(module)
    weight = next(name for name, _ in module.named_parameters())
    with pytest.raises(FloatingPointError, match=f"{stage.__name__}, step 0: not finite: .*the gradient of {weight}"):
        arena.fit(module, batches(stage, 1))
    assert torch.equal(arena.weights(module), before)


def test_an_infinite_loss_names_the_rows(model_folder):
    """Its gradient may well be finite: −∞ added to a log-prob has none."""
    module = build(SFT, model_folder)
    read = module.read

    def spoilt(batch, noise=None):
        logprobs, correct, mask = read(batch, noise)
        return logprobs + torch.tensor([0.0, -INF, 0.0, -INF])[:, None], correct, mask

    module.read = spoilt
    with pytest.raises(FloatingPointError, match=r"step 0: not finite: the loss of rows 1, 3 of the batch\."):
        arena.fit(module, batches(SFT, 1))
    module = build(SFT, model_folder)
    calls, read = [], module.read
    module.read = lambda batch, noise=None: calls.append(1) or (spoilt if len(calls) == 2 else read)(batch, noise)
    with pytest.raises(FloatingPointError, match="rows 1, 3 of batch 1 of the step's 2"):
        arena.fit(module, batches(SFT, 2), accumulate_grad_batches=2)


def test_a_reward_models_prompts_are_named(model_folder):
    module = build(RewardModeling, model_folder)
    compare = module.compare
    module.compare = lambda batch: (compare(batch)[0] + torch.tensor([0.0, 0.0, INF, 0.0]), compare(batch)[1])
    with pytest.raises(FloatingPointError, match="the loss of rows 2 of the batch"):
        arena.fit(module, batches(RewardModeling, 1))


@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_the_microbatch_the_metrics_and_the_prompts_are_named(stage, model_folder):
    module = build(stage, model_folder, Updates(micro_batch_tokens=1))  # a row each
    loss, seen = module.loss, []

    def spoilt(part):
        seen.append(part)
        passes = {PPO: 2, GRPO: 1}[stage]
        if len(seen) - 1 in range(2 * passes, 3 * passes):
            part = part.with_(old_logprobs=part.old_logprobs * NAN)
        return loss(part)

    module.loss = spoilt
    group = 4 if stage is GRPO else 1
    rows = []
    fill = module.updates.fill
    module.updates.fill = lambda *given: rows.append(module.updates.steps[0][2].item()) or fill(*given)
    with pytest.raises(FloatingPointError) as caught:
        arena.fit(module, batches(stage, 1))
    prompt = rows[0] // group
    assert f"rows {rows[0]} (prompts {prompt}, first 'prompt {prompt}')" in str(caught.value)
    assert "update 1 of the rollout's 1; policy/" in str(caught.value)
    assert str(caught.value).count("(prompts") == 1


def test_beta_survives_a_kl_that_is_not_finite(model_folder):
    module = PPO(model_folder, rewards=[arena.low_ids], kl=KL(target=1.0))
    module.mean_over_ranks = lambda value: value
    steer_kl(module, torch.tensor(NAN), 4)
    assert float(module.kl_coef) == KL().coef
    steer_kl(module, torch.tensor(9.0), 4)
    assert float(module.kl_coef) > KL().coef


# -- how often --------------------------------------------------------------------------------------------------------


def test_too_many_in_a_row_stop_the_run(model_folder):
    module = plant(build(SFT, model_folder, most_skips=2, **SKIP), [1, 2, 3])
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(FloatingPointError, match=r"step 3: .* step 3 in a row.*optim.most_skips allows 2"),
    ):
        arena.fit(module, batches(SFT, 4))
    module = plant(build(SFT, model_folder, most_skips=2, **SKIP), [0, 1, 3, 4])
    with pytest.warns(UserWarning, match="left out"):
        arena.fit(module, batches(SFT, 5))
    assert int(module.skipped_updates) == 4


@pytest.mark.parametrize("optim", [{"nonfinite": "ignore"}, {"most_skips": -1}])
def test_settings_that_mean_nothing_are_refused(optim):
    with pytest.raises(ValueError, match="expected 'stop' or 'skip'"):
        Optim(**optim)


def test_a_sound_run_says_nothing_and_logs_no_count(model_folder):
    _, _, rows = fit(build(SFT, model_folder), batches(SFT, 2))  # a warning would be an error
    assert "skipped_updates" not in rows[0]


def test_the_count_is_in_checkpoints_and_older_ones_load(model_folder):
    module = build(SFT, model_folder)
    module.skipped_updates += 3
    state = module.state_dict()
    other = build(SFT, model_folder)
    other.load_state_dict(state)
    assert int(other.skipped_updates) == 3
    del state["skipped_updates"]
    other.load_state_dict(state)
    assert int(other.skipped_updates) == 0


def test_a_gradient_scaler_keeps_its_own_counsel():
    """Under 16-mixed overflows are how the scale is found: the scaler leaves such steps out by itself."""
    module = torch.nn.Linear(1, 1)
    watch = Watch(module, Optim())
    module.trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=object()))
    watch.note(torch.tensor(NAN))
    assert watch.admits(module, None, {"policy": torch.tensor(INF)}, lambda _: [])
    assert not watch.losses
