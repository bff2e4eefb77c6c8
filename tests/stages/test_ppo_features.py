"""What PPO can do beside its algorithm box: pretraining texts, a shared trunk, critic's warm-up, shaping, averages."""

from __future__ import annotations

import dataclasses

import arena
import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import Lora, Network, load_causal, new_value_head, policy_and_values, token_logprobs
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.rewards import Steps
from lit_rlhf.rollout import GenerateSampler
from lit_rlhf.stages import KL, PPO, Correction, Entropy, Optim, Shaping, Updates, Value
from lit_rlhf.stages.shaping import ScoreShaping

ADAPTERS = Network(lora=Lora(r=4, alpha=8))
PLAIN_STEP = Optim(lr=1e-2, eps=1.0)  # Adam's first step is lr·g / (|g| + ε): the gradient can be read off it


def ppo(folder: str, rewards=(arena.low_ids,), **knobs) -> PPO:
    return PPO(folder, rewards=list(rewards), **{"sampling": arena.SHORT, "optim": Optim(lr=1e-3, eps=1e-5), **knobs})


def prompts(rows: int = 4, seed: int = 0, texts: int = 0):
    batch, beside = arena.prompts(rows, seed), arena.examples(max(texts, 1), seed)
    return batch.with_(pretraining=beside.with_(loss_mask=beside.mask)) if texts else batch


class Snapshots(L.Callback):
    """The policy's and the critic's weights before training and after every rollout."""

    def __init__(self) -> None:
        self.policy: list[torch.Tensor] = []
        self.critic: list[torch.Tensor] = []

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        self.policy.append(arena.weights(stage.policy))
        self.critic.append(arena.weights(stage.critic))

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_) -> None:
        self.on_train_start(trainer, stage)


def trained(stage: PPO, batches: list, **settings):
    """Rollouts as the updates take them, microbatches, metrics of each rollout, and weights after each."""
    rollouts, parts, log, snapshots = [], [], arena.Log(), Snapshots()
    fill, take = stage.updates.fill, stage.updates.next
    stage.updates.fill = lambda rollout, *more: (rollouts.append(rollout), fill(rollout, *more))
    stage.updates.next = lambda: (parts.append((stage.updates.step, take())), parts[-1][1])[1]
    arena.fit(stage, batches, callbacks=[log, snapshots], **settings)
    return rollouts, parts, log.rows, snapshots


def assert_first_step(before: torch.Tensor, after: torch.Tensor, network: torch.nn.Module) -> None:
    """One step of `PLAIN_STEP` along the gradient that the network holds."""
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(before - after, 1e-2 * gradient / (gradient.abs() + 1.0), atol=2e-7, rtol=2e-2)


def by_hand(model: torch.nn.Module, texts) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood of the learned tokens, row by row, and how many there are."""
    total, count = torch.zeros(()), 0
    for ids, mask, learned in zip(texts.ids, texts.mask, texts.loss_mask, strict=True):
        logprobs = model(input_ids=ids[mask][None]).logits[0].log_softmax(dim=-1)
        for t in range(1, int(mask.sum())):
            if learned[t]:
                total, count = total - logprobs[t - 1, ids[t]], count + 1
    return total, count


# -- PPO-ptx -----------------------------------------------------------------------------------------------------------


def test_the_first_step_follows_reward_and_pretraining_likelihood(model_folder):
    """∇ of −mean(A·log π) and of 0.7 times the mean negative log-likelihood of the texts' tokens."""
    stage = ppo(model_folder, ptx_coef=0.7, kl=KL(0.0), optim=PLAIN_STEP, updates=Updates(epochs=1))
    batch = prompts(texts=3)
    (rollout,), _, _, weights = trained(stage, [batch])
    model = tiny.tiny_llama(0)
    improvement = (rollout.advantages * token_logprobs(model, rollout)).sum() / rollout.mask.sum()
    likelihood, count = by_hand(model, batch.pretraining)
    (0.7 * likelihood / count - improvement).backward()
    assert_first_step(*weights.policy, model)


def test_without_weight_pretraining_texts_change_nothing(model_folder):
    runs = [trained(ppo(model_folder), [prompts(texts=texts)]) for texts in (0, 3)]
    assert torch.equal(runs[0][3].policy[-1], runs[1][3].policy[-1])
    assert "pretraining/loss" not in runs[1][2][0]
    with_weight = trained(ppo(model_folder, ptx_coef=0.1), [prompts(texts=3)])
    assert not torch.equal(runs[0][3].policy[-1], with_weight[3].policy[-1])


