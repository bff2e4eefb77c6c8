"""Packed rows: the same log-probs and gradients as one example a row, in every kind of attention that can do it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, MambaConfig, OPTConfig, Qwen3Config

from lit_rlhf.models import embedding_noise, next_token_logprobs, packed_next_token_logprobs
from lit_rlhf.models.packing import _leaks, pack_rows

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LENGTHS = torch.tensor([3, 12, 7, 1, 9, 5, 2, 11])


def from_config(config) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


MODELS = {
    "llama": tiny.tiny_llama,
    "gpt2": lambda: tiny.tiny_gpt2().eval(),
    "qwen3": lambda: from_config(Qwen3Config(**SIZES)),
    "gemma2, sliding": lambda: from_config(Gemma2Config(**SIZES, **WINDOW)),
    "gemma3, sliding": lambda: from_config(Gemma3TextConfig(**SIZES, **WINDOW)),
}


def batch(pad: int = tiny.PAD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ragged examples, one of a single token, of which about half of the tokens are learned."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(14) < LENGTHS[:, None]
    ids = torch.randint(3, 259, mask.shape, generator=generator).where(mask, pad)
    return ids, mask, mask & (torch.rand(mask.shape, generator=generator) < 0.5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_log_probs_and_gradients_are_those_of_one_example_a_row(name, attention):
    if (name, attention) == ("gemma2, sliding", "sdpa"):
        attention = "eager"  # it has no other
    model, (ids, mask, learned), gradients, results = MODELS[name](), batch(), [], []
    model.set_attn_implementation(attention)
    weights = torch.rand(len(ids), ids.shape[1] - 1)
    for read in (next_token_logprobs, packed_next_token_logprobs):
        model.zero_grad()
        results.append(read(model, ids, mask, learned))
        (results[-1][0] * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)
    assert torch.equal(results[1][1], results[0][1])
    assert (results[0][0] != 0).sum() == learned[:, 1:].sum() > 10
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_a_packed_row_is_no_longer_than_the_longest_example_and_there_are_as_few_as_it_takes():
    model, (ids, mask, learned), seen = tiny.tiny_llama(), batch(), []
    packed_next_token_logprobs(model, ids, mask, learned)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    packed_next_token_logprobs(model, ids, mask, learned)
    assert seen == [(4, 11)]  # 42 tokens that are read, in rows of 11


def test_flash_attention_gets_one_row_without_padding(monkeypatch):
    """It tells examples apart by their positions only in a batch of one; what it computes itself needs a GPU."""
    model, (ids, mask, learned), seen = tiny.tiny_llama(), batch(), []
    expected = next_token_logprobs(model, ids, mask, learned)[0]
    monkeypatch.setattr("lit_rlhf.models.packing._is_flash", lambda network: True)
    packed_next_token_logprobs(model, ids, mask, learned)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    torch.testing.assert_close(packed_next_token_logprobs(model, ids, mask, learned)[0], expected, atol=1e-5, rtol=0)
    assert seen[0].shape == (1, 42)
    assert (seen[0] == 0).sum() == 7  # the example of one token is not read at all


@pytest.mark.parametrize("side", ["left", "both"])
def test_padding_may_stand_on_either_side_and_hold_anything(side):
    model, (ids, mask, learned) = tiny.tiny_llama(), batch(pad=50_000)
    expected = next_token_logprobs(model, ids, mask, learned)[0][:, :11].sum(dim=1)
    if side == "left":
        ids, mask, learned = (torch.stack([r.roll(14 - int(n)) for r, n in zip(x, LENGTHS, strict=True)]) for x in
                              (ids, mask, learned))  # fmt: skip
    else:
        ids, mask, learned = (torch.nn.functional.pad(x, (3, 0)) for x in (ids, mask, learned))
    found = packed_next_token_logprobs(model, ids, mask, learned)[0].sum(dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_batch_with_nothing_to_read_gives_zeros():
    ids = torch.full((3, 1), 7)
    logprobs, correct = packed_next_token_logprobs(tiny.tiny_llama(), ids, ids > 0)
    assert logprobs.shape == correct.shape == (3, 0)


def test_noise_follows_its_tokens_into_the_packed_row():
    model, (ids, mask, learned) = tiny.tiny_llama(), batch()
    noise = torch.randn(*ids.shape, 32)
    with embedding_noise(model, noise):
        expected = next_token_logprobs(model, ids, mask, learned)[0]
    found = packed_next_token_logprobs(model, ids, mask, learned, noise)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, packed_next_token_logprobs(model, ids, mask, learned)[0], atol=1e-2)


STATE_SPACE = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
OWN_MASKS = OPTConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64)


@pytest.mark.parametrize("config", [STATE_SPACE, OWN_MASKS], ids=["mamba", "opt"])
def test_a_model_that_cannot_keep_examples_apart_is_named(config):
    model = from_config(config).train()
    for _ in range(2):  # found out once, said always
        with pytest.raises(ValueError, match=rf"{type(model).__name__} lets examples .* set packing: false"):
            packed_next_token_logprobs(model, *batch())
    assert all(module.training for module in model.modules())


def test_the_trial_sees_a_leak_and_a_wrong_position(monkeypatch):
    assert not _leaks(tiny.tiny_gpt2())
    model = tiny.tiny_gpt2()
    wpe = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: wpe(torch.arange(ids.shape[1])[None]))
    assert _leaks(model)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_every_example_has_its_place_and_no_row_overflows(lengths):
    room = max(lengths)
    rows = pack_rows(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= room
    assert all(a + b > room for a, b in pairwise(sums)) or room == 0
