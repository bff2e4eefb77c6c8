"""Policy, critic, rewards and reference as adapters on one set of base weights: what four networks would learn."""

from __future__ import annotations

import arena
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lit_rlhf.callbacks import Throughput
from lit_rlhf.export import export
from lit_rlhf.models import CRITIC, Lora, Network, load_causal, load_scalar, save_scalar, token_logprobs, token_scores
from lit_rlhf.models.switches import adapter_of, weights_of
from lit_rlhf.rewards import RewardAdapter, RewardModel
from lit_rlhf.stages import GRPO, KL, PPO, Optim, Updates, Value

LORA = Network(lora=Lora(r=4, alpha=8))
ADAM = Optim(lr=1e-3, eps=1e-5)
ROLES = {"network": LORA, "value": Value(adapter=True)}


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory) -> tuple[str, str]:
    """The adapters of a reward model, and the whole of it."""
    root = tmp_path_factory.mktemp("reward")
    adapters = arena.reward_on_adapters(model_folder, root / "adapters", mean=0.5, std=2.0)
    model = arena.stir(load_scalar(model_folder, Network(lora=Lora(r=3)), seed=5), seed=7)
    save_scalar(model, arena.tiny_tokenizer(), root / "whole", mean=0.5, std=2.0)
    return adapters, str(root / "whole")


def ppo(folder: str, rewards=(arena.low_ids,), **knobs) -> PPO:
    return PPO(folder, rewards=list(rewards), **{"sampling": arena.SHORT, "optim": ADAM, **knobs})