@pytest.mark.parametrize("shared", [False, True])
def test_microbatches_and_turns_change_nothing(shared, model_folder):
    """Four microbatches a step and fewer texts; every loss in its turn, or all in one backward pass."""
    results = []
    for micro_batch_tokens, joint in ((None, True), (None, False), (1, False), (1, True)):
        updates = Updates(epochs=2, minibatches=2, micro_batch_tokens=micro_batch_tokens)
        stage = ppo(model_folder, ptx_coef=0.5, value=Value(shared=shared), updates=updates, entropy=Entropy(0.1))
        if joint:
            stage.turns = 1
        batches = [prompts(8, texts=3), prompts(8, seed=1, texts=3)]
        _, parts, logged, weights = trained(stage, batches, gradient_clip_val=1.0)
        passes = 1 if joint else 2 if shared else 3
        assert len(parts) == (4 if micro_batch_tokens else 1) * passes * 2 * 4
        results.append((torch.cat([weights.policy[-1], weights.critic[-1]]), logged[-1]))
    for weights, metrics in results[1:]:
        torch.testing.assert_close(weights, results[0][0], atol=2e-5, rtol=0)
        for key in ("loss", "pretraining/loss", "value/loss", "policy/grad_norm"):
            assert metrics[key] == pytest.approx(results[0][1][key], rel=1e-3, abs=1e-4)


def test_every_text_is_learned_once_an_epoch(model_folder):
    updates = Updates(epochs=2, minibatches=2, micro_batch_tokens=1)
    batch = prompts(8, texts=5)
    _, parts, _, _ = trained(ppo(model_folder, ptx_coef=0.5, updates=updates), [batch])
    for step in range(4):
        ptx_turns = [part for of, part in parts if of == step][2::3]
        assert len(ptx_turns) == 4
        learned = [
            row
            for part in ptx_turns
            for row, mask in zip(part.pretraining.ids.tolist(), part.pretraining.loss_mask, strict=True)
            if mask.any()
        ]
        rows = [0, 2, 4] if step % 2 == 0 else [1, 3]
        assert sorted(learned) == sorted(batch.pretraining.ids[rows].tolist())
        tokens = int(batch.pretraining.loss_mask[rows, 1:].sum())
        assert {part.pretraining_tokens for part in ptx_turns} == {tokens}


def test_the_pretraining_loss_is_the_mean_over_the_rollouts_tokens(model_folder):
    stage = ppo(model_folder, ptx_coef=0.5, optim=Optim(lr=0.0), updates=Updates(epochs=2, minibatches=2))
    batches = [prompts(texts=5), prompts(seed=1, texts=3)]
    _, _, logged, _ = trained(stage, batches)
    for batch, row in zip(batches, logged, strict=True):
        with torch.no_grad():
            total, count = by_hand(tiny.tiny_llama(0), batch.pretraining)
        assert row["pretraining/loss"] == pytest.approx(float(total) / count, rel=1e-5)


@pytest.mark.parametrize("texts", [0, 1])
def test_missing_pretraining_texts_are_an_error(texts, model_folder):
    stage = ppo(model_folder, ptx_coef=0.5, updates=Updates(minibatches=2))
    with pytest.raises(MisconfigurationException, match=rf"serves {texts} a batch: set data\.pretraining"):
        arena.fit(stage, [prompts(texts=texts)])


# -- a shared trunk ----------------------------------------------------------------------------------------------------


def states_before(model: torch.nn.Module, rollout) -> list[torch.Tensor]:
    """The hidden states that predict each response's tokens, [|y|, d] a row, from transformers' own outputs."""
    found = []
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        out = model(input_ids=torch.cat([prompt, response])[None], output_hidden_states=True)
        found.append(out.hidden_states[-1][0, len(prompt) - 1 : -1])
    return found


def test_a_shared_critic_reads_the_states_that_predict_the_tokens(model_folder):
    (rollout,), _, _, _ = trained(ppo(model_folder, value=Value(shared=True), seed=3), [prompts()])
    model = tiny.tiny_llama(0)
    head = new_value_head(model, seed=3)
    with torch.no_grad():
        for row, states in enumerate(states_before(model, rollout)):
            values = rollout.values[row]
            torch.testing.assert_close(values[: len(states)], head(states)[:, 0], atol=1e-5, rtol=0)
            assert not values[len(states) :].any()
        logprobs, entropy, values = policy_and_values(model, head, rollout, temperature=0.7, entropy=True)
        expected = token_logprobs(model, rollout, temperature=0.7, entropy=True)
        torch.testing.assert_close((logprobs, entropy), expected)
        torch.testing.assert_close(values, rollout.values, atol=1e-5, rtol=0)  # the temperature does not touch them


