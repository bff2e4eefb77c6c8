"""Cuts by length: every row once, bounds kept, no cut cheaper; read in parts, a batch gives what it gives whole."""

from __future__ import annotations

import functools
import itertools
import time

import arena
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule

from lit_rlhf.models import is_sharded, load_scalar, next_token_logprobs, sequence_scores
from lit_rlhf.models.lengths import PASS_TOKENS, cut_by_length
from lit_rlhf.stages import parts
from lit_rlhf.stages.parts import read_in_parts, read_ranked

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
MOST = st.none() | st.integers(1, 30)
OVERHEAD = st.integers(0, 12)
AT_LEAST = st.integers(1, 10)


def padded(lengths: list[int], cut: list[torch.Tensor]) -> int:
    return sum(len(part) * max(lengths[row] for row in part.tolist()) for part in cut)


def cheapest(lengths: list[int], most_tokens: int | None, overhead: int, at_least: int) -> int:
    """Least cost of all 2^(B−1) ways to cut the rows in order of length."""
    rows, costs = sorted(lengths), []
    for flags in itertools.product([False, True], repeat=len(rows) - 1):
        places = [0, *(place for place, cut in enumerate(flags, start=1) if cut), len(rows)]
        chosen = [rows[start:end] for start, end in itertools.pairwise(places)]
        tokens = [len(part) * part[-1] for part in chosen]
        fits = all(len(part) == 1 or size <= (most_tokens or size) for part, size in zip(chosen, tokens, strict=True))
        if fits and len(chosen) >= at_least:
            costs.append(sum(tokens) + overhead * len(chosen))
    return min(costs)


@settings(deadline=None)
@given(LENGTHS, MOST, OVERHEAD, AT_LEAST)
def test_no_cut_is_cheaper(lengths, most_tokens, overhead, at_least):
    cut = cut_by_length(lengths, most_tokens=most_tokens, overhead=overhead, at_least=at_least)
    cost = padded(lengths, cut) + overhead * len(cut)
    assert cost == cheapest(lengths, most_tokens, overhead, min(at_least, len(lengths)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=200), st.none() | st.integers(1, 3000), st.integers(0, 2000), AT_LEAST)
def test_every_row_once_within_the_bound_and_never_worse_than_whole(lengths, most_tokens, overhead, at_least):
    cut = cut_by_length(torch.tensor(lengths), most_tokens=most_tokens, overhead=overhead, at_least=at_least)
    assert sorted(row for part in cut for row in part.tolist()) == list(range(len(lengths)))
    assert all(part.tolist() == sorted(part.tolist()) for part in cut)
    assert len(cut) >= min(at_least, len(lengths))
    if most_tokens is not None:
        assert all(len(part) == 1 or padded(lengths, [part]) <= most_tokens for part in cut)
    elif lengths:
        whole = len(lengths) * max(lengths) + overhead * min(at_least, len(lengths))
        assert padded(lengths, cut) + overhead * len(cut) <= whole
    again = cut_by_length(lengths, most_tokens=most_tokens, overhead=overhead, at_least=at_least)
    assert [part.tolist() for part in again] == [part.tolist() for part in cut]


def test_rows_of_one_length_are_divided_evenly():
    cut = cut_by_length([5] * 11, most_tokens=20, overhead=1)
    assert [len(part) for part in cut] == [3, 4, 4]
    assert [len(part) for part in cut_by_length([5] * 8, at_least=3)] == [2, 3, 3]


def test_a_part_costs_more_on_a_gpu_and_the_default_is_its():
    lengths = [10, 200] * 8
    assert len(cut_by_length(lengths, overhead=PASS_TOKENS["cpu"])) == 2
    assert len(cut_by_length(lengths)) == len(cut_by_length(lengths, overhead=PASS_TOKENS["cuda"])) == 1


