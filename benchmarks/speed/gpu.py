"""One GPU, real sizes, random weights: decode against memory bandwidth, update against the products, memory by part.

Decode is measured as it is, with ``cuda_graphs`` (and how many rows then draw the same), and through ``generate``; the
update with and without Liger's kernels, where they are installed, and how far the log-probs then differ.

``python benchmarks/speed/gpu.py``        a Qwen2.5-0.5B shape in bfloat16, 256 prompts of 128 tokens, 256 new ones
``python benchmarks/speed/gpu.py --dry``  the same steps on a toy model, on whatever is there: to see that they run

Without a CUDA device the first says so and stops. The floor of a decode step: reading the weights and the cache once at
the copy bandwidth that the same run measures. ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from work import tokenizer

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import token_logprobs
from lit_rlhf.models.cache import cache_bytes
from lit_rlhf.models.kernels import apply_liger
from lit_rlhf.objectives import aggregate, clipped_policy_loss
from lit_rlhf.rollout import DecodeSampler, GenerateSampler, Sampling

SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"intermediate_size": 4864, "vocab_size": 151_936},
    "toy": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 64, "vocab_size": 512},
}


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall-clock seconds, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, repeats: int) -> dict[str, float]:
    """Copy bandwidth and rate of bfloat16 products, measured."""
    size = 2**28 if device.type == "cuda" else 2**20
    n = 8192 if device.type == "cuda" else 128
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy GB/s": 2 * 4 * size / seconds(lambda: target.copy_(source), device, repeats) / 1e9,
        "bf16 TFLOP/s": 2 * n**3 / seconds(lambda: a @ b, device, repeats) / 1e12,
    }


def peak_gb(device: torch.device) -> float:
    """Largest memory since the last reset; 0 off a GPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def decode(policy: Any, words: Any, work: argparse.Namespace, found: dict[str, Any], group: int) -> Rollout:
    """Sample with both samplers; tokens a second and the share of the bandwidth floor."""
    device, config = policy.device, policy.config
    ids = torch.randint(3, config.vocab_size, (work.rows // group, work.prompt), device=device)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ("",) * len(ids)).repeat(group)
    sampling = Sampling(max_new_tokens=work.new, stop_ids=())
    rollout = DecodeSampler()(policy, words, prompts, sampling, seed=0)
    tokens = int(rollout.mask.sum())
    graphs = DecodeSampler(cuda_graphs=True)
    captured = graphs(policy, words, prompts, sampling, seed=0)
    same_rows = (captured.response_ids == rollout.response_ids).all(dim=1).float().mean()
    gap = (captured.sampler_logprobs - rollout.sampler_logprobs).abs()[captured.response_ids == rollout.response_ids]
    found[f"cuda graphs, groups of {group}: share of rows drawn alike"] = float(same_rows)
    found[f"cuda graphs, groups of {group}: mean log-prob gap of equal tokens"] = float(gap.mean())
    for name, sampler in (("decode", DecodeSampler()), ("cuda graphs", graphs), ("generate", GenerateSampler())):
        peak_gb(device)
        took = seconds(lambda s=sampler: s(policy, words, prompts, sampling, seed=0), device, work.repeats)  # type: ignore[misc]
        found[f"{name}, groups of {group}: tokens/s"] = tokens / took
        found[f"{name}, groups of {group}: peak GB"] = peak_gb(device)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    columns = work.prompt + work.new / 2
    step_bytes = weights + work.rows * columns * cache_bytes(policy)
    floor = work.rows / (step_bytes / (found["copy GB/s"] * 1e9))
    found[f"floor, groups of {group}: tokens/s"] = floor
    for name in ("decode", "cuda graphs"):
        found[f"{name}, groups of {group}: share of floor"] = found[f"{name}, groups of {group}: tokens/s"] / floor
    return rollout


def liger(policy: Any, rollout: Rollout, work: argparse.Namespace, found: dict[str, Any]) -> None:
    """The update again with Liger's kernels, and the log-probs beside those without."""
    part = rollout.select(torch.arange(min(len(rollout), 8)))
    with torch.no_grad():
        before = token_logprobs(policy, part)
        try:
            apply_liger(policy)
        except (ModuleNotFoundError, ValueError) as error:
            found["update, liger"] = f"not run: {error}"
            return
        gap = (token_logprobs(policy, part) - before).abs()
    found["liger: largest log-prob gap, float32"] = float(gap.max())
    update(policy, rollout, work, found, "update, liger")


def update(
    policy: Any, rollout: Rollout, work: argparse.Namespace, found: dict[str, Any], name: str = "update"
) -> None:
    """Forward and backward of a clipped policy loss in microbatches; the share of the products' rate."""
    device, master = policy.device, policy.float()
    rollout = rollout.with_(old_logprobs=rollout.sampler_logprobs, advantages=rollout.mask.float())
    size = max(1, work.micro_tokens // (work.prompt + work.new))

    def step() -> None:
        master.zero_grad(set_to_none=True)
        for rows in torch.arange(len(rollout)).split(size):
            part = rollout.select(rows).trim()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logprobs = token_logprobs(master, part)
            loss, _ = clipped_policy_loss(
                logprobs, part.old_logprobs, part.advantages, part.mask, clip_low=0.2, clip_high=0.2
            )
            aggregate(loss, part.mask, "token_mean", float(rollout.mask.sum())).backward()

    peak_gb(device)
    took = seconds(step, device, work.repeats)
    head = policy.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.parameters()) - head
    tokens, responses = int(rollout.input_mask.sum()), int(rollout.mask.sum())
    rate = 6 * (body * tokens + head * responses) / took / 1e12
    found |= {f"{name}: tokens/s": tokens / took, f"{name}: peak GB": peak_gb(device)}
    found |= {f"{name}: TFLOP/s": rate, f"{name}: share of products": rate / found["bf16 TFLOP/s"]}


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--micro_tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    work = parser.parse_args()
    if not torch.cuda.is_available() and not work.dry:
        raise SystemExit("no CUDA device here: nothing measured; --dry runs the steps on a toy model")
    if work.dry:
        work.rows, work.prompt, work.new, work.micro_tokens, work.repeats = 16, 8, 8, 64, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES["toy" if work.dry else "0.5B"]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    found |= {"torch": torch.__version__, **rates(device, work.repeats)}
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).to(device, torch.bfloat16).eval()
    words = tokenizer(shape["vocab_size"])
    for group in (8, 1):
        rollout = decode(policy, words, work, found, group)
    update(policy, rollout, work, found)
    liger(policy, rollout, work, found)
    print("| figure | value |\n| --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    if work.json:
        work.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
