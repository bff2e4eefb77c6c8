"""What makes one algorithm another: baselines, places of the KL, clip forms, dynamic sampling, refresh, steps."""

from __future__ import annotations

import arena
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import Lora, Network, token_logprobs
from lit_rlhf.objectives import importance_weights, rewards_to_go, token_rewards
from lit_rlhf.rewards import MissingEOS, Steps
from lit_rlhf.rollout import GenerateSampler, Sampling
from lit_rlhf.stages import GRPO, KL, PPO, Advantages, Clip, Correction, Entropy, Optim, Updates
from lit_rlhf.stages.fresh import _with_replacements


def grpo(folder: str, rewards=(arena.low_ids,), **knobs) -> GRPO:
    settings = {"sampling": arena.SHORT, "optim": Optim(lr=1e-3), "group_size": 4, **knobs}
    return GRPO(folder, rewards=list(rewards), **settings)


def moved(stage: GRPO | PPO) -> GRPO | PPO:
    """The stage with a policy that has left its reference."""
    with torch.no_grad():
        stage.policy.lm_head.weight.mul_(1.5)
    return stage


def filled(stage, batches=None):
    """The rollouts as the updates take them, and the metrics of each."""
    kept, log = [], arena.Log()
    fill = stage.updates.fill
    stage.updates.fill = lambda rollout, *more: (kept.append(rollout), fill(rollout, *more))
    arena.fit(stage, batches or [arena.prompts(2)], callbacks=[log])
    return kept, log.rows


# -- advantages --------------------------------------------------------------------------------------------------------


def test_leave_one_out_against_the_others_of_the_group(model_folder):
    """RLOO: the score less the mean of the other three, with β·KL of the whole response taken off the score."""
    knobs = {"advantages": Advantages("leave_one_out", "none"), "kl": KL(0.5, "k1", "score")}
    (rollout,), _ = filled(moved(grpo(model_folder, **knobs)))
    kl = ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask).sum(dim=1)
    scores = (rollout.scores - 0.5 * kl).tolist()
    groups = [scores[:4], scores[4:]]
    by_hand = [s - (sum(group) - s) / 3 for group in groups for s in group]
    torch.testing.assert_close(rollout.advantages, torch.tensor(by_hand)[:, None] * rollout.mask, atol=1e-5, rtol=0)


