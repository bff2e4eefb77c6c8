"""The reference, evaluation mode, and what a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models import (
    Lora,
    Network,
    Reference,
    adapters_off,
    evaluating,
    forget_in_checkpoints,
    freeze,
    has_adapters,
    keep_adapters_only,
    load_causal,
    load_scalar,
    token_logprobs,
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 2]])
LORA = Network(lora=Lora(r=2, targets=["q_proj", "v_proj"]))


def a_rollout():
    mask = torch.ones(1, 3, dtype=torch.bool)
    return Rollout(IDS[:, :3], mask, IDS[:, 3:], mask, torch.tensor([True]), ("",), ("",))


def move(model):
    """Change everything trainable, as updates would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_adapters_off_is_bitwise_the_base_and_never_touches_requires_grad(model_folder):
    base, model = load_causal(model_folder).eval(), move(load_causal(model_folder, LORA)).eval()
    flags = [p.requires_grad for p in model.parameters()]
    assert not torch.equal(model(IDS).logits, base(IDS).logits)
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not torch.equal(model(IDS).logits, base(IDS).logits)


def test_adapters_come_back_after_an_error_and_nested_contexts(model_folder):
    model = move(load_causal(model_folder, LORA)).eval()
    expected = model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, expected)
    with adapters_off(model):
        base = model(IDS).logits
        with adapters_off(model):
            pass
        assert torch.equal(model(IDS).logits, base)  # the inner context does not switch on what the outer holds off


def test_gradients_survive_a_reference_pass_between_forward_and_backward(model_folder):
    def gradients(with_reference):
        model = load_causal(model_folder, LORA)
        loss = token_logprobs(model, a_rollout()).sum()
        if with_reference:
            Reference(model).token_logprobs(model, a_rollout())
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, between = gradients(False), gradients(True)
    assert all(grad is not None for grad in between)
    assert all(torch.equal(a, b) for a, b in zip(plain, between, strict=True))


def test_adapters_off_refuses_a_model_without_adapters(model_folder):
    model = load_causal(model_folder)
    assert not has_adapters(model)
    with pytest.raises(ValueError, match="no adapters"), adapters_off(model):
        pass


@pytest.mark.parametrize("network", [Network(), LORA], ids=["copy", "adapters off"])
def test_the_reference_stays_where_the_policy_started(model_folder, network):
    policy = load_causal(model_folder, network)
    reference = Reference(policy)
    start = token_logprobs(policy, a_rollout()).detach()
    move(policy)
    found = reference.token_logprobs(policy, a_rollout(), temperature=1.0)
    assert torch.equal(found, start)
    assert not found.requires_grad
    assert not torch.equal(token_logprobs(policy, a_rollout()).detach(), start)
    hot = reference.token_logprobs(policy, a_rollout(), temperature=2.0)
    assert not torch.equal(hot, start)


def test_only_a_policy_without_adapters_is_copied(model_folder):
    assert Reference(load_causal(model_folder, LORA)).frozen is None
    policy = load_causal(model_folder)
    copy = Reference(policy, dtype="bfloat16").frozen
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert copy.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(p.requires_grad for p in copy.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.parameters())


def test_evaluating_restores_the_mode_of_every_module_even_after_an_error(model_folder):
    one, two = load_causal(model_folder), load_scalar(model_folder)
    one.model.layers[0].eval()
    freeze(two).score.train()
    before = [module.training for module in [*one.modules(), *two.modules()]]
    assert len(set(before)) == 2
    with evaluating(one, two):
        assert not any(module.training for module in [*one.modules(), *two.modules()])
    assert [module.training for module in [*one.modules(), *two.modules()]] == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(one, two):
        raise RuntimeError("inside")
    assert [module.training for module in [*one.modules(), *two.modules()]] == before


class Stage(nn.Module):
    """As a stage holds its networks."""

    def __init__(self, folder, network):
        super().__init__()
        self.policy, self.critic = load_causal(folder, network), load_scalar(folder, network)
        self.reference = Reference(self.policy)
        forget_in_checkpoints(self, ["reference"])
        keep_adapters_only(self, ["policy", "critic"])


def test_a_checkpoint_holds_no_frozen_network_and_loads_strictly(model_folder):
    stage, fresh = Stage(model_folder, Network()), Stage(model_folder, Network())
    move(stage.policy)
    state = stage.state_dict()
    assert {key.split(".")[0] for key in state} == {"policy", "critic"}
    assert set(state) >= {f"policy.{name}" for name in stage.policy.state_dict()}
    fresh.load_state_dict(state)
    assert torch.equal(fresh.policy(IDS).logits, stage.policy(IDS).logits)


def test_under_lora_a_checkpoint_holds_adapters_and_head_only(model_folder):
    stage, fresh = Stage(model_folder, LORA), Stage(model_folder, LORA)
    move(stage.policy), move(stage.critic)
    state = stage.state_dict()
    assert all(".lora_" in key or key == "critic.score.weight" for key in state)
    assert len(state) == 8 + 8 + 1
    stage.policy.requires_grad_(False)
    assert set(stage.state_dict()) == set(state)  # names decide, not requires_grad
    fresh.load_state_dict(state)
    assert torch.equal(fresh.policy(IDS).logits, stage.policy(IDS).logits)
    assert torch.equal(fresh.critic.score.weight, stage.critic.score.weight)


def test_a_checkpoint_that_lacks_what_is_trained_still_fails(model_folder):
    stage = Stage(model_folder, LORA)
    state = stage.state_dict()
    del state["critic.score.weight"]
    with pytest.raises(RuntimeError, match=r"critic\.score\.weight"):
        stage.load_state_dict(state)


def test_what_is_forgotten_is_forgotten_inside_a_larger_module_too(model_folder):
    outer = nn.ModuleDict({"stage": Stage(model_folder, LORA)})
    state = outer.state_dict()
    assert all(key.startswith("stage.") and (".lora_" in key or key.endswith("score.weight")) for key in state)
    outer.load_state_dict(state)
