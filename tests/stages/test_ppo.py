"""PPO: the numbers of one rollout by hand, its roles, its knobs, and that it learns."""

from __future__ import annotations

import arena
import pytest
import tiny
import torch

from lit_rlhf.models import Lora, Network, load_scalar, response_values, token_logprobs
from lit_rlhf.rewards import ContainsWords, MissingEOS
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import KL, PPO, Clip, Entropy, Optim, Updates, Value


def ppo(folder: str, rewards=(arena.low_ids,), **knobs) -> PPO:
    return PPO(folder, rewards=list(rewards), **{"sampling": arena.SHORT, "optim": Optim(lr=1e-3, eps=1e-5), **knobs})


def assessed(stage: PPO, rows: int = 4):
    """The rollout of one batch as it stands before the first update, and the metrics logged."""
    kept, log = [], arena.Log()
    fill = stage.updates.fill
    stage.updates.fill = lambda rollout, *more: (kept.append(rollout), fill(rollout, *more))
    arena.fit(stage, [arena.prompts(rows)], callbacks=[log])
    return kept[0], log.rows[0]


def test_the_record_holds_what_each_role_said(model_folder):
    stage = ppo(model_folder)
    policy, critic = tiny.tiny_llama(0), load_scalar(model_folder, seed=0)
    rollout, _ = assessed(stage)
    with torch.no_grad():
        torch.testing.assert_close(rollout.old_logprobs, token_logprobs(policy, rollout), atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.values, response_values(critic, rollout), atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.ref_logprobs, rollout.old_logprobs, atol=1e-5, rtol=0)
    expected = [
        sum(i < 128 for i in row[:length]) / length
        for row, length in zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)
    ]
    assert rollout.scores.tolist() == pytest.approx(expected)
    last = rollout.lengths - 1
    assert torch.allclose(rollout.rewards.gather(1, last[:, None])[:, 0], rollout.scores, atol=1e-5)  # KL is 0 here
    assert torch.allclose(rollout.rewards.sum(dim=1), rollout.scores, atol=1e-4)


def test_objective_metrics_are_those_of_the_rollout(model_folder):
    stage = ppo(model_folder, kl=KL(0.5))
    with torch.no_grad():
        stage.policy.lm_head.weight.mul_(1.5)  # the policy has moved away from its reference
    rollout, logged = assessed(stage)
    kl = ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask).sum(dim=1).mean()
    assert abs(float(kl)) > 1e-3
    assert logged["objective/kl"] == pytest.approx(float(kl), rel=1e-4)
    assert logged["objective/non_score_reward"] == pytest.approx(-0.5 * float(kl), rel=1e-4)
    assert logged["objective/rlhf_reward"] == pytest.approx(float(rollout.rewards.sum(dim=1).mean()), rel=1e-3)
    assert logged["objective/scores"] == pytest.approx(float(rollout.scores.mean()))
    assert logged["rewards/low_ids/mean"] == pytest.approx(float(rollout.scores.mean()))
    assert logged["sampler/logprob_gap_max"] < 1e-4
    assert logged["response/length_mean"] == pytest.approx(float(rollout.lengths.float().mean()))


def test_advantages_are_white_over_the_rollout(model_folder):
    rollout, _ = assessed(ppo(model_folder))
    counted = rollout.advantages[rollout.mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-5)
    assert float(counted.var(correction=0)) == pytest.approx(1, abs=1e-3)


def test_the_kl_coefficient_adapts_and_is_saved(model_folder, tmp_path):
    """KL 0 against a target of 1 is an error of -1, clipped to -0.2: β(1 − 0.2·n/horizon)."""
    stage = ppo(model_folder, kl=KL(0.1, target=1.0, horizon=10), updates=Updates(epochs=1))
    run = arena.fit(stage, [arena.prompts(4)])
    assert float(stage.kl_coef) == pytest.approx(0.1 * (1 - 0.2 * 4 / 10), rel=1e-5)
    run.save_checkpoint(tmp_path / "ppo.ckpt")
    again = PPO.load_from_checkpoint(tmp_path / "ppo.ckpt", rewards=[arena.low_ids])
    assert float(again.kl_coef) == float(stage.kl_coef)


