"""Several adapters on one base: each role runs, learns and is saved as if it stood alone."""

from __future__ import annotations

import json

import arena
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.models import (
    CRITIC,
    POLICY,
    Average,
    Lora,
    Network,
    adapters_off,
    fill,
    inject_adapters,
    load_adapters,
    load_causal,
    load_scalar,
    new_value_head,
    response_values,
    role,
    save_folder,
    sequence_scores,
    token_logprobs,
    trunk_scores,
    trunk_values,
    weights_of,
    without_weights,
)
from lit_rlhf.models.adapters import base_checksum
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.models.switches import adapter_of, merged

IDS = torch.arange(3, 23)[None]
LORA = Lora(r=2)


def rolled():
    return arena.rollout([5, 3, 1, 4])


def with_critic(folder: str, seed: int = 0, **network):
    """A policy and a critic on one base, neither at 0 any more."""
    model = load_causal(folder, Network(lora=LORA, **network), seed=seed)
    inject_adapters(model, LORA, task="SEQ_CLS", seed=seed, name=CRITIC)
    return arena.stir(model)


def lone_critic(folder: str, model, head, **network):
    """A network of its own with the weights of the critic on the policy's base."""
    lone, critic = load_scalar(folder, Network(lora=LORA, **network)), weights_of(model, CRITIC)
    with torch.no_grad():
        lone.score.weight.copy_(head.weight)
        for name, weight in lone.named_parameters():
            if adapter_of(name):
                weight.copy_(critic[name.replace(f".{POLICY}.", f".{CRITIC}.")])
    return lone


def test_a_second_adapter_leaves_the_first_as_it_was(model_folder):
    model = arena.stir(load_causal(model_folder, Network(lora=LORA)))
    frozen = next(p for name, p in model.named_parameters() if "layers.1" in name and adapter_of(name))
    frozen.requires_grad_(False)
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    logits = model(IDS).logits
    inject_adapters(model, Lora(r=3, targets=["q_proj", "lm_head"]), task="SEQ_CLS", name=CRITIC)
    assert torch.equal(model(IDS).logits, logits)
    now = dict(model.named_parameters())
    for name, (parameter, value, trained) in before.items():
        same = now.get(name, now.get(name.replace("lm_head.weight", "lm_head.base_layer.weight")))
        assert same is parameter
        assert torch.equal(same, value)
        assert same.requires_grad == trained, name
    assert {adapter_of(name) for name in now.keys() - before.keys()} == {CRITIC, None}
    assert len(weights_of(model, CRITIC)) == 2 * 3
    assert set(weights_of(model)) == {name for name, (*_, trained) in before.items() if trained}
    assert model.training


def test_what_is_drawn_for_an_adapter_does_not_depend_on_the_others(model_folder):
    model = load_causal(model_folder, Network(lora=LORA), seed=4)
    inject_adapters(model, LORA, task="SEQ_CLS", seed=4, name=CRITIC)
    alone = dict(load_scalar(model_folder, Network(lora=LORA), seed=4).named_parameters())
    critic = weights_of(model, CRITIC)
    assert len(critic) == 28
    assert all(torch.equal(w, alone[name.replace(f".{CRITIC}.", f".{POLICY}.")]) for name, w in critic.items())
    assert torch.equal(new_value_head(model, seed=4).weight, alone["score.weight"])


def test_adapters_on_a_base_in_half_precision_stay_in_float32(model_folder):
    model = with_critic(model_folder, dtype="bfloat16")
    kinds = {adapter_of(name): p.dtype for name, p in model.named_parameters()}
    assert kinds == {None: torch.bfloat16, POLICY: torch.float32, CRITIC: torch.float32}


def test_each_role_is_the_network_that_it_would_be_alone(model_folder):
    model = with_critic(model_folder)
    head = new_value_head(model, seed=9)
    lone, base = lone_critic(model_folder, model, head), load_causal(model_folder)
    policy = load_causal(model_folder, Network(lora=LORA))
    policy.load_state_dict({name: w for name, w in model.state_dict().items() if adapter_of(name) != CRITIC})
    with role(model, CRITIC):
        values = trunk_values(model, head, rolled())  # the head reads other rows at once, which rounds otherwise
        torch.testing.assert_close(values, response_values(lone, rolled()), atol=1e-6, rtol=1e-6)
        ids, mask = rolled().input_ids, rolled().input_mask
        mask[2] = False
        scores = trunk_scores(model, head, ids, mask)
        torch.testing.assert_close(scores, sequence_scores(lone, ids, mask), atol=1e-6, rtol=1e-6)
    assert torch.equal(token_logprobs(model, rolled()), token_logprobs(policy, rolled()))
    with adapters_off(model):
        assert torch.equal(token_logprobs(model, rolled()), token_logprobs(base, rolled()))


