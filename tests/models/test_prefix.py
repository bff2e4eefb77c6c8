"""Beginnings that rows share are read once, and nothing else comes out: values, gradients, first ratio."""

from __future__ import annotations

from unittest import mock

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3Config,
)

from lit_rlhf.batch import Pairs, Rollout
from lit_rlhf.models import (
    Lora,
    Network,
    Reference,
    can_share,
    causal,
    evaluating,
    heads,
    load_causal,
    load_scalar,
    response_values,
    sequence_scores,
    token_logprobs,
)
from lit_rlhf.models.groups import cut_groups
from lit_rlhf.models.heads import shared_scores
from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.models.prefix import groups_of_rows, shared_beginnings, shared_prompts

SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2, sliding window": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma2, sliding window and soft-caps": lambda: Gemma2Config(
        **SMALL, **WINDOW, final_logit_softcapping=0.3, attn_logit_softcapping=5.0, attn_implementation="eager"
    ),
    "gemma3, sliding window": lambda: Gemma3TextConfig(**SMALL, **WINDOW),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cheap_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass costs next to nothing, so that even tiny batches are shared and cut."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)


def answers(prompts: int = 5, group: int = 4, seed: int = 0, pads: int = 0) -> Rollout:
    """Prompts of 1 to 9 tokens and responses of 1 to 12, both ragged; with ``pads`` columns more on either side."""
    draw, rows = torch.Generator().manual_seed(seed), prompts * group
    before = torch.randint(1, 10, (prompts,), generator=draw).repeat_interleave(group)
    after = torch.randint(1, 13, (rows,), generator=draw)
    ids = torch.randint(3, 259, (prompts, 9 + pads), generator=draw).repeat_interleave(group, dim=0)
    own = torch.randint(3, 259, (rows, 12 + pads), generator=draw)
    prompt_mask = torch.arange(9 + pads) >= 9 + pads - before[:, None]
    mask, none = torch.arange(12 + pads) < after[:, None], ("",) * rows
    mixed = torch.randperm(rows, generator=draw)
    whole = Rollout(ids.where(prompt_mask, 50_000), prompt_mask, own.where(mask, 50_000), mask, mask[:, 0], none, none)
    return whole.select(mixed)


def whole_rows():
    """Every row read whole."""
    return [mock.patch.object(room, "can_share", return_value=False) for room in (causal, heads)]


def both_ways(model, reader):
    """What a reader gives, and the gradients of a sum that weighs every entry differently: shared, whole."""
    results = []
    for is_whole in (False, True):
        model.zero_grad()
        if is_whole:
            one, other = whole_rows()
            with one, other:
                found = reader()
        else:
            found = reader()
        found = found if isinstance(found, tuple) else (found,)
        total = sum((x * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in found)
        total.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append(([x.detach() for x in found], gradients))
    return results


def assert_same(results) -> None:
    (found, gradients), (expected, whole) = results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(gradients) == len(whole) > 0
    for one, other in zip(gradients, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())), rtol=1e-4)