def test_no_reference_is_loaded_where_nothing_needs_it(model_folder):
    assert ppo(model_folder, kl=KL(0.0)).reference is None
    _, logged = assessed(ppo(model_folder, kl=KL(0.0)))
    assert logged["objective/rlhf_reward"] == pytest.approx(logged["objective/scores"])


def test_the_reference_never_moves_and_lora_keeps_none(model_folder):
    stage = ppo(model_folder)
    before = torch.cat([p.flatten() for p in stage.reference.parameters()]).clone()
    arena.fit(stage, [arena.prompts(4)])
    assert torch.equal(before, torch.cat([p.flatten() for p in stage.reference.parameters()]))
    adapted = ppo(model_folder, network=Network(lora=Lora(r=4, alpha=8)))
    assert not list(adapted.reference.parameters())
    rollout, _ = assessed(adapted)
    with torch.no_grad():
        torch.testing.assert_close(rollout.ref_logprobs, token_logprobs(tiny.tiny_llama(0), rollout), atol=1e-5, rtol=0)


def test_missing_eos_replaces_the_score_of_what_was_cut_off(model_folder):
    rollout, _ = assessed(ppo(model_folder, missing_eos=MissingEOS(penalty=3.0)), rows=8)
    assert not rollout.ended.all()
    assert (rollout.scores[~rollout.ended] == -3.0).all()
    assert (rollout.scores[rollout.ended] >= 0).all()


def test_a_reward_of_weight_zero_is_logged_and_changes_nothing(model_folder):
    alone = ppo(model_folder)
    arena.fit(alone, [arena.prompts(4)])
    log, watched = arena.Log(), ppo(model_folder, [arena.low_ids, arena.constant], reward_weights=[1.0, 0.0])
    arena.fit(watched, [arena.prompts(4)], callbacks=[log])
    assert log.rows[0]["rewards/constant/mean"] == 1.0
    assert torch.equal(arena.weights(alone), arena.weights(watched))


def test_the_critic_may_start_from_a_reward_model(model_folder, tmp_path):
    from lit_rlhf.stages import RewardModeling

    RewardModeling(model_folder, seed=7).export(str(tmp_path))
    stage = ppo(model_folder, critic=str(tmp_path))
    assert torch.equal(stage.critic.score.weight, load_scalar(str(tmp_path)).score.weight)
    assert not torch.equal(stage.critic.score.weight, ppo(model_folder).critic.score.weight)


KNOBS = {
    "critic": None,  # set below: a reward model's folder
    "network": Network(dropout=0.2),
    "frozen_dtype": "bfloat16",
    "reward_weights": [2.0],
    "missing_eos": MissingEOS(penalty=2.0),
    "sampling": Sampling(max_new_tokens=8, temperature=0.7),
    "optim": Optim(lr=2e-3, eps=1e-5),
    "updates": Updates(epochs=2, minibatches=2),
    "kl": KL(1.0),
    "gamma": 0.5,
    "lam": 0.3,
    "clip": Clip(0.01, 0.01),
    "value": Value(coef=1.0),
    "entropy": Entropy(0.5),
    "whiten_rewards": True,
    "seed": 1,
}


def trained(folder: str, **knobs) -> torch.Tensor:
    stage = ppo(folder, **{"updates": Updates(epochs=3), **knobs})
    batches = [arena.prompts(4), arena.prompts(4, seed=1), arena.prompts(4, seed=2)]
    arena.fit(stage, batches)
    return arena.weights(stage)


