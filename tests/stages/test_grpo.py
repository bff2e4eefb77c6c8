"""GRPO: its advantages, its KL in the loss, aggregation by hand, groups without signal, knobs, learning."""

from __future__ import annotations

import arena
import pytest
import tiny
import torch

from lit_rlhf.models import Network, token_logprobs
from lit_rlhf.rewards import MissingEOS
from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import GRPO, KL, Advantages, Clip, Entropy, Optim, Updates


def grpo(folder: str, rewards=(arena.low_ids,), **knobs) -> GRPO:
    settings = {"sampling": arena.SHORT, "optim": Optim(lr=1e-3), "group_size": 4, **knobs}
    return GRPO(folder, rewards=list(rewards), **settings)


def one_batch(stage: GRPO, rows: int = 2):
    """The rollout of one batch as the first loss saw it, and the metrics logged."""
    kept, log = [], arena.Log()
    fill = stage.updates.fill
    stage.updates.fill = lambda rollout, *more: (kept.append(rollout), fill(rollout, *more))
    arena.fit(stage, [arena.prompts(rows)], callbacks=[log])
    return kept[0], log.rows[0]


def test_a_token_has_its_responses_score_against_its_group(model_folder):
    rollout, logged = one_batch(grpo(model_folder), rows=3)
    assert rollout.prompts == ("prompt 0",) * 4 + ("prompt 1",) * 4 + ("prompt 2",) * 4
    groups = rollout.scores.view(3, 4)
    by_hand = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)
    expected = by_hand.flatten()[:, None] * rollout.mask
    torch.testing.assert_close(rollout.advantages, expected, atol=1e-4, rtol=1e-3)
    assert logged["reward"] == pytest.approx(float(rollout.scores.mean()))
    assert logged["reward_std"] == pytest.approx(float(groups.std(dim=1, correction=0).mean()), rel=1e-5)
    assert logged["groups/zero_std_fraction"] == 0


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
def test_the_first_step_is_the_papers_gradient(aggregation, model_folder):
    """At ratio 1: −A per token and β·k3 against a reference that differs, aggregated by hand; Adam with a large ε."""
    stage = grpo(model_folder, aggregation=aggregation, kl=KL(0.3, "k3", "loss"), optim=Optim(lr=1e-2, eps=1.0))
    with torch.no_grad():
        stage.policy.lm_head.weight.mul_(1.3)
    before = arena.weights(stage)
    rollout, _ = one_batch(stage)

    model = tiny.tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    logprobs = token_logprobs(model, rollout)
    log_ratio = rollout.ref_logprobs - logprobs
    per_token = -(logprobs - rollout.old_logprobs).exp() * rollout.advantages + 0.3 * (log_ratio.exp() - 1 - log_ratio)
    per_token = per_token * rollout.mask
    loss = {
        "sequence_mean": (per_token.sum(dim=1) / rollout.lengths).mean(),
        "token_mean": per_token.sum() / rollout.mask.sum(),
        "fixed_length": per_token.sum() / (8 * 8),
    }[aggregation]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    step = before - arena.weights(stage)
    torch.testing.assert_close(step, 1e-2 * gradient / (gradient.abs() + 1.0), atol=2e-7, rtol=2e-2)


def test_groups_without_signal_are_counted_and_move_nothing(model_folder):
    stage = grpo(model_folder, [arena.constant], kl=KL(0.0))
    before = arena.weights(stage)
    _, logged = one_batch(stage)
    assert logged["groups/zero_std_fraction"] == 1
    assert torch.equal(before, arena.weights(stage))
    assert stage.reference is None


KNOBS = {
    "network": Network(dropout=0.2),
    "frozen_dtype": "bfloat16",
    "reward_weights": [0.01],  # scaling by the group's spread undoes most of a weight, not the ε beside it
    "missing_eos": MissingEOS(penalty=2.0),
    "sampling": Sampling(max_new_tokens=8, temperature=0.7),
    "optim": Optim(lr=2e-3),
    "group_size": 2,
    "advantages": Advantages(scale="none"),
    "updates": Updates(epochs=2, minibatches=2),
    "kl": KL(1.0, "k3", "loss"),
    "clip": Clip(low=0.001),
    "aggregation": "fixed_length",
    "entropy": Entropy(0.5),
    "seed": 1,
}


def trained(folder: str, **knobs) -> torch.Tensor:
    ragged = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 40)))
    stage = grpo(folder, **{"updates": Updates(epochs=3), "sampling": ragged, **knobs})
    arena.fit(stage, [arena.prompts(2), arena.prompts(2, seed=1), arena.prompts(2, seed=2)])
    return arena.weights(stage)


def test_every_knob_moves_the_weights(model_folder):
    plain = trained(model_folder)
    assert torch.equal(plain, trained(model_folder)), "the same run twice must give the same weights"
    still = [name for name, value in KNOBS.items() if torch.equal(plain, trained(model_folder, **{name: value}))]
    assert not still


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns(seed, model_folder):
    stage = grpo(model_folder, optim=Optim(lr=1e-2), seed=seed, kl=KL(0.01, "k3", "loss"))
    log = arena.Log()
    arena.fit(stage, [arena.prompts(8, seed=i) for i in range(32)], callbacks=[log])
    rewards = [row["reward"] for row in log.rows]
    assert rewards[0] < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85
    assert log.rows[-1]["objective/kl"] > 1.0