def of_family(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()


class Read:
    """Counts the tokens that a model embeds."""

    def __init__(self, model) -> None:
        self.tokens, self.passes = 0, 0
        self.handle = model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, module, args, output) -> None:
        self.tokens, self.passes = self.tokens + args[0].numel(), self.passes + 1


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
def test_logprobs_entropy_and_gradients_are_those_of_whole_rows(name):
    model = tiny.tiny_gpt2(seed=3) if name == "gpt2" else of_family(name)
    assert can_share(model)
    for rollout in (answers(), answers(pads=3, seed=1)):
        assert shared_prompts(rollout) is not None
        assert_same(both_ways(model, lambda r=rollout: token_logprobs(model, r, temperature=0.7, entropy=True)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_values_and_their_gradients_are_those_of_whole_rows(kind, model_folder, tmp_path):
    if kind == "gpt2":
        tiny.tiny_gpt2().save_pretrained(tmp_path)
    model = load_scalar(str(tmp_path) if kind == "gpt2" else model_folder, seed=1).eval()
    assert can_share(model)
    assert_same(both_ways(model, lambda: response_values(model, answers())))


def test_adapters_learn_and_the_reference_shares_too(model_folder):
    model = load_causal(model_folder, Network(lora=Lora(r=2)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert_same(both_ways(model, lambda: token_logprobs(model, answers())))
    read = Read(model)
    found = Reference(model).token_logprobs(model, answers())
    assert read.tokens < answers().input_mask.sum()
    with whole_rows()[0]:
        torch.testing.assert_close(found, Reference(model).token_logprobs(model, answers()), atol=1e-5, rtol=0)


def test_a_prompt_is_read_once_and_a_response_but_for_its_last_token(monkeypatch):
    monkeypatch.setitem(PASS_TOKENS, "cpu", 0)
    model, rollout = tiny.tiny_llama(), answers()
    token_logprobs(model, rollout)  # the model is known from here on
    read = Read(model)
    token_logprobs(model, rollout)
    prompts = {tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)}
    assert len(prompts) == 5
    assert read.tokens == sum(map(len, prompts)) + int((rollout.lengths - 1).sum())
    assert read.passes > 5


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_the_first_ratio_is_exactly_one(make):
    model, rollout = make(), answers()
    with torch.no_grad(), evaluating(model):
        old = token_logprobs(model.eval(), rollout)
    assert torch.equal(token_logprobs(model, rollout), old)
    assert torch.equal(token_logprobs(model, rollout, entropy=True)[0], old)


@pytest.mark.parametrize("case", ["distinct", "dear passes"])
def test_where_nothing_is_to_be_gained_nothing_changes_to_the_bit(case, monkeypatch):
    rollout = answers(prompts=8, group=1) if case == "distinct" else answers(prompts=3, group=2)
    if case == "dear passes":
        monkeypatch.setitem(PASS_TOKENS, "cpu", 128)
    model = tiny.tiny_llama()
    read = Read(model)
    found = token_logprobs(model, rollout)
    assert read.passes == 2  # one looks the model's head over
    with whole_rows()[0]:
        assert torch.equal(found, token_logprobs(model, rollout))


def test_responses_of_one_token_and_holes_in_a_response():
    model, rollout = tiny.tiny_llama(), answers()
    short = rollout.with_(mask=rollout.mask & (torch.arange(12) < 1)).trim()
    holes = rollout.with_(mask=rollout.mask & (torch.arange(12) != 1))
    for one in (short, holes):
        assert shared_prompts(one) is not None
        assert_same(both_ways(model, lambda r=one: token_logprobs(model, r)))


def test_responses_that_count_for_nothing_are_no_reason_to_cut_their_prompt():
    """Masked out as truncated: all answers to the longest prompt, and all answers at all."""
    model, rollout = tiny.tiny_llama(), answers()
    longest = rollout.prompt_mask.sum(dim=1) == int(rollout.prompt_mask.sum(dim=1).max())
    some = rollout.with_(mask=rollout.mask & ~longest[:, None] & (torch.arange(12) < 2))
    assert shared_prompts(some) is not None
    assert_same(both_ways(model, lambda: token_logprobs(model, some)))
    assert not token_logprobs(model, rollout.with_(mask=torch.zeros_like(rollout.mask))).any()


def test_bf16_autocast_stays_finite_and_near():
    model, rollout = tiny.tiny_llama(), answers()
    with torch.autocast("cpu", torch.bfloat16):
        (found, gradients), (expected, _) = both_ways(model, lambda: token_logprobs(model, rollout))
    assert all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(found[0], expected[0], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", ["bloom", "mamba", "dynamic rope", "checkpointing", "flash"])
def test_what_is_not_safe_is_read_whole(name, model_folder):
    if name == "bloom":
        model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4))
    elif name == "mamba":
        config = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
        model = AutoModelForCausalLM.from_config(config)
    elif name == "dynamic rope":
        model = tiny.tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    else:
        model = load_causal(model_folder, Network(gradient_checkpointing=name == "checkpointing"))
    if name == "flash":
        model.config._attn_implementation = "flash_attention_2"
    assert not can_share(model)
    assert not can_share(model.eval())
    if name == "checkpointing":  # nothing is recomputed of what never trains
        assert can_share(model.requires_grad_(False))


def test_a_model_that_gives_something_else_over_a_cache_is_read_whole():
    """Positions that are taken but not heeded, as no list of names could tell."""
    model = tiny.tiny_llama()
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(x, position_ids - position_ids[:, :1])
    assert not can_share(model)


def test_sharded_weights_are_read_whole(monkeypatch):
    model = tiny.tiny_llama()
    assert can_share(model)
    monkeypatch.setattr("lit_rlhf.models.sharing.is_sharded", lambda model: True)
    assert not can_share(model)


def pairs_of(rows: list[list[list[int]]]) -> Pairs:
    """Ranked responses, best first, to each prompt."""
    flat = [row for group in rows for row in group]
    width = max(map(len, flat)) + 2
    ids = torch.tensor([row + [77] * (width - len(row)) for row in flat])
    mask = torch.arange(width) < torch.tensor([len(row) for row in flat])[:, None]
    better, worse, groups, start = [], [], [], 0
    for number, group in enumerate(rows):
        for i in range(len(group) - 1):
            better, worse, groups = [*better, start + i], [*worse, start + i + 1], [*groups, number]
        start += len(group)
    return Pairs(ids, mask, torch.tensor(better), torch.tensor(worse), torch.tensor(groups))


RANKED = [
    [[5, 6, 7, 8, 20], [5, 6, 7, 8, 21, 22, 23], [5, 6, 7, 9]],  # three, alike in three tokens
    [[30, 31, 32, 33, 34], [30, 31, 32]],  # one is where the other begins
    [[40, 41, 42], [50, 51]],  # nothing alike
    [[60, 61, 62, 63, 64, 65], [60, 61, 62, 63, 64, 66]],
]


def test_ranked_responses_share_what_they_begin_with(model_folder):
    model, batch = load_scalar(model_folder, seed=2).eval(), pairs_of(RANKED)
    shared = shared_beginnings(batch.ids, batch.mask, groups_of_rows(batch))
    assert shared.prefix.tolist() == [3, 2, 0, 5]
    assert shared.rest.tolist() == [2, 4, 1, 3, 1, 3, 2, 1, 1]
    scores = [
        lambda: shared_scores(model, shared),
        lambda: sequence_scores(model, batch.ids, batch.mask),
    ]
    results = []
    for score in scores:
        model.zero_grad()
        found = score()
        (found * torch.arange(9)).sum().backward()
        results.append(([found.detach()], [p.grad.clone() for p in model.parameters()]))
    assert_same(results)


def test_a_response_that_is_not_compared_stands_alone():
    batch = pairs_of(RANKED)
    left_out = batch.with_(better=batch.better[2:], worse=batch.worse[2:], groups=batch.groups[2:])
    shared = shared_beginnings(left_out.ids, left_out.mask, groups_of_rows(left_out))
    assert shared.prefix[shared.which].tolist() == [0, 0, 0, 2, 2, 0, 0, 5, 5]


@pytest.mark.parametrize("most", [None, 40, 15, 3])
@pytest.mark.parametrize("count", [None, 3, 12, 20])
def test_groups_stay_together_within_the_bound(most, count):
    which = torch.arange(5).repeat_interleave(4)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    prefix = torch.tensor([9, 2, 5, 5, 1])[which]
    rest = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(1))
    batches, cost = cut_groups(which, prefix, rest, most_tokens=most, overhead=1, count=count)
    assert sorted(torch.cat(batches).tolist()) == list(range(20))
    assert cost >= int(rest.sum()) + 22
    if count is not None:
        assert len(batches) == count
        return
    homes = [len({i for i, rows in enumerate(batches) if number in which[rows]}) for number in range(5)]
    if most is None:
        assert len(batches) == 1
    elif most == 40:
        assert homes == [1] * 5
    for rows in batches:
        read = int(rest[rows].sum()) + sum(int(prefix[which == n][0]) for n in which[rows].unique())
        assert most is None or read <= most or len(rows) == 1
