"""Every algorithm on the demo's stories, over several seeds: ``python benchmarks/algorithms/demo.py FOLDER``.

For each seed the world, the SFT policy and the reward model are made once, as ``lit-rlhf demo`` makes them; then each
contender (contenders.py) trains from there; all are measured on the same held-out prompts. What is there already is not
made again. Prints a table and draws the curves.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from contenders import RECIPES

from lit_rlhf.data import PromptData, SFTData
from lit_rlhf.demo.judge import gold
from lit_rlhf.demo.measure import SAMPLING, measure
from lit_rlhf.demo.run import make_pairs, make_world
from lit_rlhf.demo.train import Sizes, fit, settle, train_reward, train_sft
from lit_rlhf.models import load_causal, next_token_logprobs
from lit_rlhf.rewards import MissingEOS, RewardModel

STEPS = 60
COLUMNS = ("gold", "proxy", "kl", "well_formed", "perplexity", "tokens", "seconds")


def start(folder: Path, seed: int, fast: bool) -> Path:
    """World, SFT policy and reward model of a seed; made once."""
    run = folder / f"seed{seed}"
    sizes = Sizes(stories=200, sft_steps=20, pairs=40, reward_steps=4, prompts=200, held_out=8) if fast else Sizes()
    if not (run / "reward/config.json").exists():
        make_world(run, sizes, seed)
        train_sft(run, sizes, seed)
        make_pairs(run, sizes, seed)
        train_reward(run, sizes, seed)
        stories = (run / "data/stories.jsonl").read_text().splitlines(keepends=True)
        held_out, rows = max(8, len(stories) // 20), [json.loads(line) for line in stories]
        texts = [json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in rows[held_out:]]
        (run / "data/texts.jsonl").write_text("".join(texts))
        (run / "data/held_out_stories.jsonl").write_text("".join(stories[:held_out]))
    return run


def train(run: Path, name: str, seed: int, steps: int) -> None:
    """Train one recipe from the seed's SFT policy; its folder and metrics go beside it."""
    kind, knobs, batch = RECIPES[name]
    more = {"critic": str(run / "reward")} if kind.__name__ == "PPO" and "value" not in knobs else {}
    stage = kind(
        str(run / "sft"),
        rewards=[RewardModel(str(run / "reward"), normalize=True, batch_size=64), gold],
        reward_weights=[1.0, 0.0],
        missing_eos=MissingEOS(penalty=3.0),
        sampling=SAMPLING,
        seed=seed,
        **knobs,
        **more,
    )
    extra: dict[str, Any] = {}
    if knobs.get("ptx_coef"):
        extra = {"pretraining": str(run / "data/texts.jsonl"), "pretraining_batch_size": 64}
    data = PromptData(str(run / "data/prompts.jsonl"), val_fraction=0, batch_size=batch, seed=seed, **extra)
    started = time.process_time()
    fit(name, stage, data, run / "logs" / name, steps)
    stage.export(str(run / name))
    (run / name / "cost.json").write_text(
        json.dumps({"seconds": time.process_time() - started, "tokens": int(stage.tokens)})
    )


@torch.no_grad()
def perplexity(policy: Path, stories: Path) -> float:
    """Of the words of held-out stories, each after its prompt (which nothing but PPO-ptx learns to write)."""
    model = load_causal(str(policy)).eval()
    data = SFTData(str(stories), val=str(stories), limit=8, tokenizer=str(policy), val_batch_size=64)
    data.setup("validate")
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        learned = batch.loss_mask & batch.mask
        logprobs, _ = next_token_logprobs(model, batch.ids, batch.mask, learned)
        total, count = total - float(logprobs.sum()), count + int(learned[:, 1:].sum())
    return float(torch.tensor(total / count).exp())


def judged(run: Path, name: str, seed: int) -> dict[str, float]:
    """Held-out means of one policy, and what it cost; measured once."""
    policy, kept = run / name, run / name / "measured.json"
    if not kept.exists():
        paths = {"start": str(run / "sft"), "reward": str(run / "reward"), "rows": str(run / "data/held_out.jsonl")}
        found = measure(name, str(policy), seed=seed, **paths)
        means = {key: statistics.fmean(getattr(found, key)) for key in ("gold", "proxy", "kl", "well_formed")}
        means["perplexity"] = perplexity(policy, run / "data/held_out_stories.jsonl")
        cost = policy / "cost.json"
        means |= json.loads(cost.read_text()) if cost.exists() else {"seconds": 0.0, "tokens": 0}
        kept.write_text(json.dumps(means))
    return dict(json.loads(kept.read_text()))


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means over the seeds, with the smallest and largest gold score."""
    lines = ["| | gold (least, most) | proxy | KL, nats | well-formed | perplexity | tokens | CPU s |"]
    lines.append("|" + " --- |" * 8)
    for name, seeds in found.items():
        mean = {key: statistics.fmean(one[key] for one in seeds) for key in COLUMNS}
        golds = [one["gold"] for one in seeds]
        lines.append(
            f"| {name} | **{mean['gold']:.2f}** ({min(golds):.2f}, {max(golds):.2f}) | {mean['proxy']:.2f} "
            f"| {mean['kl']:.1f} | {mean['well_formed']:.0%} | {mean['perplexity']:.2f} | {mean['tokens'] / 1e3:.0f}k "
            f"| {mean['seconds']:.0f} |"
        )
    return "\n".join(lines)


def draw(folder: Path, seeds: list[int], names: list[str], path: Path) -> None:
    """Gold score against KL in training, the mean over seeds, a line an algorithm."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_prop_cycle(color=colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    for name in names:
        runs = []
        for seed in seeds:
            with (folder / f"seed{seed}/logs/{name}/metrics.csv").open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get("rewards/gold/mean")]
            runs.append([(float(row["rewards/gold/mean"]), float(row.get("objective/kl") or "nan")) for row in rows])
        curve = [
            [statistics.fmean(values) for values in zip(*points, strict=True)] for points in zip(*runs, strict=True)
        ]
        means = [
            [statistics.fmean(p[i] for p in curve[max(0, k - 3) : k + 4]) for k in range(len(curve))] for i in (0, 1)
        ]
        (line,) = left.plot(means[0], label=name)
        right.plot(means[1], means[0], color=line.get_color())
    left.set_xlabel("rollout (64 responses)")
    left.set_ylabel("gold score in training, mean of the seeds")
    right.set_xlabel("KL to the SFT policy, nats a response (not estimated without a reference)")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--fast", action="store_true", help="a few steps of everything: shows that it runs")
    args = parser.parse_args()
    settle()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("sft", *args.only)}
    for seed in args.seeds:
        run = start(args.folder, seed, args.fast)
        found["sft"].append(judged(run, "sft", seed))
        for name in args.only:
            if not (run / name / "cost.json").exists():
                train(run, name, seed, 2 if args.fast else STEPS)
            found[name].append(judged(run, name, seed))
            print(seed, name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
    text = table(found)
    (args.folder / "table.md").write_text(text + "\n")
    draw(args.folder, args.seeds, args.only, args.folder / "curves.png")
    print(text)


if __name__ == "__main__":
    main()
