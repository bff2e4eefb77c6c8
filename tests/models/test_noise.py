"""Noise on embeddings and dropout on the residual branches: how much, where, when, and that nothing stays behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPTNeoXConfig, OPTConfig

from lit_rlhf.models import Lora, Network, embedding_noise, load_causal, uniform_noise
from lit_rlhf.models.noise import add_residual_dropout

IDS = torch.arange(3, 35).view(2, 16)
SIZES = {"vocab_size": 259, "hidden_size": 32, "num_attention_heads": 4}


def test_neftune_noise_is_uniform_and_as_large_as_the_paper_says():
    """Algorithm 1 of Jain et al. 2023: α / √(L·d), L the tokens of the row that are no padding."""
    mask = torch.arange(50) < torch.tensor([[50], [10]])
    noise = uniform_noise(tiny.tiny_llama(), mask, 5.0, seed=0)
    assert noise.shape == (2, 50, 32)
    for row, length in zip(noise, (50, 10), strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.98 * bound < row.abs().max() <= bound
        assert row.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(row.mean()) < 0.1 * bound


def test_noise_is_a_function_of_its_seed_alone():
    model, mask = tiny.tiny_llama(), torch.ones(2, 4, dtype=torch.bool)
    draws = []
    for seed in (1, 1, 2):
        torch.rand(len(draws))
        before = torch.get_rng_state()
        draws.append(uniform_noise(model, mask, 5.0, seed=seed))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_noise_is_added_to_the_embeddings_while_gradients_flow_and_the_hook_goes():
    model, seen = tiny.tiny_llama(), []
    noise = torch.randn(2, 20, 32)
    plain = model(IDS).logits
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with embedding_noise(model, noise):
        model(IDS)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, plain)
    torch.testing.assert_close(seen[0], model.model.embed_tokens(IDS) + noise[:, :16])
    with pytest.raises(RuntimeError, match="stop"), embedding_noise(model, noise):
        raise RuntimeError("stop")
    assert torch.equal(model(IDS).logits, plain)
    with embedding_noise(model, None):
        assert torch.equal(model(IDS).logits, plain)


def build(config) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(config)


LLAMA_LIKE = {
    "llama": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "neox": lambda: build(GPTNeoXConfig(**SIZES, intermediate_size=64, num_hidden_layers=2)),
    "gemma2": lambda: build(Gemma2Config(**SIZES, intermediate_size=64, num_hidden_layers=2, head_dim=8)),
}


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_residual_dropout_zeroes_its_share_of_both_branches_in_train_mode_only(name):
    model = LLAMA_LIKE[name]().eval()
    plain = model(IDS).logits
    branches = {n: m for n, m in model.named_modules() if n.split(".")[-1] in ("self_attn", "attn", "attention", "mlp")}
    outputs: dict[str, list[torch.Tensor]] = {n: [] for n in branches}

    def keep(name):
        return lambda _, args, out: outputs[name].append(out[0] if isinstance(out, tuple) else out)

    for n, m in branches.items():
        m.register_forward_hook(keep(n))
    add_residual_dropout(model, 0.25)
    for n, m in branches.items():
        m.register_forward_hook(keep(n))
    assert len(branches) == 4
    assert torch.equal(model(IDS).logits, plain)
    for held in outputs.values():
        held.clear()
        [m.train() for m in branches.values()]
    model(IDS)
    for before, after in outputs.values():
        dropped = (after == 0) & (before != 0)
        assert 0.15 < dropped.float().mean() < 0.35
        torch.testing.assert_close(after[~dropped], before[~dropped] / 0.75)


@pytest.mark.parametrize(
    "config",
    [BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4), OPTConfig(**SIZES, num_hidden_layers=1)],
    ids=["bloom gives back the stream", "opt has no mlp module"],
)
def test_a_model_without_such_branches_is_named(config):
    model = build(config)
    with pytest.raises(ValueError, match=rf"residual_dropout: {type(model).__name__} has no branches"):
        add_residual_dropout(model, 0.2)


def test_the_knob_adds_residual_dropout_and_no_other(model_folder):
    still = load_causal(model_folder)
    noisy = load_causal(model_folder, Network(residual_dropout=0.2, lora=Lora(r=2), gradient_checkpointing=True))
    assert torch.equal(still(IDS).logits, still(IDS).logits)
    assert not torch.equal(noisy(IDS).logits, noisy(IDS).logits)
    assert noisy.config.attention_dropout == 0
    assert torch.equal(noisy.eval()(IDS).logits, still.eval()(IDS).logits)


@pytest.mark.parametrize("knob", ["dropout", "residual_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_probability_that_is_none_is_refused(knob, value):
    with pytest.raises(ValueError, match=rf"network.{knob} is {value}"):
        Network(**{knob: value})