def test_a_shared_prompt_is_read_once_in_every_role(model_folder, monkeypatch):
    model, read = with_critic(model_folder), []
    head = new_value_head(model)
    with role(model, CRITIC):
        whole = trunk_values(model, head, rolled())
        monkeypatch.setitem(PASS_TOKENS, "cpu", 1)
        trunk_values(model, head, rolled())  # the model is tried once
        model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
        torch.testing.assert_close(trunk_values(model, head, rolled()), whole)
    assert 0 < sum(read) < 4 * 6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_role_that_ran_and_no_other(checkpointing, model_folder):
    """Backward runs when the switches stand elsewhere; what checkpointing recomputes is still the critic's pass."""
    model = with_critic(model_folder, gradient_checkpointing=checkpointing)
    head = new_value_head(model, seed=9)
    lone = lone_critic(model_folder, model, head)
    with role(model, CRITIC):
        values = trunk_values(model, head, rolled())
    logprobs = token_logprobs(model, rolled())
    values.square().mean().backward()
    assert all(w.grad is None for w in weights_of(model).values())
    response_values(lone, rolled()).square().mean().backward()
    for name, weight in weights_of(model, CRITIC).items():
        expected = lone.get_parameter(name.replace(f".{CRITIC}.", f".{POLICY}.")).grad
        torch.testing.assert_close(weight.grad, expected, atol=5e-6, rtol=1e-4)
    before = {name: w.grad.clone() for name, w in weights_of(model, CRITIC).items()}
    with adapters_off(model):
        logprobs.sum().backward()
    assert all(w.grad.abs().sum() > 0 for w in weights_of(model).values())
    assert all(torch.equal(w.grad, before[name]) for name, w in weights_of(model, CRITIC).items())


def test_roles_nest_and_come_back_after_an_error(model_folder):
    model = with_critic(model_folder).eval()
    policy = model(IDS).logits
    with role(model, CRITIC):
        critic = model(IDS).logits
        with pytest.raises(RuntimeError, match="inside"), role(model, None), role(model, POLICY):
            raise RuntimeError("inside")
        assert torch.equal(model(IDS).logits, critic)
        with role(model, None), role(model, POLICY):
            assert torch.equal(model(IDS).logits, policy)
    assert torch.equal(model(IDS).logits, policy)
    assert not torch.equal(critic, policy)
    assert all(p.requires_grad == (adapter_of(name) is not None) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="no adapter 'judge', only 'default', 'critic'"), role(model, "judge"):
        pass


