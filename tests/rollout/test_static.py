"""Fixed shapes: the same samples as the growing loop, and a step that a CUDA graph can replay.

``Tape`` stands for a CUDA graph: it records a step's operations without effect, refuses those that wait for the device,
and does them again on the same memory. A number that Python saw while recording stays what it was.
"""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import tiny
import torch
from families import FAMILIES, family, prompts, rows_of, sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf.models import Lora, Network, load_causal, token_logprobs
from lit_rlhf.models.fixed import why_not_fixed
from lit_rlhf.rollout import DecodeSampler, decode, replay
from lit_rlhf.rollout.static import sizes_of

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::equal", "aten::masked_select"}


class Tape(TorchDispatchMode):
    """Records every operation; ``replay`` does them again."""

    def __init__(self, step) -> None:
        super().__init__()
        self.done, self.before = [], []
        with self:
            step()
        for tensor, value in reversed(self.before):  # a capture runs nothing
            tensor.copy_(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function._schema.name}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(t, t.clone()) for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        self.before += [(kwargs["out"], kwargs["out"].clone())] if "out" in kwargs else []
        self.done.append((function, args, kwargs, out := function(*args, **kwargs)))
        return out

    def replay(self) -> None:
        """Do all again; what an operation gave the first time gets what it gives now."""
        for function, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Have steps recorded on tapes, as they are on CUDA; gives the tapes made."""
    made = []
    monkeypatch.setattr(replay, "recorder", lambda device: lambda step, earlier: made.append(Tape(step)) or made[-1])
    monkeypatch.setattr(decode, "_look_every", lambda device: 4)
    return made


def same(found, expected) -> None:
    assert rows_of(found) == rows_of(expected)
    torch.testing.assert_close(found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5, rtol=0)
    if expected.sampler_entropy is not None:
        torch.testing.assert_close(found.sampler_entropy, expected.sampler_entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bloom"])
def test_families_draw_the_same_captured_or_not(name, request):
    policy, batch = family(name), prompts([5, 9, 2, 9], copies=5)
    expected = sample(policy, batch, temperature=0.8)
    assert expected.lengths.max() > 10  # beyond the sliding window
    same(sample(policy, batch, DecodeSampler(cuda_graphs=True), temperature=0.8), expected)
    tapes = request.getfixturevalue("tapes")
    same(sample(policy, batch, DecodeSampler(cuda_graphs=True), temperature=0.8), expected)
    assert tapes


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "min_new_tokens": 5},
    {"min_new_tokens": 7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2, "temperature": 1.3},
    {"stop_ids": ()},
    {"max_new_tokens": 1},
]


@pytest.mark.filterwarnings("ignore:sampling is filtered")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_holds_in_a_captured_step(settings, tapes):
    policy, batch = family("qwen3"), prompts([5, 9, 2, 9], copies=5)
    expected = sample(policy, batch, DecodeSampler(entropy=True), **settings)
    same(sample(policy, batch, DecodeSampler(entropy=True, cuda_graphs=True), **settings), expected)
    assert bool(tapes) == (settings.get("max_new_tokens") != 1)


def test_graphs_are_kept_while_the_weights_stay_where_they_are(tapes):
    policy, sampler = family("llama"), DecodeSampler(cuda_graphs=True)
    first = sample(policy, prompts([5, 9, 2, 9], copies=5), sampler)
    count = len(tapes)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8)  # as an optimizer does, in place
    for lengths, copies, seed in [([5, 9, 2, 9], 5, 3), ([11, 1, 4], 5, 4), ([3], 9, 5)]:  # other widths, fewer rows
        batch = prompts(lengths, copies, seed=seed)
        same(sample(policy, batch, sampler, seed=seed), sample(policy, batch, seed=seed))
    assert len(tapes) - count <= 1  # at most a size that the first rollout did not stay at
    assert rows_of(sample(policy, prompts([5, 9, 2, 9], copies=5))) != rows_of(first)
    count = len(tapes)
    policy.lm_head.weight.data = policy.lm_head.weight.data * 1.5  # elsewhere
    batch = prompts([5, 9, 2, 9], copies=5)
    same(sample(policy, batch, sampler), sample(policy, batch))
    assert len(tapes) > count


def test_a_larger_batch_or_another_policy_gets_buffers_of_its_own(tapes):
    one, two, sampler = family("llama"), family("llama", seed=1), DecodeSampler(cuda_graphs=True)
    for policy, batch in [
        (one, prompts([5, 9])),
        (one, prompts([5, 9], copies=20)),
        (two, prompts([5, 9], copies=20)),
        (one, prompts([70, 60])),
    ]:
        same(sample(policy, batch, sampler), sample(policy, batch))
    alive = weakref.ref(two)
    del two, policy
    gc.collect()
    assert alive() is None  # nobody but its owner holds a policy


def test_ended_rows_leave_by_halves_and_parts_share_the_buffers(tapes):
    assert [sizes_of(n) for n in (1, 8, 9, 64, 100)] == [
        [8],
        [8],
        [16, 8],
        [64, 32, 16, 8],
        [104, 56, 32, 16, 8],
    ]
    policy, batch, seen = family("llama"), prompts([5, 9, 2, 9], copies=16), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    expected = sample(policy, batch)
    seen.clear()
    same(sample(policy, batch, DecodeSampler(cuda_graphs=True)), expected)
    steps = [rows for rows, width in seen if width == 1]
    assert set(steps) <= {64, 32, 16, 8, 1}  # once each before a look, and while recording
    assert len(set(steps)) > 2
    row = 2 * 2 * 2 * 8 * 4 * (9 + 24)
    same(sample(policy, batch, DecodeSampler(cuda_graphs=True, cache_gb=30.5 * row / 2**30)), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_take_part_merged_or_not(dtype, tmp_path, tapes):
    policy = load_causal(tiny.save_tiny(tmp_path), Network(lora=Lora(r=2), dtype=dtype)).eval()
    sampler, batch = DecodeSampler(cuda_graphs=True), prompts([4, 6], copies=4)
    counts = []
    for seed in range(3):  # in the third the adapters are as the optimizer has left them
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        expected, found = sample(policy, batch, seed=seed), sample(policy, batch, sampler, seed=seed)
        if dtype == "float32":
            same(found, expected)
        gap = (found.sampler_logprobs - token_logprobs(policy, found)).abs().max()
        assert gap < (1e-5 if dtype == "float32" else 0.1)
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        counts.append(len(tapes))
    assert counts[0] == counts[2] > 0  # merged anew, in the same place


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast_weights_are_cast_once_a_rollout_and_never_stale(name, tapes):
    policy, sampler = family(name), DecodeSampler(cuda_graphs=True)
    own = list(policy.parameters())
    for seed in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rollout = sample(policy, prompts([5, 9], copies=4), sampler, seed=seed)
            gap = (rollout.sampler_logprobs - token_logprobs(policy, rollout)).abs()
        assert gap[rollout.mask].mean() < 0.03
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    assert all(now is was for now, was in zip(policy.parameters(), own, strict=True))
    to_bfloat16 = [
        args[0].shape
        for function, args, kwargs, _ in tapes[0].done
        if function._schema.name == "aten::_to_copy" and kwargs.get("dtype") == torch.bfloat16
    ]
    if name == "llama":  # gpt2's layers are no linear layers to torch: theirs are cast in the step
        assert not {p.shape for p in own if p.dim() == 2} & set(to_bfloat16)
    with torch.no_grad():
        same(sample(policy, prompts([5, 9]), sampler), sample(policy, prompts([5, 9])))  # without autocast again


def test_what_cannot_be_captured_runs_uncaptured_and_says_so_once(monkeypatch):
    policy, batch = family("llama"), prompts([5, 9, 2, 9], copies=5)
    handle = policy.lm_head.register_forward_hook(lambda _, __, output: output * float(output.abs().max() > 0))
    monkeypatch.setattr(replay, "recorder", lambda device: lambda step, earlier: Tape(step))
    sampler, expected = DecodeSampler(cuda_graphs=True), sample(policy, batch)
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph .*_local_scalar_dense"):
        found = sample(policy, batch, sampler)
    same(found, expected)
    same(sample(policy, batch, sampler), expected)  # a warning would be an error
    handle.remove()


def test_models_that_cannot_are_decoded_as_ever_with_one_warning():
    windowed = {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 6, "num_layers": 2}
    FAMILIES["gpt_neo"] = ("GPTNeo", windowed)  # its window counts from the last column there is
    try:
        models = {"bloom": "no positions", "gpt_neo": "room for more"}
        for policy, reason in ((family(name), reason) for name, reason in models.items()):
            sampler, batch = DecodeSampler(cuda_graphs=True), prompts([5, 9, 2])
            with pytest.warns(UserWarning, match=f"cuda_graphs does nothing for .*{reason}"):
                found = sample(policy, batch, sampler)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                sample(policy, batch, sampler)
            same(found, sample(policy, batch))
    finally:
        del FAMILIES["gpt_neo"]
    policy = family("llama")
    policy.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in why_not_fixed(policy)
    policy.config._attn_implementation, policy.config.layer_types = "sdpa", ["chunked_attention"]
    assert "chunked_attention" in why_not_fixed(policy)
    foreign = type("Own", (torch.nn.Module,), {"__module__": "hub"})()
    foreign.config = policy.config
    assert "not transformers' own" in why_not_fixed(foreign)