def test_every_knob_moves_the_weights(model_folder, tmp_path):
    from lit_rlhf.stages import RewardModeling

    RewardModeling(model_folder, seed=7).export(str(tmp_path))
    plain = trained(model_folder)
    assert torch.equal(plain, trained(model_folder)), "the same run twice must give the same weights"
    still = [
        name
        for name, value in {**KNOBS, "critic": str(tmp_path)}.items()
        if torch.equal(plain, trained(model_folder, **{name: value}))
    ]
    assert not still


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns(seed, model_folder):
    """Half of all tokens are below 128 at first; PPO makes nearly all of them so, and pays KL for it."""
    stage = ppo(model_folder, optim=Optim(lr=1e-2, eps=1e-5), seed=seed, kl=KL(0.01))
    log = arena.Log()
    arena.fit(stage, [arena.prompts(16, seed=i) for i in range(35)], callbacks=[log])
    scores = [row["objective/scores"] for row in log.rows]
    assert scores[0] < 0.65
    assert sum(scores[-3:]) / 3 > 0.85
    assert log.rows[-1]["objective/kl"] > 1.0


def test_validation_judges_held_out_prompts_greedily_and_sampled(model_folder):
    stage = ppo(model_folder)
    metrics = arena.trainer().validate(stage, arena.loader([arena.prompts(4), arena.prompts(3, seed=1)]), verbose=False)
    assert {"val/score_greedy", "val/score_sampled", "val/kl", "val/eos_fraction_sampled"} <= set(metrics[0])
    assert metrics[0]["val/kl"] == pytest.approx(0, abs=1e-4)
    assert [s["mode"] for s in stage.samples] == ["greedy"] * 4 + ["sampled"] * 4
    assert stage.samples[0]["prompt"] == "prompt 0"
    again = arena.trainer().validate(stage, arena.loader([arena.prompts(4), arena.prompts(3, seed=1)]), verbose=False)
    assert again == metrics
    other = ppo(model_folder, seed=1)
    arena.trainer().validate(other, arena.loader([arena.prompts(4)]), verbose=False)
    completions, others = ([s["completion"] for s in each.samples] for each in (stage, other))
    assert completions[:4] == others[:4]  # greedy knows no seed
    assert completions[4:] != others[4:]


def test_a_checkpoint_loads_with_rewards_that_are_dataclasses(model_folder, tmp_path):
    """Rules are dataclasses, which must not end up in the hyperparameters as dicts."""
    run = arena.fit(ppo(model_folder, [ContainsWords(words=["a"])]), [arena.prompts(4)])
    run.save_checkpoint(tmp_path / "ppo.ckpt")
    assert "rewards" not in torch.load(tmp_path / "ppo.ckpt", weights_only=True)["hyper_parameters"]
    again = PPO.load_from_checkpoint(tmp_path / "ppo.ckpt", rewards=[ContainsWords(words=["a"])])
    assert again.sampling == arena.SHORT


def test_policy_and_critic_take_turns_and_it_changes_nothing(model_folder):
    """Each network's activations are freed by its backward pass before the other one runs."""

    def trained(turns: int):
        stage, order = ppo(model_folder, entropy=Entropy(0.1), updates=Updates(epochs=2, minibatches=2)), []
        on_fit_start = stage.on_fit_start
        stage.on_fit_start = lambda: (on_fit_start(), setattr(stage.updates, "turns", turns))
        for name, network in (("policy", stage.policy), ("critic", stage.critic)):
            network.register_forward_hook(lambda *_, name=name: order.append(name) if torch.is_grad_enabled() else None)
            network.model.embed_tokens.weight.register_hook(lambda _, name=name: order.append(f"{name} back"))
        log = arena.Log()
        arena.fit(stage, [arena.prompts(4)], callbacks=[log], gradient_clip_val=1.0)
        timing = ("time/", "throughput/")
        return arena.weights(stage), {k: v for k, v in log.rows[0].items() if not k.startswith(timing)}, order

    weights, metrics, order = trained(2)
    assert order[:4] == ["policy", "policy back", "critic", "critic back"]
    together, joint_metrics, joint_order = trained(1)
    assert joint_order[:2] == ["policy", "critic"]
    torch.testing.assert_close(weights, together, atol=1e-6, rtol=0)
    assert metrics == pytest.approx(joint_metrics, abs=1e-5)