def test_only_the_policys_adapters_are_merged_saved_and_averaged(model_folder, tmp_path):
    model = with_critic(model_folder).eval()
    inject_adapters(model, Lora(r=2, targets=["lm_head"]), task="SEQ_CLS", name="on the head alone")
    logits = model(IDS).logits
    with merged(model):
        torch.testing.assert_close(model(IDS).logits, logits)
    save_folder(model, None, tmp_path / "merged")
    torch.testing.assert_close(load_causal(str(tmp_path / "merged"))(IDS).logits, logits)
    save_folder(model, None, tmp_path / "alone", merge=False)
    saved = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert len(saved) == len(weights_of(model))
    assert not [name for name in saved if CRITIC in name or POLICY in name]
    assert "default" in json.dumps([*model.peft_config])  # what is saved is a copy
    assert len(list(Average(model, 0.5).buffers())) == len(weights_of(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
def test_an_adapted_embedding_is_saved_under_the_names_that_peft_reads(model_folder, tmp_path):
    from peft import PeftModel

    model = load_causal(model_folder, Network(lora=Lora(r=2, targets=["embed_tokens", "q_proj"])))
    arena.stir(model).eval()
    save_folder(model, None, tmp_path, merge=False)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if POLICY in name]
    loaded = PeftModel.from_pretrained(load_causal(model_folder), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


# -- the adapters of a reward model ------------------------------------------------------------------------------------


def test_a_base_is_known_again_however_it_is_held(model_folder, tmp_path):
    mark = base_checksum(load_causal(model_folder))
    with without_weights():
        unread = load_causal(model_folder, Network(lora=LORA))
    held = [
        load_scalar(model_folder),
        load_scalar(model_folder, Network(lora=LORA)),
        load_causal(model_folder, Network(dtype="bfloat16")),
        with_critic(model_folder),
        unread,
    ]
    assert {base_checksum(one) for one in held} == {mark}
    moved = load_causal(model_folder)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight[0, 3] += 1e-3
    assert base_checksum(moved) != mark
    assert base_checksum(tiny.tiny_llama(1)) != mark


@pytest.mark.parametrize("deferred", [False, True])
def test_loaded_adapters_are_those_of_the_folder(deferred, model_folder, tmp_path):
    folder = arena.reward_on_adapters(model_folder, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    if deferred:
        with without_weights():
            model = load_causal(model_folder, Network(lora=LORA), seed=2)
    else:
        model = load_causal(model_folder, Network(lora=LORA), seed=2)
    head, _ = load_adapters(model, folder, "judge", trained=False)
    fill(model, torch.device("cpu"))
    own = {name: p for name, p in model.named_parameters() if adapter_of(name) == "judge"}
    assert len(own) == len(stored) - 1
    for name, weight in own.items():
        assert torch.equal(weight, stored["base_model.model." + name.replace(".judge.", ".")])
        assert not weight.requires_grad
    assert torch.equal(head, stored["base_model.model.score.weight"])
    alone = load_causal(model_folder, Network(lora=LORA), seed=2)
    assert all(torch.equal(w, alone.get_parameter(name)) for name, w in weights_of(model).items())


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change, header=None):
    state = load_file(folder / "adapter_model.safetensors")
    save_file(change(state), folder / "adapter_model.safetensors", metadata=header)


REFUSED = {
    "no folder": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, r"no adapter_model"),
    "a policy's": (
        lambda f: rewrite(f, lambda s: {k: v for k, v in s.items() if "score" not in k}),
        ValueError,
        "no scalar head",
    ),
    "two labels": (
        lambda f: rewrite(f, lambda s: s | {"base_model.model.score.weight": torch.ones(2, 32)}),
        ValueError,
        "no scalar head",
    ),
    "another kind": (lambda f: change_config(f, peft_type="IA3"), ValueError, "expected LORA"),
    "biases": (lambda f: change_config(f, bias="all"), ValueError, "bias 'all'"),
    "other weights": (lambda f: change_config(f, modules_to_save=["embed_tokens"]), ValueError, "embed_tokens"),
    "another rank": (lambda f: change_config(f, r=4), ValueError, r"28 weights differ, first .*lora_A.* \[3, 32\]"),
    "other layers": (
        lambda f: change_config(f, target_modules=["q_proj"]),
        ValueError,
        "does not fit the policy: 24 weights differ",
    ),
    "another name": (
        lambda f: (rewrite(f, lambda s: s), change_config(f, base_model_name_or_path="some/model")),
        ValueError,
        "trained on another base than the policy's: 'some/model' there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, model_folder, tmp_path):
    spoil, error, message = REFUSED[name]
    folder = arena.reward_on_adapters(model_folder, tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        load_adapters(load_causal(model_folder, Network(lora=LORA)), folder, "judge", trained=False)


def test_adapters_of_another_base_are_refused(model_folder, tmp_path):
    other = tiny.save_tiny(tmp_path / "other", seed=1)
    folder = arena.reward_on_adapters(other, tmp_path / "reward")
    with pytest.raises(ValueError, match=r"another base than the policy's: .*and the weights differ"):
        load_adapters(load_causal(model_folder, Network(lora=LORA)), folder, "judge", trained=False)


def test_a_folder_without_a_checksum_goes_by_the_bases_name(model_folder, tmp_path):
    folder = arena.reward_on_adapters(model_folder, tmp_path)
    rewrite(tmp_path, lambda state: state)
    _, header = load_adapters(load_causal(model_folder, Network(lora=LORA)), folder, "judge", trained=False)
    assert "base" not in header
