"""The decode loop: per-row streams, shared prompts, rows that leave, families of models, adapters, exact draws."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
import transformers
from families import FAMILIES, family, prompts, rows_of, sample

from lit_rlhf.models import Lora, Network, load_causal, token_logprobs
from lit_rlhf.rollout import DecodeSampler, GenerateSampler, Sampling, decode
from lit_rlhf.rollout.draw import draw, uniforms


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_draw_what_their_own_forward_says(name):
    """Ragged prompts, groups, rows that leave: every log-prob is the one that a plain forward of the text gives."""
    policy = family(name)
    rollout = sample(policy, prompts([5, 9, 2, 9], copies=3), temperature=0.8)
    assert rollout.ended.any()
    assert rollout.lengths.max() > 10  # beyond the sliding window
    gap = (rollout.sampler_logprobs - token_logprobs(policy, rollout, temperature=0.8)).abs()
    assert gap.max() < 1e-5
    greedy = sample(policy, prompts([5, 9, 2]), temperature=0.0)
    plain = sample(policy, prompts([5, 9, 2]), GenerateSampler(), temperature=0.0)
    assert torch.equal(greedy.response_ids, plain.response_ids)


def test_a_row_draws_the_same_whatever_batch_it_is_in(monkeypatch):
    policy, batch = family("llama"), prompts([5, 9, 2, 7], copies=4)
    whole = rows_of(sample(policy, batch))
    assert len({tuple(row) for row in whole[:4]}) > 1  # a group's rows have streams of their own
    assert rows_of(sample(policy, batch, DecodeSampler(cache_gb=1e-5))) == whole
    assert rows_of(sample(policy, batch, DecodeSampler(prefill_tokens=8))) == whole
    monkeypatch.setattr(decode, "_LEAVE_AT", 2.0)  # nobody ever leaves
    assert rows_of(sample(policy, batch)) == whole
    monkeypatch.setattr(decode, "_LEAVE_AT", 0.0)
    assert rows_of(sample(policy, batch)) == whole
    apart = []
    for part in torch.arange(16).split(5):
        apart += rows_of(sample(policy, batch.select(part).with_(rows=part)))
    assert apart == whole
    assert rows_of(sample(policy, batch.with_(rows=torch.arange(16) + 1)))[:15] != whole[:15]


def test_each_prompt_is_read_once_and_ended_rows_are_not_computed(monkeypatch):
    policy, seen = family("llama"), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    rollout = sample(policy, prompts([5, 9, 5], copies=8), DecodeSampler(prefill_tokens=12))
    assert seen[:2] == [(2, 5), (1, 9)]  # like lengths together, no padding, and no prompt twice
    lengths = rollout.lengths.tolist()
    for step, (rows, width) in enumerate(seen[2:], start=1):
        live = sum(length > step for length in lengths)
        assert width == 1
        assert live <= rows < max(live / 0.95, live + 1) + 1e-9
    assert len(seen) - 2 == max(lengths) - 1


def test_memory_for_the_cache_bounds_the_rows_at_once():
    policy, seen = family("llama"), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    row = 2 * 2 * 2 * 8 * 4 * (9 + 24)  # keys and values × layers × heads × size × bytes × columns
    sample(policy, prompts([9] * 7), DecodeSampler(cache_gb=3.5 * row / 2**30))
    assert max(seen) == 3
    sample(policy, prompts([9] * 7))
    assert max(seen) == 7


@torch.no_grad()
def test_entropy_is_kept_where_asked():
    policy = family("llama")
    assert sample(policy, prompts([4, 6])).sampler_entropy is None
    rollout = sample(policy, prompts([4, 6]), DecodeSampler(entropy=True), temperature=0.7)
    _, entropy = token_logprobs(policy, rollout, temperature=0.7, entropy=True)
    torch.testing.assert_close(rollout.sampler_entropy, entropy, atol=1e-5, rtol=0)


def test_a_model_with_other_state_is_left_to_generate_with_one_warning():
    config = transformers.MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4)
    policy, sampler = transformers.MambaForCausalLM(config).eval(), DecodeSampler()
    with pytest.warns(UserWarning, match="MambaForCausalLM keeps more state"):
        one = sample(policy, prompts([4, 4]), sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = sample(policy, prompts([4, 4]), sampler)
    plain = sample(policy, prompts([4, 4]), GenerateSampler())
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.response_ids, plain.response_ids)


@torch.no_grad()
def test_adapters_are_merged_while_sampling_and_exactly_as_they_were_afterwards(tmp_path):
    policy = load_causal(tiny.save_tiny(tmp_path), Network(lora=Lora(r=2)))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    calls = []
    for name, module in policy.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    rollout = sample(policy, prompts([4, 6]))
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    gap = (rollout.sampler_logprobs - token_logprobs(policy, rollout)).abs().max()
    assert calls  # the trainer's own pass goes through the adapters
    assert gap < 1e-5
    handle = policy.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(policy, prompts([4, 6]))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_draws_are_exact_over_many_blocks():
    """Chi-square over a vocabulary of three blocks, the last one short, with odds over four orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, generator=generator) * 1.5
    logits[::7] = -torch.inf
    n = 200_000
    token, logprob = draw(logits.expand(n, -1), uniforms(5, torch.arange(n), 1)[:, 0], Sampling())
    expected, counts = n * logits.softmax(-1), torch.bincount(token, minlength=600)
    assert counts[::7].sum() == 0
    common = expected > 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = int(common.sum())
    assert freedom > 300
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [3, 300]] = 0.0
    token, logprob = draw(logits, torch.full((1, 2), uniform), Sampling())
    assert token.item() == (3 if uniform == 0 else 300)
    assert logprob.item() == pytest.approx(-0.6931472)


def test_random_streams_are_uniform_and_unrelated():
    u = uniforms(9, torch.arange(2000), 50)
    assert u.shape == (2000, 50, 2)
    assert (u >= 0).all()
    assert (u < 1).all()
    flat = u.flatten().double()
    counts = torch.histc(flat, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * 198**0.5
    table = u.view(2000, 100).double()
    assert torch.corrcoef(table.T).fill_diagonal_(0).abs().max() < 0.12  # between steps
    assert torch.corrcoef(table[:200]).fill_diagonal_(0).abs().max() < 0.5  # between rows
    assert torch.equal(uniforms(9, torch.tensor([7]), 20)[0], u[7, :20])
    assert not torch.equal(uniforms(10, torch.arange(2000), 50), u)