class Weights(arena.Log):
    """Metrics, and the weights of policy and critic after every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: list[torch.Tensor] = []
        self.critic: list[torch.Tensor] = []

    def on_train_start(self, trainer, stage) -> None:
        critic = [*weights_of(stage.policy, CRITIC).values(), *stage.critic.parameters()]
        for kept, own in ((self.policy, weights_of(stage.policy).values()), (self.critic, critic)):
            kept.append(torch.cat([w.detach().flatten() for w in own if w.requires_grad]))

    def on_train_batch_end(self, trainer, stage, *more) -> None:
        super().on_train_batch_end(trainer, stage, *more)
        self.on_train_start(trainer, stage)


def trained(stage, batches: int = 3, rows: int = 8, **settings) -> Weights:
    seen = Weights()
    arena.fit(stage, [arena.prompts(rows, seed=i) for i in range(batches)], callbacks=[seen], **settings)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_roles_learn_what_separate_networks_learn(joint, checkpointing, model_folder, folders):
    """Policy, critic, reward and reference: four sets of base weights or one, the same updates of both adapters."""
    network = Network(lora=LORA.lora, gradient_checkpointing=checkpointing)
    knobs = {"updates": Updates(epochs=2, micro_batch_tokens=60), "kl": KL(0.1), "network": network}
    knobs |= {"ema": 0.5, "optim": Optim(lr=1e-3, eps=1e-3)}
    runs = []
    for reward, value in (
        (RewardModel(folders[1]), Value(lr=2e-3)),
        (RewardAdapter(folders[0]), Value(lr=2e-3, adapter=True)),
    ):
        stage = ppo(model_folder, [reward], value=value, **knobs)
        if joint:
            stage.turns = 1
        runs.append((stage, trained(stage, gradient_clip_val=0.5)))
    (_, apart), (stage, together) = runs
    for one, other in zip([*apart.policy, *apart.critic], [*together.policy, *together.critic], strict=True):
        torch.testing.assert_close(other, one, atol=2e-6, rtol=0)
    assert (together.policy[-1] - together.policy[0]).abs().max() > 1e-3
    assert (together.critic[-1] - together.critic[0]).abs().max() > 2e-3
    for key in ("objective/scores", "objective/kl", "value/loss", "policy/grad_norm", "critic/grad_norm"):
        assert together.rows[-1][key] == pytest.approx(apart.rows[-1][key], rel=1e-3, abs=1e-5), key


def test_each_group_of_the_optimizer_moves_its_own_role(model_folder, folders):
    stage = ppo(model_folder, [RewardAdapter(folders[0])], **ROLES)
    frozen = {name: p.clone() for name, p in stage.named_parameters() if not p.requires_grad}
    assert {adapter_of(name) for name in frozen} == {None, "reward"}
    trained(stage)
    names = {id(p): name for name, p in stage.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in stage.trainer.optimizers[0].param_groups}
    assert {adapter_of(name) for name in groups["policy"]} == {"default"}
    assert {adapter_of(name) for name in groups["critic"]} == {CRITIC, None}
    assert [name for name in groups["critic"] if not adapter_of(name)] == ["critic.weight"]
    assert len(groups["policy"]) == len(groups["critic"]) - 1 == 28
    for name, before in frozen.items():
        now = stage.get_parameter(name)
        assert torch.equal(now, before), name
        assert not now.requires_grad
        assert now.grad is None


@pytest.mark.parametrize("shared", ["policy", "critic"])
def test_each_loss_reaches_its_own_role(shared, model_folder):
    stage = ppo(model_folder, updates=Updates(epochs=1), **ROLES)
    rollouts, fill = [], stage.updates.fill
    stage.updates.fill = lambda rollout, *more: (rollouts.append(rollout), fill(rollout, *more))
    trained(stage, batches=1)
    stage.zero_grad()
    part = rollouts[0].with_(step_tokens=10.0, step_rows=4.0)
    (stage.policy_loss if shared == "policy" else stage.value_loss)(part)[0].backward()
    moved = {adapter_of(name) or name for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == ({"default"} if shared == "policy" else {CRITIC, "critic.weight"})


def test_only_the_critic_moves_while_it_warms_up(model_folder):
    seen = trained(ppo(model_folder, updates=Updates(), **ROLES | {"value": Value(adapter=True, warmup=2)}), batches=3)
    assert [not torch.equal(a, b) for a, b in zip(seen.policy, seen.policy[1:], strict=False)] == [False, False, True]
    assert all(not torch.equal(a, b) for a, b in zip(seen.critic, seen.critic[1:], strict=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_1(checkpointing, model_folder, folders):
    network = Network(lora=LORA.lora, gradient_checkpointing=checkpointing)
    updates = Updates(epochs=1, micro_batch_tokens=40, sampler_gap=0)
    stage = ppo(model_folder, [RewardAdapter(folders[0])], updates=updates, **ROLES | {"network": network})
    for row in trained(stage).rows:
        assert row["policy/ratio_mean"] == 1
        assert row["policy/approx_kl"] == row["policy/clip_fraction"] == 0


def test_the_reference_is_the_base_whatever_stands_on_it(model_folder, folders):
    stage = ppo(model_folder, [RewardAdapter(folders[0])], **ROLES)
    trained(stage)
    rollout = arena.rollout([4, 2])
    base = token_logprobs(load_causal(model_folder).eval(), rollout)
    assert torch.equal(stage.reference.token_logprobs(stage.policy, rollout), base)
    assert not torch.equal(token_logprobs(stage.policy, rollout), base)


def test_a_critic_may_start_from_the_rewards_adapters(model_folder, folders):
    stage = ppo(model_folder, critic=folders[0], **ROLES)
    assert all(p.requires_grad for name, p in stage.named_parameters() if adapter_of(name) == CRITIC)
    rollouts, fill = [], stage.updates.fill
    stage.updates.fill = lambda rollout, *more: (rollouts.append(rollout), fill(rollout, *more))
    seen = trained(stage, batches=1)
    (rollout,) = rollouts
    whole = load_scalar(folders[1]).eval()
    scores = token_scores(whole, rollout.input_ids, rollout.input_mask)[:, rollout.prompt_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(rollout.values, scores.detach() * rollout.mask, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*seen.critic)


# -- checkpoints and export --------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapters_of_policy_and_critic_and_the_critics_head(model_folder, folders):
    stage = ppo(model_folder, [RewardAdapter(folders[0]), RewardAdapter(folders[0])], **ROLES)
    state = stage.state_dict()
    weights = {name for name in state if state[name].is_floating_point() and state[name].dim()}
    assert {adapter_of(name) for name in weights - {"critic.weight", "shaping.moments"}} == {"default", CRITIC}
    assert len(weights - {"shaping.moments"}) == 28 + 28 + 1
    fresh = ppo(model_folder, [RewardAdapter(folders[0]), RewardAdapter(folders[0])], **ROLES)
    arena.stir(fresh)
    fresh.load_state_dict(state)
    assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in stage.named_parameters())
    del state["critic.weight"]
    with pytest.raises(RuntimeError, match=r"critic\.weight"):
        fresh.load_state_dict(state)


def test_resume_continues_bit_for_bit(model_folder, folders, tmp_path):
    batches, knobs = [arena.prompts(seed=i) for i in range(4)], {"updates": Updates(epochs=2), "ema": 0.5, **ROLES}

    def run(order: list, **more):
        keep, log = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), arena.Log()
        stage = ppo(model_folder, [RewardAdapter(folders[0], normalize=True)], **knobs)
        arena.fit(stage, order, callbacks=[keep, log], enable_checkpointing=True, max_steps=4, **more)
        timeless = {k: v for k, v in log.rows[-1].items() if not k.startswith(("time/", "throughput/"))}
        return {k: v.clone() for k, v in stage.state_dict().items()}, timeless

    whole, logged = run(batches)
    resumed, again = run(batches[2:] + batches[:2], ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert whole.keys() == resumed.keys()
    assert not [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert logged == again


@pytest.mark.parametrize("merge", [True, False])
def test_what_is_exported_is_the_policy_alone(merge, model_folder, folders, tmp_path):
    """The file of a run with a critic of its own weights, to the last name; from the stage and from a checkpoint."""
    stage = ppo(model_folder, [RewardAdapter(folders[0])], **ROLES)
    trained(stage, batches=1)
    stage.export(str(tmp_path / "roles"), merge=merge)
    apart = ppo(model_folder, network=LORA)
    for name, weight in weights_of(stage.policy).items():
        apart.policy.get_parameter(name).data.copy_(weight)
    apart.export(str(tmp_path / "apart"), merge=merge)
    stage.trainer.save_checkpoint(tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), str(tmp_path / "later"), merge=merge)
    file = "model.safetensors" if merge else "adapter_model.safetensors"
    expected = load_file(tmp_path / "apart" / file)
    for kind in ("roles", "later"):
        found = load_file(tmp_path / kind / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_base_that_two_roles_read_counts_twice_for_the_mfu(model_folder):
    counts = []
    for value in (Value(), Value(adapter=True)):
        stage, meter = ppo(model_folder, network=LORA, value=value), Throughput()
        meter.setup(arena.trainer(), stage, "fit")
        counts.append(meter.token_flops)
    assert counts[1] - counts[0] == 4 * stage.policy.lm_head.weight.numel()  # which a critic of its own has not


# -- GRPO --------------------------------------------------------------------------------------------------------------


def test_grpo_is_judged_on_its_own_base(model_folder, folders):
    runs = []
    for reward in (RewardModel(folders[1], normalize=True), RewardAdapter(folders[0], normalize=True)):
        stage = GRPO(
            model_folder, [reward], group_size=4, network=LORA, sampling=arena.SHORT, optim=Optim(lr=1e-3, eps=1e-3)
        )
        seen = arena.Log()
        arena.fit(stage, [arena.prompts(4, seed=i) for i in range(3)], callbacks=[seen])
        runs.append((arena.weights(stage.policy), seen.rows[-1]["objective/scores"]))
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=0)
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-4)
    assert {adapter_of(name) for name in stage.state_dict() if name.startswith("policy.")} == {"default"}


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused(model_folder, folders):
    with pytest.raises(ValueError, match=r"value\.adapter puts the critic .* set network\.lora"):
        ppo(model_folder, value=Value(adapter=True))
    with pytest.raises(ValueError, match="leave out one"):
        Value(adapter=True, shared=True)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json.*a whole reward model is for RewardModel"):
        ppo(model_folder, critic=folders[1], **ROLES)
    with pytest.raises(ValueError, match="trains all its weights"):
        ppo(model_folder, [RewardAdapter(folders[0])])