def test_reinforce_plus_plus_is_the_rest_of_score_and_kl_whitened_over_all_tokens(model_folder):
    knobs = {"advantages": Advantages("none", "none", whiten=True), "kl": KL(0.5, "k1", "reward"), "group_size": 1}
    (rollout,), logged = filled(moved(grpo(model_folder, **knobs)), [arena.prompts(6)])
    kl = (rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask
    later = kl.flip(1).cumsum(1).flip(1)
    credit = (rollout.scores[:, None] - 0.5 * later)[rollout.mask]
    expected = (credit - credit.mean()) / credit.var(correction=0).add(1e-8).sqrt()
    torch.testing.assert_close(rollout.advantages[rollout.mask], expected, atol=1e-5, rtol=1e-4)
    assert "policy/kl_loss" not in logged[0]  # it stands in the reward alone


def test_rewards_normalised_each_before_they_are_summed(model_folder):
    """A reward of a hundred times the size counts no more than the other."""

    def large(prompts, completions, completion_ids, **_):
        return [100.0 * len(ids) for ids in completion_ids]

    ragged = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 60)))
    stage = grpo(model_folder, [arena.low_ids, large], advantages=Advantages(mix="normalize_then_sum"), sampling=ragged)
    (rollout,), _ = filled(stage)
    each = []
    for name in ("low_ids", "large"):
        groups = rollout.parts[name].view(2, 4)
        each.append((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4))
    total = torch.stack(each).sum(dim=0).flatten()
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(rollout.advantages, expected[:, None] * rollout.mask, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("unseen", [{"kl": KL(0.1, "k1", "score")}, {"missing_eos": MissingEOS(), "kl": KL(0.0)}])
def test_what_changes_the_sum_of_rewards_is_refused_where_each_is_compared_by_itself(unseen, model_folder):
    with pytest.raises(ValueError, match=r"normalize_then_sum.* never see (kl\.place|missing_eos)"):
        grpo(model_folder, advantages=Advantages(mix="normalize_then_sum"), **unseen)
    grpo(model_folder, advantages=Advantages(), **unseen)
    grpo(model_folder, advantages=Advantages(mix="normalize_then_sum"), kl=KL(0.0, "k1", "score"))


def test_rewards_of_steps_are_refused_where_they_would_count_twice(model_folder):
    stage = grpo(model_folder, [step_judge, arena.low_ids], advantages=Advantages(mix="normalize_then_sum"))
    with pytest.raises(MisconfigurationException, match="a reward returned Steps"):
        filled(stage)


def step_judge(prompts, completions, completion_ids, **_):
    """One step ends at the second token, one at the last; the score of each is the id it ends with."""
    return [Steps([ids[1] / 100, ids[-1] / 100], [1, len(ids) - 1]) for ids in completion_ids]


def test_a_token_has_the_normalised_scores_of_the_steps_that_end_at_it_or_later(model_folder):
    (rollout,), logged = filled(grpo(model_folder, [step_judge], kl=KL(0.0)))
    last = rollout.lengths - 1
    scores = torch.stack([rollout.response_ids[:, 1], rollout.response_ids.gather(1, last[:, None])[:, 0]], dim=1) / 100
    assert logged[0]["rewards/step_judge/mean"] == pytest.approx(float(scores.sum(dim=1).mean()), rel=1e-5)
    for group in range(2):
        rows = scores[4 * group : 4 * group + 4]
        normal = (rows - rows.mean()) / (rows.std() + 1e-4)
        found = rollout.advantages[4 * group : 4 * group + 4]
        torch.testing.assert_close(found[:, 0], normal.sum(dim=1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[:, 1], normal.sum(dim=1), atol=1e-4, rtol=1e-3)
        ends = found.gather(1, last[4 * group : 4 * group + 4, None])[:, 0]
        torch.testing.assert_close(ends, normal[:, 1], atol=1e-4, rtol=1e-3)


def test_ppo_pays_the_score_of_a_step_at_its_last_token(model_folder):
    stage = PPO(model_folder, [step_judge, arena.low_ids], sampling=arena.SHORT, kl=KL(0.0))
    (rollout,), _ = filled(stage, [arena.prompts(4)])
    expected = torch.zeros_like(rollout.rewards)
    expected[:, 1] = rollout.response_ids[:, 1] / 100
    expected[:, -1] = rollout.response_ids[:, -1] / 100 + rollout.parts["low_ids"]
    torch.testing.assert_close(rollout.rewards, expected, atol=1e-5, rtol=0)


# -- KL and entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [grpo, lambda folder, **knobs: PPO(folder, [arena.low_ids], sampling=arena.SHORT, **knobs)]
)
@pytest.mark.parametrize("place", ["reward", "score", "loss"])
def test_kl_is_priced_in_one_place(build, place, model_folder):
    (rollout,), logged = filled(moved(build(model_folder, kl=KL(0.7, "k2", place))), [arena.prompts(4)])
    assert ("policy/kl_loss" in logged[0]) == (place == "loss")
    kl = ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask).square() / 2
    if rollout.values is not None:
        penalty = {"reward": kl, "score": torch.zeros_like(kl), "loss": torch.zeros_like(kl)}[place]
        scores = rollout.scores - (0.7 * kl.sum(dim=1) if place == "score" else 0.0)
        torch.testing.assert_close(
            rollout.rewards, token_rewards(scores, penalty, rollout.mask, kl_coef=0.7), atol=1e-5, rtol=0
        )
    elif place == "reward":
        relative = rollout.scores.view(-1, 4)
        relative = ((relative - relative.mean(1, keepdim=True)) / (relative.std(1, keepdim=True) + 1e-4)).flatten()
        paid = rewards_to_go(token_rewards(relative, kl, rollout.mask, kl_coef=0.7), rollout.mask, gamma=1.0)
        torch.testing.assert_close(rollout.advantages, paid, atol=1e-4, rtol=1e-3)


def test_the_kl_coefficient_adapts_in_grpo_too(model_folder):
    stage = grpo(model_folder, kl=KL(0.1, "k3", "loss", target=1.0, horizon=10))
    arena.fit(stage, [arena.prompts(1)])
    assert float(stage.kl_coef) == pytest.approx(0.1 * (1 - 0.2 * 4 / 10), rel=1e-5)


