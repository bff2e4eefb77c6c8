"""What every sampler keeps: it draws from the policy and nothing else, and leaves no trace."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lit_rlhf.batch import Prompts
from lit_rlhf.models import Network, load_causal, token_logprobs
from lit_rlhf.rollout import DecodeSampler, GenerateSampler, Sampling

ROWS = [[5, 6], [7, 8, 9, 10, 11], [12]]
ENGINE = []


@pytest.fixture(autouse=True, params=[GenerateSampler, DecodeSampler])
def engine(request):
    """The class whose instances ``draw`` uses."""
    ENGINE[:] = [request.param]
    return request.param


def prompts_of(rows, *, left=0, pad=tiny.PAD):
    width = max(map(len, rows)) + left
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), True
    return Prompts(ids, mask, tuple(f"p{i}" for i in range(len(rows))), {"answer": tuple(range(len(rows)))})


def draw(policy, tokenizer, prompts=None, seed=1, sampler=None, **settings):
    prompts = prompts_of(ROWS * 20) if prompts is None else prompts
    settings = {"max_new_tokens": 12, **settings}
    return (sampler or ENGINE[0]())(policy, tokenizer, prompts, Sampling(**settings), seed=seed)


@pytest.fixture
def policy():
    """A policy over 12 tokens with opinions, so that it ends soon and often."""
    model = tiny.tiny_llama(seed=2, vocab_size=13)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


def test_masks_come_from_the_first_stop_token(policy, tokenizer):
    rollout = draw(policy, tokenizer, prompts_of(ROWS * 60))
    assert rollout.response_ids.shape == rollout.mask.shape == rollout.sampler_logprobs.shape
    kinds = set()
    for ids, mask, ended in zip(rollout.response_ids, rollout.mask, rollout.ended, strict=True):
        stops = (ids == tiny.EOS).nonzero().flatten().tolist()
        length = stops[0] + 1 if stops else len(ids)
        assert mask.tolist() == [i < length for i in range(len(ids))]
        assert bool(ended) == bool(stops)
        assert (ids[~mask] == tiny.PAD).all()
        kinds.add((bool(ended), length))
    assert (rollout.lengths >= 1).all()
    assert len(kinds) > 3
    assert {ended for ended, _ in kinds} == {True, False}
    assert (True, 1) in kinds  # an end token alone is a response of one token
    assert (rollout.sampler_logprobs[~rollout.mask] == 0).all()
    assert (rollout.sampler_logprobs[rollout.mask] < 0).all()


def test_prompts_columns_and_texts_travel_along(policy, tokenizer):
    prompts = prompts_of(ROWS * 10)
    rollout = draw(policy, tokenizer, prompts)
    assert rollout.ended.any()
    assert torch.equal(rollout.prompt_ids, prompts.ids)
    assert rollout.prompts == prompts.prompts
    assert rollout.columns == prompts.columns
    for text, ids, mask in zip(rollout.completions, rollout.response_ids, rollout.mask, strict=True):
        assert text == tokenizer.decode(ids[mask & (ids > 2)])


def test_a_response_keeps_the_blank_it_begins_with(policy):
    words = ["<pad>", "<s>", "</s>", *(f"▁{word}" for word in "abcdefghij")]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.decoder = decoders.Metaspace()  # as Llama's: the first word of a text loses its blank
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([5, 6]) == "c d"
    rollout = draw(policy, tokenizer, prompts_of([[1, 5, 6], [7]] * 10))
    for text, ids, mask in zip(rollout.completions, rollout.response_ids, rollout.mask, strict=True):
        assert text == "".join(words[i].replace("▁", " ") for i in ids[mask & (ids > 2)])


def test_padding_that_equals_a_stop_token_hides_no_ending(policy, tokenizer):
    expected = draw(policy, tokenizer, seed=4)
    tokenizer.pad_token = tokenizer.eos_token
    found = draw(policy, tokenizer, prompts_of(ROWS * 20, pad=tiny.EOS), seed=4)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.ended, expected.ended)
    assert found.completions == expected.completions
    assert (found.response_ids[~found.mask] == tiny.EOS).all()


def test_every_stop_id_of_the_generation_config_ends_a_response(policy, tokenizer):
    policy.generation_config.eos_token_id = [5, 7]
    rollout = draw(policy, tokenizer)
    last = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1).flatten()
    assert set(last[rollout.ended].tolist()) == {tiny.EOS, 5, 7}
    inside = rollout.mask.clone().scatter_(1, rollout.lengths[:, None] - 1, False) & rollout.ended[:, None]
    assert not torch.isin(rollout.response_ids[inside], torch.tensor([tiny.EOS, 5, 7])).any()
    only = draw(policy, tokenizer, stop_ids=(9,))
    last = only.response_ids.gather(1, only.lengths[:, None] - 1).flatten()
    assert set(last[only.ended].tolist()) == {9}
    assert draw(policy, tokenizer, stop_ids=tuple(range(13))).response_ids.shape == (60, 1)  # nobody is waited for
    endless = draw(policy, tokenizer, stop_ids=())
    assert not endless.ended.any()
    assert (endless.lengths == 12).all()


def test_same_seed_same_responses_and_another_seed_others(policy, tokenizer):
    one, two, other = (draw(policy, tokenizer, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.sampler_logprobs, two.sampler_logprobs)
    assert one.completions != other.completions


def test_the_global_random_state_is_untouched_and_does_not_matter(policy, tokenizer):
    first = draw(policy, tokenizer)
    torch.manual_seed(123)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(draw(policy, tokenizer).response_ids, first.response_ids)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_modes_and_settings_are_the_same_afterwards_also_after_an_error(policy, tokenizer):
    policy.train()
    policy.model.layers[1].eval()
    own, before = policy.generation_config, [module.training for module in policy.modules()]
    state = torch.get_rng_state()
    draw(policy, tokenizer)
    assert [module.training for module in policy.modules()] == before
    assert policy.generation_config is own

    def fail(*_):
        assert not policy.training
        raise RuntimeError("inside")

    handle = policy.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        draw(policy, tokenizer)
    handle.remove()
    assert [module.training for module in policy.modules()] == before
    assert policy.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.2, "top_p": 0.3, "top_k": 2},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": [3, 4, 5, 6, 7], "forced_eos_token_id": 9, "min_new_tokens": 6},
        {"num_beams": 3, "max_length": 6, "max_new_tokens": 2},
        {"do_sample": True, "min_p": 0.3, "typical_p": 0.4, "renormalize_logits": True},
    ],
)
def test_nothing_of_the_models_own_generation_config_leaks_in(policy, tokenizer, own):
    clean, greedy = draw(policy, tokenizer), draw(policy, tokenizer, temperature=0.0)
    policy.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=9, **own)
    assert torch.equal(draw(policy, tokenizer).response_ids, clean.response_ids)
    assert torch.equal(draw(policy, tokenizer, temperature=0.0).response_ids, greedy.response_ids)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax_of_the_model(policy, tokenizer, temperature):
    n = 4000
    rollout = draw(policy, tokenizer, prompts_of([ROWS[1]] * n, left=2), max_new_tokens=1, temperature=temperature)
    expected = n * (policy(torch.tensor([ROWS[1]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=13)
    common = expected > 5
    rest_expected, rest = expected[~common].sum(), counts[~common].sum()
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum() + (rest - rest_expected) ** 2 / (
        rest_expected + 1
    )
    # The 99.99 % point of chi-square with 12 degrees of freedom; the seed is fixed, so this never flickers.
    assert common.sum() >= 5
    assert chi2 < 39.1


def test_no_token_is_out_of_reach(tokenizer):
    # Nearly uniform over 259 tokens; transformers' own default would keep the 50 likeliest.
    rollout = draw(tiny.tiny_llama(), tokenizer, prompts_of([ROWS[1]] * 1500), max_new_tokens=1)
    assert len(rollout.response_ids.unique()) > 250


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_and_the_trainer_agree_on_log_probabilities(make, tokenizer, temperature):
    policy = make()
    rollout = draw(policy, tokenizer, prompts_of(ROWS, left=3), temperature=temperature, max_new_tokens=30)
    gap = (rollout.sampler_logprobs - token_logprobs(policy, rollout, temperature=temperature)).abs()
    assert gap.max() < 1e-5


@torch.no_grad()
def test_filters_cut_the_draws_but_not_the_recorded_log_probabilities(policy, tokenizer):
    with pytest.warns(UserWarning, match="biased"):
        rollout = draw(policy, tokenizer, prompts_of([ROWS[1]] * 50), top_k=2)
    torch.testing.assert_close(rollout.sampler_logprobs, token_logprobs(policy, rollout), atol=1e-5, rtol=0)
    top = policy(rollout.input_ids).logits[:, 4:-1].topk(2).indices
    drawn = (rollout.response_ids[..., None] == top).any(-1)
    assert drawn[rollout.mask].all()
    assert (rollout.response_ids[:, :1] == top[:, 0]).any(0).all()  # both of the two, not the first alone


@torch.no_grad()
def test_min_new_tokens_keeps_end_tokens_out_of_the_first_ones(policy, tokenizer):
    stops = (tiny.EOS, 5, 7, 9)
    assert draw(policy, tokenizer, stop_ids=stops).lengths.min() == 1
    with pytest.warns(UserWarning, match="min_new_tokens=3"):
        rollout = draw(policy, tokenizer, stop_ids=stops, min_new_tokens=3)
    assert rollout.lengths.min() == 4  # three that are no end token, then one that is
    assert not torch.isin(rollout.response_ids[:, :3], torch.tensor(stops)).any()
    torch.testing.assert_close(rollout.sampler_logprobs, token_logprobs(policy, rollout), atol=1e-5, rtol=0)


def test_top_p_keeps_the_fewest_tokens_that_hold_it(policy, tokenizer):
    likeliest = policy(torch.tensor([ROWS[0]])).logits[0, -1].argmax()
    with pytest.warns(UserWarning, match="top_p=0.01"):
        rollout = draw(policy, tokenizer, prompts_of([ROWS[0]] * 50), top_p=0.01, max_new_tokens=1)
    assert (rollout.response_ids == likeliest).all()


def test_min_p_keeps_tokens_that_are_likely_enough_beside_the_likeliest(policy, tokenizer):
    with torch.no_grad():
        odds = policy(torch.tensor([ROWS[1]])).logits[0, -1].softmax(-1)
    allowed = (odds >= 0.3 * odds.max()).nonzero().flatten().tolist()
    assert 1 < len(allowed) < 6
    with pytest.warns(UserWarning, match="min_p=0.3"):
        rollout = draw(policy, tokenizer, prompts_of([ROWS[1]] * 300), min_p=0.3, max_new_tokens=1)
    assert rollout.response_ids.unique().tolist() == allowed


def test_filtered_sampling_warns_once_a_sampler(policy, tokenizer, engine):
    sampler = engine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(policy, tokenizer, sampler=sampler)
        assert not caught
        for _ in range(3):
            draw(policy, tokenizer, sampler=sampler, top_k=3)
    assert ["biased" in str(warning.message) for warning in caught] == [True]


@torch.no_grad()
def test_temperature_zero_is_greedy(policy, tokenizer):
    one, two = draw(policy, tokenizer, temperature=0.0), draw(policy, tokenizer, temperature=0.0, seed=9)
    assert torch.equal(one.response_ids, two.response_ids)
    ids = list(ROWS[0])
    for token in one.response_ids[0][one.mask[0]].tolist():
        assert token == policy(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)
    torch.testing.assert_close(one.sampler_logprobs, token_logprobs(policy, one), atol=1e-5, rtol=0)


def test_left_padding_does_not_change_what_is_drawn(policy, tokenizer):
    plain, shifted = (
        draw(policy, tokenizer, prompts_of(ROWS)),
        draw(policy, tokenizer, prompts_of(ROWS, left=6, pad=99)),
    )
    assert torch.equal(plain.response_ids, shifted.response_ids)


def test_gradient_checkpointing_and_dropout_sleep_while_sampling(tmp_path, tokenizer):
    tiny.tiny_gpt2().save_pretrained(tmp_path)
    network = Network(dropout=0.5, gradient_checkpointing=True)
    policy = load_causal(str(tmp_path), network)
    rollout = draw(policy, tokenizer, prompts_of(ROWS))
    assert torch.equal(rollout.response_ids, draw(tiny.tiny_gpt2(), tokenizer, prompts_of(ROWS)).response_ids)
    assert policy.training


def test_more_tokens_than_the_model_has_positions_is_refused(tokenizer):
    with pytest.raises(ValueError, match="model has 256 positions"):
        draw(tiny.tiny_gpt2(), tokenizer, prompts_of([[5] * 250], left=40), max_new_tokens=7)
    draw(tiny.tiny_gpt2(), tokenizer, prompts_of([[5] * 250], left=40), max_new_tokens=6)


def test_a_tokenizer_without_padding_is_refused(policy, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        draw(policy, tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_their_rows(value, temperature, tokenizer):
    """Also in a vocabulary that fills no whole block of the draw: no token beyond it is ever read."""
    policy = tiny.tiny_llama(seed=2)
    with torch.no_grad():
        policy.model.embed_tokens.weight[12] = value
    prompts, settings = prompts_of([[5, 6], [7, 8, 9], [12]]), {"temperature": temperature, "max_new_tokens": 2}
    for sampler in (None, DecodeSampler(cuda_graphs=True)):
        with pytest.raises(FloatingPointError, match=r"for 1 of 3 prompts: row 2 from token 0 \('p2'\)"):
            draw(policy, tokenizer, prompts, sampler=sampler, **settings)


def test_logits_that_become_infinite_later_say_from_which_token(tokenizer):
    policy = tiny.tiny_llama(seed=2)
    first = draw(policy, tokenizer, prompts_of([[5, 6]]), max_new_tokens=4, temperature=0.0).response_ids[0, 1]
    with torch.no_grad():
        policy.model.embed_tokens.weight[first] = float("nan")
    with pytest.raises(FloatingPointError, match="row 0 from token 2"):
        draw(policy, tokenizer, prompts_of([[5, 6]]), max_new_tokens=6, temperature=0.0)
