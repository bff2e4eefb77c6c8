"""Tables, curves and texts of the study on stories, from the runs that run.sh left.

Run ``python benchmarks/stories/report.py OUT docs/results``: prints markdown, writes PNGs into the second folder.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {"ppo": "PPO, reward model", "grpo": "GRPO, reward model", "words": "GRPO, given words"}
COLOURS = {"ppo": "tab:blue", "grpo": "tab:orange", "words": "tab:green"}


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics of a run's newest version, empty cells left out."""
    versions = sorted(run.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not versions:
        return []
    with versions[-1].open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def last(run: Path, prefix: str = "val/") -> dict[str, float]:
    """The last validation of a run."""
    found = [row for row in rows(run) if any(key.startswith(prefix) for key in row)]
    return found[-1] if found else {}


def lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def interval(metrics: dict[str, float], name: str, mode: str = "sampled", prompts: int = 64) -> str:
    """Mean and 95 % interval of a reward over the held-out prompts."""
    mean, std = (metrics.get(f"val/rewards_{mode}/{name}/{part}") for part in ("mean", "std"))
    return "" if mean is None or std is None else f"{mean:.2f} ± {1.96 * std / prompts**0.5:.2f}"


def print_stages(out: Path) -> None:
    """SFT before and after, and the reward model."""
    print("| model | held-out perplexity | ends its stories with EOS |\n| --- | --- | --- |")
    for name in ("before", "sft"):
        metrics, endings = last(out / name), lines(out / name / "endings.jsonl")
        ended = f"{sum(row['ended'] for row in endings)} of {len(endings)}" if endings else ""
        state = "as released" if name == "before" else "after SFT"
        print(f"| {out.name} {state} | {metrics.get('val/perplexity', float('nan')):.2f} | {ended} |")
    metrics = last(out / "reward")
    if metrics:
        accuracy, loss, error = (metrics[f"val/{key}"] for key in ("accuracy", "loss", "calibration_error"))
        print(f"\nReward model: {len(lines(out / 'pairs.jsonl'))} pairs; held-out accuracy {accuracy:.3f}, ", end="")
        print(f"loss {loss:.3f}, calibration error {error:.3f}.\n")


def print_runs(out: Path) -> list[tuple[str, int, Path]]:
    """One row a run: held-out gold, proxy and words at the start and at the end, and the KL."""
    found = [(kind, int(run.name.split("_")[1]), run) for kind in RUNS for run in sorted(out.glob(f"{kind}_*"))]
    head = "policy | seed | gold, sampled | gold, greedy | proxy, sampled | given words | KL, nats a response | minutes"
    print(f"| {head} |\n|{' --- |' * 8}")
    for label, seed, run in [("SFT", 0, out / "start_0"), *((RUNS[kind], seed, run) for kind, seed, run in found)]:
        metrics = last(run)
        phases = [row.get(f"time/{phase}", 0.0) for row in rows(run) for phase in ("rollout", "score", "update")]
        cells = [interval(metrics, "gold"), interval(metrics, "gold", "greedy"), interval(metrics, "reward_model")]
        cells += [interval(metrics, "words"), f"{metrics.get('val/kl', 0.0):.1f}", f"{sum(phases) / 60:.0f}"]
        print(f"| {label} | {seed} | {' | '.join(cells)} |")
    return found


def draw(out: Path, found: list[tuple[str, int, Path]], picture: Path) -> None:
    """Gold and proxy against KL, a point a rollout; gold and the words reward over rollouts, a line a seed."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    against_kl, proxy_kl, over_time, words_time = grid.flat
    for kind, seed, run in found:
        training = [row for row in rows(run) if "objective/kl" in row]
        kl, steps = [row["objective/kl"] for row in training], range(1, len(training) + 1)
        gold = [row["rewards/gold/mean"] for row in training]
        style = {"color": COLOURS[kind], "alpha": 0.9 - 0.25 * seed, "label": RUNS[kind] if seed == 0 else None}
        against_kl.plot(kl, gold, ".", **style)
        over_time.plot(steps, gold, **style)
        if kind == "words":
            words_time.plot(steps, [row["rewards/words/mean"] for row in training], **style)
        else:
            proxy_kl.plot(kl, [row["rewards/reward_model/mean"] for row in training], ".", **style)
    kl_label = "KL(π‖π_ref), nats a response"
    against_kl.set(xlabel=kl_label, ylabel="gold (VADER)")
    proxy_kl.set(xlabel=kl_label, ylabel="proxy (reward model), standard deviations")
    over_time.set(xlabel="rollouts", ylabel="gold (VADER)")
    words_time.set(xlabel="rollouts", ylabel="share of the given words used again")
    for axis in grid.flat:
        axis.grid(alpha=0.3)
    against_kl.legend()
    figure.suptitle(f"{out.name}: rollouts of training; paler = another seed")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def print_texts(out: Path) -> None:
    """The first ten held-out prompts, continued by every policy; nothing is selected."""
    texts = {path.stem: lines(path) for path in sorted((out / "texts").glob("*.jsonl"))}
    order = [name for name in ("sft_0", "sft", "ppo_0", "grpo_0", "words_0") if name in texts]
    for number, row in enumerate(texts[order[0]] if order else [], 1):
        print(f"{number}. **{row['prompt']}** (words: {', '.join(row['words'])})")
        for name in order:
            completion = " ".join(texts[name][number - 1]["completion"].split())
            print(f"   - {name.split('_')[0].upper()}: {completion}")


def main(out: Path, pictures: Path) -> None:
    """Report on every model found."""
    pictures.mkdir(parents=True, exist_ok=True)
    for model in sorted(path for path in out.iterdir() if path.name.startswith("stories")):
        print(f"\n## {model.name}\n")
        print_stages(model)
        found = print_runs(model)
        draw(model, found, pictures / f"{model.name}.png")
        print()
        print_texts(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