def test_the_penalty_to_the_old_policy_halves_and_doubles(model_folder):
    """KL of the last update far below the target: β halves; far above: it doubles; and it is saved."""
    still = grpo(model_folder, clip=Clip(form="penalty", penalty=1.0, penalty_target=100.0))
    arena.fit(still, [arena.prompts(2)] * 2)
    assert float(still.clip_penalty) == 0.25
    fast = grpo(model_folder, clip=Clip(form="penalty", penalty=1.0, penalty_target=1e-9), updates=Updates(epochs=2))
    arena.fit(fast, [arena.prompts(2)])
    assert float(fast.clip_penalty) == 2.0
    assert float(fast.state_dict()["clip_penalty"]) == 2.0


def test_the_entropy_bonus_goes_in_a_line_to_its_final_weight(model_folder):
    def entropies(**knobs):
        stage = grpo(model_folder, [arena.constant], kl=KL(0.0), optim=Optim(lr=1e-2), **knobs)
        _, logged = filled(stage, [arena.prompts(2)] * 4)
        return [row["policy/entropy"] for row in logged], arena.weights(stage)

    # Without any other signal the first rollout's bonus is 0 and nothing moves, the later ones' are not.
    rising, weights = entropies(entropy=Entropy(0.0, final=1.0))
    assert rising[3] > rising[1]
    assert not torch.equal(weights, entropies(entropy=Entropy(1.0))[1])
    with pytest.raises(Exception, match=r"entropy\.final needs to know where the run ends"):
        arena.fit(grpo(model_folder, entropy=Entropy(0.0, final=1.0)), [arena.prompts(2)], max_epochs=-1)


# -- who takes part ----------------------------------------------------------------------------------------------------


def sometimes(prompts, completions, completion_ids, **_):
    """No signal for even prompts."""
    return [
        0.5 if int(p.split()[1]) % 2 == 0 else sum(ids) / 1000 for p, ids in zip(prompts, completion_ids, strict=True)
    ]


def test_groups_without_signal_make_way_for_further_prompts(model_folder):
    """Prompts 0, 1, 2 are asked; 0 and 2 say nothing; 3 and 4 are asked for them; 4 says nothing; 5 takes its place."""
    stage = grpo(model_folder, [sometimes], groups=3)
    (rollout,), logged = filled(stage, [arena.prompts(7)])
    assert rollout.prompts[::4] == ("prompt 3", "prompt 1", "prompt 5")
    assert (logged[0]["groups/replaced"], logged[0]["groups/unused_prompts"]) == (2, 1)
    assert logged[0]["groups/zero_std_fraction"] == 0
    assert logged[0]["episodes"] == 6 * 4  # what was sampled, the discarded ones too
    assert logged[0]["tokens"] > int(rollout.mask.sum())
    # What a prompt draws does not depend on when it was asked.
    (everything,), _ = filled(grpo(model_folder, [sometimes]), [arena.prompts(7)])
    assert rollout.completions[8:12] == everything.completions[20:24]


def test_replacements_may_be_judged_by_their_steps(model_folder):
    """Prompt 0 says nothing and is judged as a whole, prompt 1 has one step, and prompt 2, which comes later, two."""

    def steps(prompts, completions, completion_ids, **_):
        numbers = [int(p.split()[1]) for p in prompts]
        scores = [[ids[0] / 100, ids[1] / 100][:n] for n, ids in zip(numbers, completion_ids, strict=True)]
        return [Steps(own, [0, 1][: len(own)]) if own else 0.5 for own in scores]

    for first in (1, 2):  # the first round has step scores of its own, or has none
        stage = grpo(model_folder, [steps], groups=first, advantages=Advantages(scale="none"))
        (rollout,), _ = filled(stage, [arena.prompts(4).select(torch.tensor([0, 2] if first == 1 else [1, 0, 2]))])
        assert rollout.prompts[-1] == "prompt 2"
        assert rollout.step_ends[-4:].tolist() == [[0, 1]] * 4
        assert rollout.step_ends[:-4].tolist() == [[0, -1]] * 4 * (first - 1)
        assert not rollout.outcomes.any()
        ids = rollout.response_ids[-4:, :2] / 100
        expected = (ids - ids.mean()).flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(rollout.advantages[-4:, :2], expected, atol=1e-5, rtol=0)