def test_a_shared_critic_reads_equal_prompts_once(model_folder, monkeypatch):
    (rollout,), _, _, _ = trained(ppo(model_folder), [prompts()])
    alike = rollout.with_(
        prompt_ids=rollout.prompt_ids[:1].expand(4, -1), prompt_mask=rollout.prompt_mask[:1].expand(4, -1)
    )
    model, seen = load_causal(model_folder), []
    head = new_value_head(model)
    whole = policy_and_values(model, head, alike, entropy=True)
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)
    policy_and_values(model, head, alike)  # the model is tried once
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    once = policy_and_values(model, head, alike, entropy=True)
    torch.testing.assert_close(once, whole, atol=1e-5, rtol=1e-5)
    assert 0 < sum(seen) < 4 * (6 + 7)


def test_policy_and_values_share_a_pass_and_its_gradient(model_folder):
    """One pass a microbatch; ∇ of −mean(A·log π) + 0.6·mean(½(V − R)²) for the trunk, of the latter for the head."""
    stage, passes = (
        ppo(
            model_folder,
            value=Value(shared=True, coef=0.6),
            kl=KL(0.0),
            optim=PLAIN_STEP,
            updates=Updates(epochs=1, micro_batch_tokens=30),
        ),
        [],
    )
    stage.policy.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    (rollout,), parts, _, weights = trained(stage, [prompts()])
    assert sum(passes) == len(parts) > 1
    model = tiny.tiny_llama(0)
    head, tokens = new_value_head(model), rollout.mask.sum()
    policy_loss = -(rollout.advantages * token_logprobs(model, rollout)).sum() / tokens
    errors = [
        (head(states)[:, 0] - returns[: len(states)]).square().sum()
        for states, returns in zip(states_before(model, rollout), rollout.returns, strict=True)
    ]
    (policy_loss + 0.6 * torch.stack(errors).sum() / 2 / tokens).backward()
    assert_first_step(*weights.policy, model)
    assert_first_step(*weights.critic, head)


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_with_a_shared_trunk(seed, model_folder):
    stage = ppo(model_folder, optim=Optim(lr=1e-2, eps=1e-5), seed=seed, kl=KL(0.01), value=Value(shared=True))
    _, _, logged, _ = trained(stage, [prompts(16, seed=i) for i in range(25)])
    scores = [row["objective/scores"] for row in logged]
    assert scores[0] < 0.65
    assert sum(scores[-3:]) / 3 > 0.75
    assert logged[-1]["value/loss"] < 0.5 * logged[0]["value/loss"]


def test_a_shared_critic_has_no_weights_of_its_own_to_load(model_folder):
    with pytest.raises(ValueError, match=r"critic='some/model' is not read where value\.shared"):
        ppo(model_folder, critic="some/model", value=Value(shared=True))


def test_a_shared_critic_over_adapters(model_folder):
    stage = ppo(model_folder, network=ADAPTERS, value=Value(shared=True))
    base = {name: p.detach().clone() for name, p in stage.policy.named_parameters() if not p.requires_grad}
    _, _, _, weights = trained(stage, [prompts()])
    assert all(torch.equal(p, base[name]) for name, p in stage.policy.named_parameters() if name in base)
    assert not torch.equal(*weights.policy)
    assert not torch.equal(*weights.critic)
    kept = set(stage.state_dict())
    assert {key for key in kept if key.startswith("critic.")} == {"critic.weight"}
    assert all("lora_" in key for key in kept if key.startswith("policy."))


def test_a_shared_critic_is_not_exported(model_folder, tmp_path):
    stage = ppo(model_folder, value=Value(shared=True))
    arena.fit(stage, [prompts()])
    stage.export(str(tmp_path))
    exported, own = load_causal(str(tmp_path)).state_dict(), stage.policy.state_dict()
    assert exported.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in exported.items())


# -- the critic's warm-up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_critic_learns_at_first(shared, model_folder):
    """Not even weight decay moves the policy before its time."""
    optim = Optim(lr=1e-3, eps=1e-5, weight_decay=1.0, schedule="linear")
    stage = ppo(model_folder, value=Value(warmup=2, shared=shared), optim=optim, entropy=Entropy(0.1), ptx_coef=0.1)
    _, _, _, weights = trained(stage, [prompts(seed=i, texts=2) for i in range(4)])
    changed = [not torch.equal(a, b) for a, b in zip(weights.policy, weights.policy[1:], strict=False)]
    assert changed == [False, False, True, True]
    assert all(not torch.equal(a, b) for a, b in zip(weights.critic, weights.critic[1:], strict=False))


