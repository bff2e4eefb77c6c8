"""Time of an SFT step's forward and backward pass: padded, in parts of like length, and packed.

``python benchmarks/speed/packing.py``   a table: short and long examples, even and ragged, on the device that is there
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from work import SHAPES

from lit_rlhf.models import next_token_logprobs, packed_next_token_logprobs
from lit_rlhf.stages.parts import read_in_parts

WAYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "padded": next_token_logprobs,
    "in parts": lambda *given: read_in_parts(next_token_logprobs, *given),
    "packed": packed_next_token_logprobs,
}
# Examples of a batch, shortest and longest of them; lengths are the even quantiles between, or few long among short.
LOADS = {
    "64 of 8 to 32": [8 + 24 * i // 63 for i in range(64)],
    "32 of 16 to 256": [16 + 240 * i // 31 for i in range(32)],
    "60 of 16, 4 of 256": [16] * 60 + [256] * 4,
    "16 of 256": [256] * 16,
}


def batch(lengths: list[int], vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    """Random tokens, padded on the right."""
    sizes = torch.tensor(lengths)[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))]
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(1)).where(mask, 0)
    return ids.to(device), mask.to(device)


def clock(device: str) -> float:
    """CPU time of the process on a CPU with one thread, else wall time once the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def measure(model: Any, lengths: list[int], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each way, interleaved."""
    ids, mask = batch(lengths, model.config.vocab_size, device)
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, read in WAYS.items():
            model.zero_grad(set_to_none=True)
            start = clock(device)
            read(model, ids, mask)[0].sum().backward()
            if repeat:
                spent[way].append(clock(device) - start)
    return {way: statistics.median(times) for way, times in spent.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1m", "15m"], choices=list(SHAPES))
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    print("| model | examples of so many tokens | padded, ms | in parts, ms | packed, ms | packed / in parts |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in asked.shapes:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, attn_implementation=asked.attention)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = LlamaForCausalLM(config).to(device, dtype).train()
        for load, lengths in LOADS.items():
            found = measure(model, lengths, asked.repeats, device)
            times = " | ".join(f"{1000 * seconds:.0f}" for seconds in found.values())
            print(f"| {shape} | {load} | {times} | {found['packed'] / found['in parts']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
