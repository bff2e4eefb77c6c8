"""Time and memory of one policy update (forward and backward of a clipped loss), against what it cannot do without.

``python benchmarks/speed/update.py``            time, beside the model's matrix products alone and full logits
``python benchmarks/speed/update.py --profile``  which operators the time goes to
``python benchmarks/speed/update.py --memory``   peak memory at a vocabulary of 152k, each way in a process of its own
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.batch import Rollout
from lit_rlhf.models import load_causal, token_logprobs
from lit_rlhf.objectives import clipped_policy_loss


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; default: a llama of stories15M's shape, random weights")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of each response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="8 rows of 32 + 480 tokens, vocabulary 151,936")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.memory:
        asked.rows, asked.prompt, asked.response, asked.vocabulary = 8, 32, 480, 151_936
    return asked


def network(asked: argparse.Namespace) -> Any:
    """The policy, in train mode."""
    if asked.model:
        return load_causal(asked.model)
    torch.manual_seed(0)
    shape = {"hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}
    config = LlamaConfig(vocab_size=asked.vocabulary, tie_word_embeddings=True, attn_implementation="sdpa", **shape)
    return LlamaForCausalLM(config).train()


def rollout_of(rows: int, prompt: int, response: int, vocabulary: int) -> Rollout:
    """Random tokens, every row full."""
    ids = torch.randint(3, vocabulary, (rows, prompt + response), generator=torch.Generator().manual_seed(0))
    mask, none = torch.ones_like(ids, dtype=torch.bool), ("",) * rows
    return Rollout(
        ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:], mask[:, 0], none, none,
        advantages=torch.randn(rows, response, generator=torch.Generator().manual_seed(1)),
    )  # fmt: skip


def logits_then_softmax(model: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities as they are usually written: logits at response positions, softmax, gather."""
    count = rollout.mask.shape[1]
    mask = rollout.input_mask[:, :-1].long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=rollout.input_ids[:, :-1], attention_mask=mask, position_ids=positions, logits_to_keep=count,
        use_cache=False,
    )  # fmt: skip
    return output.logits.float().log_softmax(dim=-1).gather(2, rollout.response_ids[..., None]).squeeze(2)


def update(model: Any, rollout: Rollout, logprobs_of: Callable[[Any, Rollout], Tensor]) -> None:
    """Forward and backward of the clipped loss at ratio 1."""
    model.zero_grad(set_to_none=True)
    logprobs = logprobs_of(model, rollout)
    loss, _ = clipped_policy_loss(
        logprobs, logprobs.detach(), rollout.advantages, rollout.mask, clip_low=0.2, clip_high=0.2
    )
    loss.sum().backward()


def products(model: Any, rollout: Rollout) -> tuple[Callable[[], None], float]:
    """The three products of every linear layer, the head's at response tokens only; and their arithmetic in GFLOP."""
    read = rollout.input_ids[:, :-1].numel()
    work = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            tokens = int(rollout.mask.sum()) if module is model.get_output_embeddings() else read
            work.append((torch.randn(tokens, module.in_features), torch.randn(tokens, module.out_features), module))
    flops = sum(6 * len(x) * module.weight.numel() for x, _, module in work) / 1e9

    @torch.no_grad()
    def run() -> None:
        for x, gradient, module in work:
            F.linear(x, module.weight)
            gradient @ module.weight
            gradient.t() @ x

    return run, flops


WAYS: dict[str, Callable[[Any, Rollout], Tensor]] = {"lit_rlhf": token_logprobs, "full logits": logits_then_softmax}


def clock() -> float:
    """With one thread the process's own CPU time, which does not count waiting for a core; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure_time(asked: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats of the products and of each way."""
    model = network(asked)
    rollout = rollout_of(asked.rows, asked.prompt, asked.response, model.config.vocab_size)
    alone, gflop = products(model, rollout)
    run = {"products alone": alone}
    run |= {way: lambda f=f: update(model, rollout, f) for way, f in WAYS.items()}
    spent: dict[str, list[float]] = {name: [] for name in run}
    for repeat in range(asked.repeats + 1):
        for name, go in run.items():
            gc.collect()
            start = clock()
            go()
            if repeat:
                spent[name].append(clock() - start)
    floor = statistics.median(spent["products alone"])
    print(f"{asked.rows} rows × ({asked.prompt} + {asked.response}) tokens, {gflop:.0f} GFLOP, {asked.threads} thread")
    print(f"{'':16}{'median s':>10}{'least s':>10}{'× products':>12}")
    found = {}
    for name, times in spent.items():
        middle = statistics.median(times)
        found[name] = {"median_s": middle, "least_s": min(times), "over_products": middle / floor}
        print(f"{name:16}{middle:10.3f}{min(times):10.3f}{middle / floor:12.2f}")
    if asked.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            update(model, rollout, token_logprobs)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=50))
    return {"gflop": gflop, "torch": torch.__version__, "threads": asked.threads, **found}


def peak_mb() -> float:
    """Most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_one_peak(asked: argparse.Namespace) -> None:
    """Be the child: one update, its peak printed as JSON."""
    model = network(asked)
    update(model, rollout_of(1, 2, 2, model.config.vocab_size), WAYS[asked.child])  # libraries loaded
    model.zero_grad(set_to_none=True)
    before = peak_mb()
    start = clock()
    update(model, rollout_of(asked.rows, asked.prompt, asked.response, model.config.vocab_size), WAYS[asked.child])
    print(json.dumps({"before_mb": before, "peak_mb": peak_mb(), "s": clock() - start}))


def measure_memory(asked: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one update, each way in a process of its own."""
    found: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--memory", "--child", way, "--threads", str(asked.threads)]
        command += ["--model", asked.model] if asked.model else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        found[way]["update_mb"] = found[way]["peak_mb"] - found[way]["before_mb"]
    print(f"{asked.rows} rows × ({asked.prompt} + {asked.response}) tokens, vocabulary {asked.vocabulary:,}")
    print(f"{'':14}{'process MB':>12}{'update MB':>12}{'s':>8}")
    for way, one in found.items():
        print(f"{way:14}{one['peak_mb']:12.0f}{one['update_mb']:12.0f}{one['s']:8.1f}")
    for key in ("update_mb", "peak_mb"):
        print(f"{key}: 1/{found['full logits'][key] / found['lit_rlhf'][key]:.1f} of full logits")
    return found


def main() -> None:
    """Measure, print, write."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    if asked.child:
        return measure_one_peak(asked)
    found = measure_memory(asked) if asked.memory else measure_time(asked)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
