"""Log-probabilities: equal to the plain definition, blind to padding and company, at response positions only."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from lit_rlhf.batch import Rollout
from lit_rlhf.models import next_token_logprobs, stop_ids, token_logprobs

ROWS = [([5, 6, 7], [8, 9, tiny.EOS]), ([40], [41, 42, 43, 44, tiny.EOS]), ([9, 10, 11, 12, 13], [14])]
MODELS = {"llama": tiny.tiny_llama, "gpt2": tiny.tiny_gpt2}


def rollout_of(rows, *, left=0, right=0, pad=tiny.PAD):
    """Rows of (prompt, response), padded to the longest and by ``left``/``right`` columns more."""
    width_p = max(len(p) for p, _ in rows) + left
    width_t = max(len(r) for _, r in rows) + right
    prompt_ids, response_ids = torch.full((len(rows), width_p), pad), torch.full((len(rows), width_t), pad)
    prompt_mask, mask = torch.zeros_like(prompt_ids, dtype=torch.bool), torch.zeros_like(response_ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        prompt_ids[i, width_p - len(prompt) :], prompt_mask[i, width_p - len(prompt) :] = torch.tensor(prompt), True
        response_ids[i, : len(response)], mask[i, : len(response)] = torch.tensor(response), True
    none = ("",) * len(rows)
    return Rollout(prompt_ids, prompt_mask, response_ids, mask, mask.any(1), none, none)


def by_definition(model, prompt, response, temperature=1.0):
    """Log-probabilities of one response, one forward pass a token, nothing padded."""
    ids, out = list(prompt), []
    for token in response:
        logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        out.append(torch.log(torch.softmax(logits, dim=-1))[token])
        ids.append(token)
    return torch.stack(out).float()


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](seed=3)


@torch.no_grad()
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS, 50_000], ids=["pad", "pad is eos", "pad beyond the vocabulary"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (7, 2), (0, 5)])
def test_logprobs_are_the_definition_whatever_the_padding(model, left, right, pad):
    found = token_logprobs(model, rollout_of(ROWS, left=left, right=right, pad=pad))
    for row, (prompt, response) in zip(found, ROWS, strict=True):
        torch.testing.assert_close(row[: len(response)], by_definition(model, prompt, response), atol=1e-5, rtol=0)
        assert (row[len(response) :] == 0).all()


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(model):
    together = token_logprobs(model, rollout_of(ROWS, left=2, right=1))
    for row, pair in zip(together, ROWS, strict=True):
        alone = token_logprobs(model, rollout_of([pair]))[0]
        torch.testing.assert_close(row[: len(pair[1])], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_temperature_divides_the_logits(model):
    found = token_logprobs(model, rollout_of(ROWS), temperature=0.6)
    expected = by_definition(model, *ROWS[0], temperature=0.6)
    torch.testing.assert_close(found[0, : len(ROWS[0][1])], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(model, rollout_of(ROWS), temperature=0.0)


@torch.no_grad()
def test_entropy_is_that_of_the_distribution_at_each_token(model):
    rollout = rollout_of(ROWS, left=1)
    logprobs, entropy = token_logprobs(model, rollout, temperature=0.7, entropy=True)
    torch.testing.assert_close(logprobs, token_logprobs(model, rollout, temperature=0.7))
    log_p = (model(torch.tensor([ROWS[1][0] + ROWS[1][1][:2]])).logits[0, -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy[1, 2], -(log_p.exp() * log_p).sum(), atol=1e-5, rtol=0)
    assert (entropy[~rollout.mask] == 0).all()


def test_gradients_flow_and_garbage_under_the_mask_does_not_reach_them(model):
    def gradients(rollout):
        model.zero_grad()
        token_logprobs(model, rollout).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    clean, dirty = rollout_of(ROWS), rollout_of(ROWS, pad=77)
    assert sum(g.abs().sum() for g in gradients(clean)) > 0
    for one, other in zip(gradients(clean), gradients(dirty), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_logits_are_made_at_response_positions_only(model):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.shape[1]))
    token_logprobs(model, rollout_of(ROWS, left=20))
    handle.remove()
    assert seen == [5]


@torch.no_grad()
def test_soft_capped_logits_stay_soft_capped():
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.mul_(50)
    found = token_logprobs(model, rollout_of(ROWS))
    # Capped at ±0.05, no token of 64 can be far from uniform.
    assert (found[rollout_of(ROWS).mask] + torch.log(torch.tensor(64.0))).abs().max() < 0.11


@torch.no_grad()
def test_bfloat16_models_give_float32_logprobs(model):
    model.to(torch.bfloat16)
    prompt, response = ROWS[0]
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, :-1].float()
    found = token_logprobs(model, rollout_of(ROWS[:1]), temperature=0.7)[0]
    expected = (logits[2:] / 0.7).log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found, _ = next_token_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool))
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_logprobs_are_aligned_and_masked(model, side):
    rows = [p + r for p, r in ROWS]
    width = max(map(len, rows)) + 2
    ids, mask = torch.full((3, width), 77), torch.zeros(3, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at] = torch.tensor(row), True
    logprobs, correct = next_token_logprobs(model, ids, mask)
    assert logprobs.shape == correct.shape == (3, width - 1)
    for i, row in enumerate(rows):
        at = slice(0, len(row) - 1) if side == "right" else slice(width - len(row), width - 1)
        expected = by_definition(model, row[:1], row[1:])
        torch.testing.assert_close(logprobs[i, at], expected, atol=1e-5, rtol=0)
        best = model(torch.tensor([row])).logits[0, :-1].argmax(-1)
        assert correct[i, at].tolist() == (best == torch.tensor(row[1:])).tolist()
        counted = torch.zeros(width - 1, dtype=torch.bool)
        counted[at] = True
        assert (logprobs[i, ~counted] == 0).all()
        assert not correct[i, ~counted].any()


def test_a_right_guess_counts_as_correct(model):
    ids = torch.tensor([[5, 6]])
    ids[0, 1] = model(ids[:, :1]).logits[0, -1].argmax()
    assert next_token_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool))[1].tolist() == [[True]]


def test_stop_ids_join_generation_config_and_tokenizer(tokenizer):
    model = tiny.tiny_llama()
    assert stop_ids(model, tokenizer) == (tiny.EOS,)
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == (tiny.EOS, 7, 9)
    model.generation_config.eos_token_id = 9
    assert stop_ids(model, None) == (9,)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, None) == ()
