"""Time of one update where the prompt is read once for the answers to it, and where every row is read whole.

``python benchmarks/speed/prefix.py``  prints a table: GRPO's update (forward and backward of a clipped loss over all
microbatches of a rollout, groups of 8) and the reward model's on pairs (64 + 64 tokens). Both ways take turns; the
numbers are medians of process CPU seconds, or of wall seconds with more threads than one.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from work import PAD, SHAPES

from lit_rlhf.batch import Pairs, Rollout
from lit_rlhf.models import token_logprobs
from lit_rlhf.objectives import clipped_policy_loss, pairwise_loss
from lit_rlhf.stages.parts import read_ranked
from lit_rlhf.stages.updates import Plan, Updates

GROUP = 8
PLACES = ("lit_rlhf.models.causal.can_share", "lit_rlhf.stages.parts.can_share")  # where it is asked


def network(kind: Any, shape: str) -> Any:
    """A llama with random weights, in train mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, pad_token_id=PAD, num_labels=1)
    config._attn_implementation = "sdpa"
    return kind(config).train()


def lengths_of(rows: int, longest: int, lengths: str, draw: torch.Generator) -> Tensor:
    """Full, or the even quantiles from an eighth on, in random order."""
    even = torch.linspace(longest // 8, longest, rows).round().long()
    return torch.full((rows,), longest) if lengths == "full" else even[torch.randperm(rows, generator=draw)]


def rollout_of(prompts: int, prompt: int, response: int, lengths: str, vocabulary: int) -> Rollout:
    """Random tokens, ``GROUP`` answers a prompt."""
    draw, rows = torch.Generator().manual_seed(0), prompts * GROUP
    prompt_ids = torch.randint(3, vocabulary, (prompts, prompt), generator=draw).repeat_interleave(GROUP, dim=0)
    mask = torch.arange(response) < lengths_of(rows, response, lengths, draw)[:, None]
    ids = torch.randint(3, vocabulary, (rows, response), generator=draw).where(mask, PAD)
    advantages, none = torch.randn(rows, response, generator=draw), ("",) * rows
    whole = torch.ones_like(prompt_ids, dtype=torch.bool)
    return Rollout(prompt_ids, whole, ids, mask, mask[:, 0], none, none, advantages=advantages)


def pairs_of(count: int, prompt: int, response: int, lengths: str, vocabulary: int) -> Pairs:
    """Random responses, two a prompt."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (count, prompt), generator=draw).repeat_interleave(2, dim=0)
    own = torch.randint(3, vocabulary, (2 * count, response), generator=draw)
    mask = torch.arange(prompt + response) < prompt + lengths_of(2 * count, response, lengths, draw)[:, None]
    rows = torch.arange(count)
    return Pairs(torch.cat([prompts, own], dim=1).where(mask, PAD), mask, 2 * rows, 2 * rows + 1, rows)


def grpo(shape: str, lengths: str, prompts: int, prompt: int, response: int) -> Callable[[bool], None]:
    """One pass over a rollout's microbatches, with shared prompts or without."""
    model = network(LlamaForCausalLM, shape)
    rollout = rollout_of(prompts, prompt, response, lengths, model.config.vocab_size)

    def update(shares: bool) -> None:
        model.zero_grad(set_to_none=True)
        plan = Plan(Updates())
        plan.draw_up(rollout, 0, lambda counts: counts, shares)
        for rows in plan.parts(like_updates=True):
            part = rollout.select(rows).trim()
            logprobs = token_logprobs(model, part)
            bounds = {"clip_low": 0.2, "clip_high": 0.2}
            loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), part.advantages, part.mask, **bounds)
            loss.sum().backward()

    return update


def reward(shape: str, lengths: str, pairs: int, prompt: int, response: int) -> Callable[[bool], None]:
    """One batch of pairs."""
    model = network(LlamaForSequenceClassification, shape)
    batch = pairs_of(pairs, prompt, response, lengths, model.config.vocab_size)

    def update(shares: bool) -> None:
        model.zero_grad(set_to_none=True)
        scores = read_ranked(model, batch)
        pairwise_loss(scores[batch.better], scores[batch.worse]).sum().backward()

    return update


def compare(update: Callable[[bool], None], repeats: int) -> tuple[float, float]:
    """Median seconds without sharing and with it, in turns."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for repeat in range(repeats + 1):
        for shares in spent:
            with ExitStack() as stack:
                if not shares:
                    for place in PLACES:
                        stack.enter_context(mock.patch(place, return_value=False))
                gc.collect()
                start = clock()
                update(shares)
                if repeat:  # the first of each is for warming up
                    spent[shares].append(clock() - start)
    return statistics.median(spent[False]), statistics.median(spent[True])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1m", "15m"], choices=list(SHAPES))
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256], help="tokens of GRPO's prompts")
    parser.add_argument(
        "--rows", type=int, help="prompts a rollout, and a quarter of the pairs; default: by the model's size"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| work | model | lengths | prompt + response | every row whole, s | prompts once, s | faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in asked.shapes:
        few = asked.rows or {"15m": 2}.get(shape, 8)
        works = [("grpo", grpo, few, prompt) for prompt in asked.prompts] + [("reward", reward, 4 * few, 64)]
        for name, work, rows, prompt in works:
            for lengths in ("full", "ragged"):
                whole, once = compare(work(shape, lengths, rows, prompt, 64), asked.repeats)
                size = f"{rows} prompts × {GROUP}" if name == "grpo" else f"{rows} pairs"
                columns = [f"{name}, {size}", shape, lengths, f"{prompt} + 64", f"{whole:.3g}", f"{once:.3g}"]
                print("| " + " | ".join([*columns, f"**{whole / once:.2f}×**"]) + " |", flush=True)


if __name__ == "__main__":
    main()