def test_groups_that_find_no_replacement_stay(model_folder):
    (rollout,), logged = filled(grpo(model_folder, [arena.constant], groups=2), [arena.prompts(3)])
    assert rollout.prompts[::4] == ("prompt 0", "prompt 1")
    assert (logged[0]["groups/replaced"], logged[0]["groups/unused_prompts"]) == (0, 0)
    assert logged[0]["groups/zero_std_fraction"] == 1
    assert _with_replacements(torch.tensor([True, True]), torch.tensor([True, False]), 2).tolist() == [6, 7, 2, 3]


def test_more_groups_than_prompts_are_refused(model_folder):
    with pytest.raises(MisconfigurationException, match=r"model\.groups=3 .* has 2: set data\.batch_size to 3 or more"):
        filled(grpo(model_folder, groups=3), [arena.prompts(2)])


def test_signal_is_told_with_a_tolerance(model_folder):
    def nearly(prompts, completions, **_):
        return [0.1 + 1e-8 * i for i in range(len(completions))]

    _, logged = filled(grpo(model_folder, [nearly]))
    assert logged[0]["groups/zero_std_fraction"] == 1


def test_truncated_responses_are_masked_out_of_the_loss_and_not_of_the_baseline(model_folder):
    ragged = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 40)))
    (masked,), _ = filled(grpo(model_folder, sampling=ragged, truncated="mask"))
    (whole,), _ = filled(grpo(model_folder, sampling=ragged))
    assert 0 < int(whole.ended.sum()) < 8
    assert torch.equal(masked.mask, whole.mask & whole.ended[:, None])
    torch.testing.assert_close(masked.advantages, whole.advantages * whole.ended[:, None])


def test_a_step_counts_the_responses_that_take_part(model_folder):
    """sequence_mean divides by the responses that count: the same loss as of those alone."""
    ragged = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 40)))
    stage = grpo(model_folder, sampling=ragged, truncated="mask", kl=KL(0.0))
    seen = []
    take = stage.updates.next
    stage.updates.next = lambda: (seen.append(take()), seen[-1])[1]
    filled(stage)
    assert seen[0].step_rows == int((seen[0].lengths > 0).sum()) < 8


# -- mismatch, reference, average --------------------------------------------------------------------------------------


class Tilted(GenerateSampler):
    """A sampler that reports other probabilities than the trainer's: every log-prob 0.1 too low."""

    def __call__(self, *arguments, **settings):
        rollout = super().__call__(*arguments, **settings)
        return rollout.with_(sampler_logprobs=(rollout.sampler_logprobs - 0.1) * rollout.mask)


def test_tokens_are_weighed_by_how_likely_the_sampler_drew_them(model_folder):
    def run(correction, sampler=None):
        stage = grpo(model_folder, correction=correction, sampler=sampler or Tilted(), kl=KL(0.0))
        (rollout,), logged = filled(stage)
        return rollout, logged[0], arena.weights(stage)

    rollout, logged, weights = run(Correction(high=1.05))
    expected, _ = importance_weights(
        rollout.old_logprobs, rollout.sampler_logprobs, rollout.mask, level="token", how="truncate", low=None, high=1.05
    )
    torch.testing.assert_close(rollout.weights, expected)
    assert float(rollout.weights.max()) == pytest.approx(1.05)
    assert logged["sampler/weight_mean"] == pytest.approx(torch.tensor(0.1).exp().item(), rel=1e-3)
    assert not torch.equal(weights, run(None)[2])
    masked, _, without = run(Correction(how="mask", high=1.05))
    assert not masked.weights.any()
    torch.testing.assert_close(without, arena.weights(grpo(model_folder)), atol=0, rtol=0)  # nothing was learned
    exact, _, _ = run(Correction(), GenerateSampler())
    torch.testing.assert_close(exact.weights, exact.mask.float(), atol=1e-4, rtol=0)


def test_the_reference_is_refreshed_every_so_many_rollouts_and_a_resume_has_it(model_folder, tmp_path):
    def build():
        return grpo(model_folder, refresh_reference=2, optim=Optim(lr=1e-2))

    batches = [arena.prompts(2, seed=i) for i in range(4)]
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole, log = build(), arena.Log()
    arena.fit(whole, batches, callbacks=[keep, log], enable_checkpointing=True)
    distances = [abs(row["objective/kl"]) for row in log.rows]
    assert distances[0] < 1e-4 < distances[1]
    assert distances[2] < 1e-4 < distances[3]
    resumed, again = build(), arena.Log()
    settings = {"ckpt_path": str(tmp_path / "step=3.ckpt"), "max_steps": 4, "enable_checkpointing": True}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    arena.fit(resumed, batches[3:] + batches[:3], callbacks=[keep, again], **settings)
    assert torch.equal(arena.weights(resumed), arena.weights(whole))
    assert again.rows[-1]["objective/kl"] == log.rows[-1]["objective/kl"]
    with pytest.raises(ValueError, match="adapters"):
        grpo(model_folder, refresh_reference=2, network=Network(lora=Lora(r=4)))


