"""Time a rollout with its log-probs beside transformers' ``generate`` and a log-prob pass, and beside its floor.

``python benchmarks/speed/rollout.py``             the table: both shapes, ragged and full, groups of 8 and none
``python benchmarks/speed/rollout.py --ablation``  what each remedy gives: ragged, groups of 8, without one at a time
``python benchmarks/speed/rollout.py --growth F``  how time grows with rows, length and group size, as a picture F.png

Process CPU seconds, medians of interleaved repeats, float32. The floor: forward passes of the rows that are still
there, prompts read once a group, nothing else. ``--json FILE`` keeps what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import processor
from torch import Tensor
from work import Work, end_by_position, prompts, save_models

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import Lora, Network, evaluating, load_causal, load_tokenizer
from lit_rlhf.models.cache import new_cache, read_on
from lit_rlhf.rollout import DecodeSampler, GenerateSampler, Sampling, decode

TABLE = [
    *((shape, lengths, 8, rows) for shape, rows in (("1m", 64), ("15m", 8)) for lengths in ("ragged", "full")),
    *((shape, lengths, 1, rows) for shape, rows in (("1m", 256), ("15m", 32)) for lengths in ("ragged", "full")),
]


class Bench:
    """One policy on one piece of work: what is timed."""

    def __init__(self, work: Work, folder: Path, lora: bool = False) -> None:
        self.work, network = work, Network(lora=Lora(r=16) if lora else None)
        self.policy = load_causal(str(folder / "policy"), network).eval()
        self.tokenizer = load_tokenizer(str(folder / "policy"))
        end_by_position(self.policy, work)
        ids = torch.tensor(prompts(work)[: work.rows])
        batch = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ("",) * len(ids))
        self.batch, self.sampling = batch.repeat(work.group), Sampling(max_new_tokens=work.response_tokens)

    def ours(self) -> Rollout:
        """The default sampler, which keeps the log-probs of what it draws."""
        return DecodeSampler()(self.policy, self.tokenizer, self.batch, self.sampling, seed=1)

    @torch.no_grad()
    def generate_and_read(self) -> Rollout:
        """Transformers' generate, then log-softmax at the response positions, 64 rows at a time."""
        rollout = GenerateSampler()(self.policy, self.tokenizer, self.batch, self.sampling, seed=1)
        for rows in torch.arange(len(rollout)).split(64):
            part = rollout.select(rows).trim()
            logits = self.policy(
                input_ids=part.input_ids, attention_mask=part.input_mask.long(), logits_to_keep=part.mask.shape[1] + 1
            ).logits[:, :-1]
            logits.log_softmax(dim=-1).gather(2, part.response_ids[..., None])
        return rollout

    @torch.no_grad()
    def floor(self, lengths: Tensor) -> None:
        """Forward passes alone: distinct prompts, then at each step the rows that need another token."""
        work, width = self.work, self.work.prompt_tokens
        ids = self.batch.ids[:: work.group]
        positions = torch.arange(width).expand(len(ids), -1)
        part, cache = new_cache(self.policy, width), new_cache(self.policy, width + work.response_tokens)
        rows = torch.arange(len(lengths))
        with evaluating(self.policy):
            read_on(self.policy, part, ids, None, positions)
            cache.fan_in(part, rows, rows // work.group, width, len(rows))
            for step in range(1, int(lengths.max())):
                live = int((lengths > step).sum())
                for layer in cache.layers:  # the first rows stand for whoever is left: no copy
                    layer.key_buffer, layer.value_buffer = layer.key_buffer[:live], layer.value_buffer[:live]
                read_on(self.policy, cache, rows[:live, None] + 3, None, torch.full((live, 1), width + step - 1))


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way, one of each in turn, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """Rates of this process: matrix products and memory copies."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big, target = torch.randn(2**25), torch.empty(2**25)
    seconds = interleaved({"products": lambda: a @ b, "copy": lambda: target.copy_(big)}, 9)
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "GFLOP/s": 2 * 1024**3 / seconds["products"] / 1e9,
        "copy GB/s": 2 * 4 * 2**25 / seconds["copy"] / 1e9,
    }


def parameters(policy: Any) -> int:
    """Weights that take part in a matrix product for every token: all but the embedding's look-up."""
    return sum(p.numel() for p in policy.parameters())


def compare(shape: str, lengths: str, group: int, rows: int, repeats: int, rates: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    work = Work("grpo", shape=shape, lengths=lengths, rows=rows, group=group, steps=1)
    with tempfile.TemporaryDirectory() as name:
        save_models(shape, Path(name))
        bench = Bench(work, Path(name))
    rollout = bench.ours()
    ways = {"ours": bench.ours, "generate": bench.generate_and_read, "floor": lambda: bench.floor(rollout.lengths)}
    seconds = interleaved(ways, repeats)
    tokens = int(rollout.mask.sum())
    flops = 2 * parameters(bench.policy) * (tokens + rows * work.prompt_tokens)
    return {
        "shape": shape, "lengths": lengths, "group": group, "responses": rows * group, "tokens": tokens, **seconds,
        "faster": seconds["generate"] / seconds["ours"], "of floor": seconds["ours"] / seconds["floor"],
        "of products": flops / rates["GFLOP/s"] / 1e9 / seconds["ours"],
    }  # fmt: skip


@contextlib.contextmanager
def without(remedy: str) -> Iterator[None]:
    """Take one remedy away."""

    def multinomial(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Any = ()) -> tuple[Tensor, Tensor]:
        logprobs = logits.float().log_softmax(dim=-1)
        token = torch.multinomial(logprobs.exp(), 1)
        return token.squeeze(1), logprobs.gather(1, token).squeeze(1)

    if remedy == "prompts read once a group":
        fake = lambda ids, **_: (ids, torch.arange(len(ids)))  # noqa: E731
        with mock.patch.object(torch, "unique", fake):
            yield
    elif remedy == "ended rows leave":
        with mock.patch.object(decode, "_LEAVE_AT", 2.0):
            yield
    elif remedy == "two-level draw":
        with mock.patch.object(decode, "draw", multinomial):
            yield
    elif remedy == "adapters merged":
        with mock.patch.object(decode, "merged", contextlib.nullcontext):
            yield
    else:
        yield


def ablation(repeats: int) -> list[dict[str, Any]]:
    """Seconds of a ragged rollout in groups of 8 without one remedy at a time; adapters beside merged ones."""
    found = []
    for shape, rows in (("1m", 64), ("15m", 8)):
        work = Work("grpo", shape=shape, lengths="ragged", rows=rows, group=8, steps=1)
        with tempfile.TemporaryDirectory() as name:
            save_models(shape, Path(name))
            plain, adapted = Bench(work, Path(name)), Bench(work, Path(name), lora=True)

        def timed(bench: Bench, remedy: str) -> Callable[[], None]:
            def way() -> None:
                with without(remedy):
                    bench.ours()

            return way

        remedies = ("", "prompts read once a group", "ended rows leave", "two-level draw")
        seconds = interleaved({remedy: timed(plain, remedy) for remedy in remedies}, repeats)
        lora = interleaved({remedy: timed(adapted, remedy) for remedy in ("", "adapters merged")}, repeats)
        found += [
            {"shape": shape, "without": remedy, "seconds": s, "slower": s / seconds[""]}
            for remedy, s in seconds.items()
        ]
        found.append(
            {"shape": shape, "without": "adapters merged (LoRA r 16)", "seconds": lora["adapters merged"]}
            | {"slower": lora["adapters merged"] / lora[""]}
        )
    return found


AXES = {"rows": (4, 8, 16, 32, 64, 128), "response_tokens": (16, 32, 64, 128, 256), "group": (1, 2, 4, 8, 16, 32)}


def growth(repeats: int) -> list[dict[str, Any]]:
    """Seconds of a full 1M rollout against prompts, response length and group size."""
    base, found = {"rows": 32, "group": 8, "response_tokens": 64}, []
    with tempfile.TemporaryDirectory() as name:
        save_models("1m", Path(name))
        for axis, values in AXES.items():
            for value in values:
                bench = Bench(Work("grpo", steps=1, **{**base, axis: value}), Path(name))
                ways = {"ours": bench.ours, "generate + pass": bench.generate_and_read}
                found.append({"axis": axis, "value": value, **interleaved(ways, repeats)})
    return found


def draw_growth(found: list[dict[str, Any]], picture: Path) -> None:
    """A panel for each axis."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        rows = [row for row in found if row["axis"] == axis]
        for way, style in (("ours", "o-"), ("generate + pass", "s--")):
            panel.loglog([row["value"] for row in rows], [row[way] for row in rows], style, label=way)
        panel.set_xlabel({"rows": "prompts", "response_tokens": "tokens a response"}.get(axis, "responses a prompt"))
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_ylabel("CPU seconds")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle("Rollout of the 1M model; elsewhere 32 prompts × 8 responses × 64 tokens")
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--growth", type=Path, metavar="PICTURE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rates = machine()
    print(
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rates.items()
        )
    )
    if asked.ablation:
        rows = ablation(asked.repeats)
    elif asked.growth:
        rows = growth(asked.repeats)
        draw_growth(rows, asked.growth)
    else:
        rows = [compare(*case, asked.repeats, rates) for case in TABLE]
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if asked.json:
        asked.json.write_text(json.dumps({"machine": rates, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