@pytest.mark.parametrize("shared", [False, True])
def test_after_the_warm_up_the_policys_first_step_is_a_first_step(shared, model_folder):
    """Adam's first step has the length of the learning rate; moments older than that would shorten it to .45."""
    stage = ppo(model_folder, value=Value(warmup=3, shared=shared), optim=Optim(lr=1e-3), updates=Updates())
    _, _, _, weights = trained(stage, [prompts(seed=i) for i in range(4)])
    assert float((weights.policy[-1] - weights.policy[-2]).abs().max()) == pytest.approx(1e-3, rel=1e-2)
    state = stage.trainer.optimizers[0].state
    steps = [{int(state[p]["step"]) for p in network.parameters()} for network in (stage.policy, stage.critic)]
    assert steps == [{1}, {4}]


# -- shaping -----------------------------------------------------------------------------------------------------------


def judged(scores: list[float]):
    return dataclasses.replace(arena.rollout([1] * len(scores)), scores=torch.tensor(scores))


def test_running_shaping_takes_off_the_mean_of_all_scores_seen():
    shaping, seen = ScoreShaping(Shaping(running=True)), []
    for scores in ([1.0, 3.0], [10.0, -2.0, 4.0], [100.0]):
        seen += scores
        everything = torch.tensor(seen, dtype=torch.double)
        expected = (torch.tensor(scores).double() - everything.mean()) / everything.std(correction=0)
        torch.testing.assert_close(shaping(judged(scores), lambda moments: moments), expected.float())
    assert shaping.state_dict()["moments"].tolist() == [6, 116, 1 + 9 + 100 + 4 + 16 + 10_000]
    equal = ScoreShaping(Shaping(running=True))(judged([0.1] * 3), lambda moments: moments)
    assert equal.tolist() == [0, 0, 0]


def beside(scores: list[float]):
    """A sum over two processes, of which the other one holds these scores."""
    x = torch.tensor(scores).double()
    return lambda moments: moments + torch.stack([torch.tensor(len(x)).double(), x.sum(), x.square().sum()])


def test_running_shaping_counts_the_scores_of_all_processes():
    whole, one, other = (ScoreShaping(Shaping(running=True, clip=1.2)) for _ in range(3))
    for mine, theirs in (([1.0, 3.0], [5.0, 6.0]), ([2.0, -9.0], [0.0, 1.0])):
        expected = whole(judged(mine + theirs), lambda moments: moments)
        found = [one(judged(mine), beside(theirs)), other(judged(theirs), beside(mine))]
        torch.testing.assert_close(torch.cat(found), expected)
    assert torch.equal(one.moments, whole.moments)


def test_clipped_scores_bound_the_rewards(model_folder):
    def large(prompts, completions, completion_ids, **_):
        return [(-1.0) ** i * sum(ids) for i, ids in enumerate(completion_ids)]

    (rollout,), _, logged, _ = trained(ppo(model_folder, [large], shaping=Shaping(clip=0.3), kl=KL(0.0)), [prompts()])
    assert rollout.rewards.sum(dim=1).tolist() == pytest.approx([0.3, -0.3, 0.3, -0.3])
    assert abs(rollout.scores).min() > 1  # what is logged is what the judges said
    assert logged[0]["objective/scores"] == pytest.approx(float(rollout.scores.mean()))
    with pytest.raises(ValueError, match=r"shaping\.clip is 0\.0"):
        Shaping(clip=0.0)


@pytest.mark.parametrize("shaping", [Shaping(running=True), Shaping(clip=1.0)])
def test_shaping_refuses_rewards_that_judge_steps(shaping, model_folder):
    def steps(prompts, completions, completion_ids, **_):
        return [Steps([1.0], [len(ids) - 1]) for ids in completion_ids]

    with pytest.raises(MisconfigurationException, match=r"model\.shaping.*Steps"):
        arena.fit(ppo(model_folder, [steps], shaping=shaping), [prompts()])


# -- knobs -------------------------------------------------------------------------------------------------------------


class Tilted(GenerateSampler):
    """A sampler that reports other probabilities than the trainer's, more so for later tokens."""

    def __call__(self, *arguments, **settings):
        rollout = super().__call__(*arguments, **settings)
        tilt = torch.linspace(-0.9, 0.9, rollout.mask.shape[1])
        return rollout.with_(sampler_logprobs=(rollout.sampler_logprobs + tilt) * rollout.mask)