def test_the_average_of_the_weights_is_exported(model_folder, tmp_path):
    stage, seen = grpo(model_folder, ema=0.75, optim=Optim(lr=1e-2)), []
    mean = stage.policy.lm_head.weight.detach().clone()
    update = stage.average.update
    stage.average.update = lambda policy: (seen.append(policy.lm_head.weight.detach().clone()), update(policy))
    arena.fit(stage, [arena.prompts(2, seed=i) for i in range(3)])
    for weight in seen:
        mean = 0.75 * mean + 0.25 * weight
    assert len(seen) == 3
    stage.export(str(tmp_path))
    exported = grpo(str(tmp_path)).policy.lm_head.weight
    torch.testing.assert_close(exported, mean)
    assert torch.equal(stage.policy.lm_head.weight, seen[-1])  # the policy itself goes on from where it was
    assert [key for key in stage.state_dict() if key.startswith("average.")]
    with pytest.raises(ValueError, match=r"ema is 1\.0"):
        grpo(model_folder, ema=1.0)


SETTINGS = {
    "advantages": [
        Advantages("leave_one_out", "none"),
        Advantages("batch"),
        Advantages("none"),
        Advantages("group", "batch"),
        Advantages(whiten=True),
    ],
    "kl": [
        KL(0.04, "k1", "score"),
        KL(0.04, "k1", "reward"),
        KL(0.04, "k2", "loss"),
        KL(0.04, "k3", "loss", target=0.1),
        KL(0.04, "k3", "loss", target=0.1, horizon=10),
        KL(0.0),
    ],
    "clip": [
        Clip(high=0.01),
        Clip(None, None),
        Clip(0.003, 0.003, ratio="sequence"),
        Clip(dual=1.001),
        Clip(low=None, high=0.01, form="truncate"),
        Clip(form="penalty"),
        Clip(form="penalty", penalty=3.0),
        Clip(form="penalty", penalty_target=1e-9),
    ],
    "truncated": ["mask"],
    "refresh_reference": [1],
}


def test_every_setting_makes_another_run(model_folder):
    def trained(**knobs) -> torch.Tensor:
        ragged = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 40)))
        stage = moved(grpo(model_folder, sampling=ragged, updates=Updates(epochs=3), optim=Optim(lr=3e-3), **knobs))
        arena.fit(stage, [arena.prompts(2), arena.prompts(2, seed=1)])
        return arena.weights(stage)

    runs = {"as it is": trained()}
    for name, values in SETTINGS.items():
        for value in values:
            runs[f"{name}={value}"] = trained(**{name: value})
    same = [(a, b) for a in runs for b in runs if a < b and torch.equal(runs[a], runs[b])]
    assert not same


def test_the_first_minibatch_of_every_clip_form_is_the_plain_gradient(model_folder):
    """At ratio 1 all forms have the gradient of −A·log π."""

    def gradient(**clip):
        stage = grpo(model_folder, clip=Clip(**clip), kl=KL(0.0), optim=Optim(lr=1e-2, eps=1.0))
        before = arena.weights(stage)
        (rollout,), _ = filled(stage)
        return before - arena.weights(stage), rollout

    plain, rollout = gradient()
    for clip in ({"form": "truncate"}, {"form": "penalty"}, {"low": None, "high": None}):
        torch.testing.assert_close(gradient(**clip)[0], plain, atol=1e-6, rtol=1e-3)
    policy = grpo(model_folder).policy
    logprobs = token_logprobs(policy, rollout)
    (-(logprobs * rollout.advantages).sum(dim=1) / rollout.lengths).mean().backward()
    grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(plain, 1e-2 * grads / (grads.abs() + 1.0), atol=2e-7, rtol=2e-2)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"clip\.form"):
        Clip(form="truncate", ratio="sequence")
    with pytest.raises(ValueError, match=r"clip\.high"):
        Clip(form="truncate", high=None)
    with pytest.raises(ValueError, match="normalize_then_sum"):
        Advantages("leave_one_out", mix="normalize_then_sum")