def test_thousands_of_rows_are_cut_in_milliseconds():
    lengths = torch.randint(1, 1000, (4096,), generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    cut_by_length(lengths)
    assert time.process_time() - started < 0.3  # 0.01 when nothing else runs


@pytest.fixture
def cheap_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass costs next to nothing, so that even tiny batches are cut."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 1)


def test_a_batch_read_in_parts_gives_what_it_gives_whole(cheap_passes):
    batch, model = arena.examples(9, seed=4), tiny.tiny_llama()
    wide = [torch.nn.functional.pad(one, (0, 3)) for one in (batch.ids, batch.mask, batch.loss_mask)]
    seen: list[tuple[int, ...]] = []

    def reader(model, ids, *more):
        seen.append(tuple(ids.shape))
        return next_token_logprobs(model, ids, *more)

    results = []
    for read in (next_token_logprobs, functools.partial(read_in_parts, reader)):
        model.zero_grad()
        logprobs, correct = read(model, *wide)
        (logprobs.sum() * 0.1).backward()
        results.append((logprobs.detach(), correct, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert len(seen) > 2
    assert sum(rows for rows, _ in seen) == 9
    assert max(width for _, width in seen) == int(batch.mask.sum(dim=1).max())
    for whole, parted in zip(*results, strict=True):
        assert parted.dtype == whole.dtype
        torch.testing.assert_close(parted, whole, atol=1e-5, rtol=0)


def test_rows_of_one_token_and_of_none_can_be_read(cheap_passes, model_folder):
    ids, mask = torch.full((6, 6), 7), torch.arange(6) < torch.tensor([[1], [6], [1], [0], [0], [0]])
    logprobs, _ = read_in_parts(next_token_logprobs, tiny.tiny_llama(), ids, mask)
    assert (logprobs != 0).sum(dim=1).tolist() == [0, 5, 0, 0, 0, 0]
    scores = read_in_parts(sequence_scores, load_scalar(model_folder), ids, mask)
    assert (scores != 0).tolist() == [True, True, True, False, False, False]
    assert scores[0] == scores[2]


def test_all_ranks_make_the_same_number_of_parts(monkeypatch: pytest.MonkeyPatch):
    """Given what the other rank has: parts it wants, and how many rows."""
    lengths, other = [4000, 4000, 9000, 9000], [0, 0]
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda counts, op: torch.maximum(counts, torch.tensor(other), out=counts)
    )
    own = cut_by_length(lengths, overhead=1)
    assert len(own) == 2
    for other[:], count in (([2, -4], 2), ([4, -20], 4), ([1, -3], 2), ([5, -20], 4), ([1, -1], 1)):
        cut = parts._as_many_on_all_ranks(own, lengths, torch.device("cpu"))
        assert len(cut) == count
        assert torch.cat(cut).sort().values.tolist() == [0, 1, 2, 3]


def test_only_sharded_weights_need_that(monkeypatch: pytest.MonkeyPatch):
    model = tiny.tiny_llama()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not is_sharded(model)
    sharded = type("Sharded", (FSDPModule, type(model.lm_head)), {})
    model.lm_head.__class__ = sharded  # what fully_shard does
    assert is_sharded(model)


def test_ranked_responses_are_read_from_where_they_differ(cheap_passes, model_folder):
    own, prompt = arena.pairs(6), torch.arange(100, 106).repeat_interleave(2)[:, None].expand(12, 6)
    batch = own.with_(
        ids=torch.cat([prompt, own.ids], dim=1),
        mask=torch.cat([torch.ones(12, 6, dtype=torch.bool), own.mask], dim=1),
    )
    model, seen = load_scalar(model_folder), []
    expected = sequence_scores(model, batch.ids, batch.mask)
    read_ranked(model, batch)  # the model is known from here on
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    torch.testing.assert_close(read_ranked(model, batch), expected, atol=1e-5, rtol=0)
    assert sum(seen) <= int(own.mask.sum()) + 6 * 6 + 6
