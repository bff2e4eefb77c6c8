"""Log-probabilities: equal to the plain definition, blind to padding and company, at response positions only."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen2Config,
)

from lit_rlhf.batch import Rollout
from lit_rlhf.models import Lora, Network, load_causal, next_token_logprobs, stop_ids, token_logprobs
from lit_rlhf.models import logprobs as logprobs_module
from lit_rlhf.models.output import after_head

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


SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "qwen2, sliding window": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "gemma2, sliding window and soft-caps": lambda: Gemma2Config(
        **SMALL, head_dim=8, sliding_window=3, final_logit_softcapping=0.3, attn_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "bloom, ALiBi": lambda: BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
    "cohere, logits scaled": lambda: CohereConfig(**SMALL, logit_scale=0.0625),
    "granite, logits divided": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt-j, head with bias": lambda: GPTJConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "mamba, no attention": lambda: MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4),
}  # fmt: skip


def of_family(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():  # far from uniform, or nothing would be seen
            parameter.copy_(torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_exact_in_ragged_batches(name):
    model = of_family(name)
    found = token_logprobs(model, rollout_of(ROWS, left=3, right=2, pad=77), temperature=0.8)
    for row, (prompt, response) in zip(found, ROWS, strict=True):
        expected = by_definition(model, prompt, response, temperature=0.8)
        torch.testing.assert_close(row[: len(response)], expected, atol=1e-5, rtol=1e-5)
    assert after_head(model) is not None


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (1 / 3, None), (1.0, 30.0), (1.0, 0.05), (40.0, 15.0)])
def test_what_a_model_does_to_its_logits_is_read_off_it(scale, cap):
    class Model(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            logits = output.logits * scale
            output.logits = logits if cap is None else cap * torch.tanh(logits / cap)
            return output

    found = after_head(Model(tiny.tiny_llama().config))
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert found.cap == (None if cap is None else pytest.approx(cap, rel=1e-6))


class Suppressed(LlamaForCausalLM):
    """Does to logits what is neither scale nor soft-cap."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 8] -= 5
        return output


class Halved(LlamaForCausalLM):
    """Gives fewer logits than its head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :100]
        return output


@pytest.mark.parametrize("kind", [Suppressed, Halved])
def test_a_model_that_does_something_else_is_run_as_it_is(kind):
    torch.manual_seed(0)
    model = kind(tiny.tiny_llama().config).eval()
    with pytest.warns(UserWarning, match=f"{kind.__name__} does more to its logits"):
        found, entropy = token_logprobs(model, rollout_of(ROWS), entropy=True)
    torch.testing.assert_close(found[0, :3], by_definition(model, *ROWS[0]), atol=1e-5, rtol=0)
    assert after_head(model) is None
    (found.sum() + entropy.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_adapters_on_the_head_count_and_learn(model_folder):
    model = load_causal(model_folder, Network(lora=Lora(r=2, targets=["q_proj", "lm_head"]))).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    found = token_logprobs(model, rollout_of(ROWS))
    torch.testing.assert_close(found[0, :3], by_definition(model, *ROWS[0]), atol=1e-5, rtol=0)
    found.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [2**26, 0], ids=["kept", "chunks"])
def test_gradients_of_all_weights_are_those_of_full_logits(tied, kept, monkeypatch):
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", kept)
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 600)
    model, rollout = tiny.tiny_llama(tie_word_embeddings=tied), rollout_of(ROWS, left=2, right=1)
    logprobs, entropy = token_logprobs(model, rollout, temperature=0.7, entropy=True)
    found = torch.autograd.grad((logprobs * 2 + entropy).sum(), list(model.parameters()))
    loss = torch.zeros(())
    for prompt, response in ROWS:
        ids = torch.tensor([prompt + response])
        log_p = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        loss = loss + 2 * log_p.gather(1, ids[0, len(prompt) :, None]).sum() - (log_p.exp() * log_p).sum()
    for one, other in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [2**26, 0], ids=["kept", "chunks"])
@pytest.mark.parametrize("make", [tiny.tiny_llama, lambda: of_family("gemma2, sliding window and soft-caps")])
def test_the_first_ratio_is_exactly_one(make, kept, monkeypatch):
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", kept)
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 600)
    model, rollout = make(), rollout_of(ROWS, left=2)
    with torch.no_grad():
        old = token_logprobs(model.eval(), rollout)
    assert torch.equal(token_logprobs(model.train(), rollout), old)
    assert torch.equal(token_logprobs(model, rollout, entropy=True)[0], old)


@torch.no_grad()
def test_the_head_runs_for_the_tokens_asked_for_only(model):
    token_logprobs(model, rollout_of(ROWS[:1]))  # the model is known from here on
    rollout = rollout_of(ROWS, left=20)
    with Products() as products:
        token_logprobs(model, rollout)
    heights = {x.shape[0] for x in products.made if x.shape[-1] == 259 and x.shape != model.lm_head.weight.t().shape}
    assert max(heights) == rollout.mask.sum() == 9


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [out] if torch.is_tensor(out) and out.dim() else []
        return out


@pytest.mark.filterwarnings("ignore:Suppressed does more")
@pytest.mark.parametrize("make", [tiny.tiny_llama, lambda: Suppressed(tiny.tiny_llama().config)])
def test_the_model_is_itself_again_even_after_an_error(make):
    model = make()
    before = dict(model.lm_head.__dict__)
    for ids in (5, 10_000):
        rollout = rollout_of([([ids, 6], [7])])
        with pytest.raises(IndexError) if ids == 10_000 else contextlib.nullcontext():
            token_logprobs(model, rollout)
        assert model.lm_head.__dict__.keys() == before.keys()
        assert not model._forward_hooks
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 259)


def test_looking_a_model_over_leaves_the_random_state_alone():
    model = tiny.tiny_llama(attention_dropout=0.5).train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = token_logprobs(model, rollout_of(ROWS))
        torch.manual_seed(3)
        assert torch.equal(token_logprobs(model, rollout_of(ROWS)), first)


def test_nothing_to_score_gives_zeros_and_zero_gradients(model):
    rollout = rollout_of(ROWS)
    logprobs, entropy = token_logprobs(model, rollout.with_(mask=rollout.mask & False), entropy=True)
    assert (logprobs == 0).all()
    assert logprobs.shape == entropy.shape == rollout.mask.shape
    (logprobs.sum() + entropy.sum()).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.get_output_embeddings().parameters())


def test_gradient_checkpointing_changes_nothing(model_folder):
    gradients = []
    for checkpointing in (False, True):
        model = load_causal(model_folder, Network(gradient_checkpointing=checkpointing))
        token_logprobs(model, rollout_of(ROWS)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


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


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_learned_tokens_are_read_where_they_are_named(model, side):
    ids, mask = torch.randint(3, 259, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    mask[1, : 4 if side == "left" else 9] = side == "right"
    mask[1, 5:] = side == "left"
    learned = torch.rand(3, 9) < 0.5
    whole, part = next_token_logprobs(model, ids, mask), next_token_logprobs(model, ids, mask, learned)
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(torch.where(learned[:, 1:], one, 0), other.to(one.dtype) * 1, atol=1e-5, rtol=0)


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