SETTINGS = {
    "value": (
        Value,
        {"coef": 1.0, "clip": 1e-3, "lr": 2e-3, "shared": True, "warmup": 1},
        {},
    ),
    "shaping": (Shaping, {"running": True, "clip": 0.4}, {}),
    "entropy": (Entropy, {"coef": 0.5, "final": 0.5}, {"coef": 0.1}),
    "correction": (Correction, {"level": "sequence", "how": "mask", "low": 0.9, "high": 1.2}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_moves_the_weights(name, model_folder):
    kind, changes, given = SETTINGS[name]
    in_test_one_base = {"adapter"} if name == "value" else set()
    assert {field.name for field in dataclasses.fields(kind)} == set(changes) | in_test_one_base

    def after(group) -> torch.Tensor:
        stage = ppo(model_folder, sampler=Tilted(), updates=Updates(epochs=2), **{name: group})
        arena.fit(stage, [prompts(), prompts(seed=1)])
        return arena.weights(stage)

    runs = {"as it is": after(kind(**given)), **{key: after(kind(**given | {key: changes[key]})) for key in changes}}
    if name == "correction":
        runs["none"] = after(None)
    same = [
        (one, other)
        for one in runs
        for other in runs
        if one < other and runs[one].shape == runs[other].shape and torch.equal(runs[one], runs[other])
    ]
    assert not same


# -- resume ------------------------------------------------------------------------------------------------------------

FEATURES = {
    "ptx": {"ptx_coef": 0.5},
    "shared": {"value": Value(shared=True), "ema": 0.5},
    "shared adapters": {"value": Value(shared=True), "network": ADAPTERS, "ema": 0.5},
    "warm-up": {"value": Value(warmup=3)},
    "warm-up ends": {"value": Value(warmup=2, shared=True)},
    "shaping": {"shaping": Shaping(running=True, clip=1.0), "kl": KL(0.1, target=1.0, horizon=20)},
    "entropy": {"entropy": Entropy(0.1, final=0.5)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_resume_continues_bit_for_bit(name, model_folder, tmp_path):
    """Four rollouts at once, and two, a checkpoint, two more: the same weights, averages, statistics and metrics."""
    batches = [prompts(seed=i, texts=2) for i in range(4)]
    knobs = {"updates": Updates(epochs=2), "optim": Optim(lr=1e-3, schedule="linear"), **FEATURES[name]}
    settings = {"enable_checkpointing": True, "max_steps": 4}

    def run(order: list, **more):
        keep, log = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), arena.Log()
        stage = ppo(model_folder, **knobs)
        arena.fit(stage, order, callbacks=[keep, log], **settings, **more)
        timeless = {k: v for k, v in log.rows[-1].items() if not k.startswith(("time/", "throughput/"))}
        return {k: v.clone() for k, v in stage.state_dict().items()}, timeless

    whole, logged = run(batches)
    resumed, again = run(batches[2:] + batches[:2], ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert whole.keys() == resumed.keys()
    assert any(key.startswith("average.") for key in whole) == ("ema" in knobs)
    assert not [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert logged == again


# -- the average -------------------------------------------------------------------------------------------------------


def test_the_average_under_adapters_is_that_of_the_adapters(model_folder, tmp_path):
    stage = ppo(model_folder, network=ADAPTERS, ema=0.6, optim=Optim(lr=1e-2, eps=1e-5))
    _, _, _, weights = trained(stage, [prompts(seed=i) for i in range(3)])
    mean = weights.policy[0]
    for after in weights.policy[1:]:
        mean = 0.6 * mean + 0.4 * after
    buffers = dict(stage.average.named_buffers())
    assert buffers
    assert all("lora_" in name for name in buffers)
    torch.testing.assert_close(torch.cat([b.flatten() for b in buffers.values()]), mean)
    stage.export(str(tmp_path))
    with stage.average.standing_in(stage.policy):
        expected = token_logprobs(stage.policy, arena.rollout([3, 2]))
    own = token_logprobs(stage.policy, arena.rollout([3, 2]))
    exported = token_logprobs(load_causal(str(tmp_path)), arena.rollout([3, 2]))
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(exported, own, atol=1e-4)


def test_processes_do_not_send_the_average_round(model_folder):
    """DDP broadcasts buffers before every forward pass, but for those named here."""
    stage = ppo(model_folder, ema=0.6)
    left_alone = set(stage._ddp_params_and_buffers_to_ignore)
    assert left_alone == {name for name, _ in stage.named_buffers() if name.startswith("average.")} != set()
