"""Run the demo from nothing to its table, picture and texts."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .train import Sizes

FAST = {"stories": 600, "sft_steps": 60, "pairs": 60, "reward_steps": 10, "prompts": 64, "rl_steps": 3, "held_out": 16}


def main(folder: str = "lit_rlhf_demo", seed: int = 0, fast: bool = False) -> int:
    """Train SFT, reward model, PPO and GRPO on made-up stories, in a few minutes on two CPU cores, without a network.

    Args:
        folder: where data, models, logs, results, picture and texts go.
        seed: of the stories, the weights and every draw.
        fast: a few steps of everything, in well under a minute: shows that it runs, and is too short to pass.

    Returns:
        0 where PPO and GRPO both beat SFT clearly on the gold judge at a small KL with well-formed stories, else 1.
    """
    started = time.perf_counter()
    from .train import Sizes, settle, train_reward, train_sft

    settle()
    sizes, run = Sizes(**FAST) if fast else Sizes(), Path(folder)
    _say(f"lit-rlhf demo: four stages on made-up stories, in {run.resolve()}")
    _say("1/5 stories, tokenizer and an untrained model")
    make_world(run, sizes, seed)
    _say(f"2/5 SFT: imitate {sizes.stories} stories, kind and mean ones")
    metrics = train_sft(run, sizes, seed)
    _say(f"    held-out perplexity {metrics['val/perplexity']:.2f}, token accuracy {metrics['val/token_accuracy']:.2f}")
    _say(f"3/5 reward model: {sizes.pairs} pairs of the SFT policy's stories, labelled with noise by the gold judge")
    make_pairs(run, sizes, seed)
    metrics = train_reward(run, sizes, seed)
    accuracy, calibration = metrics["val/accuracy"], metrics["val/calibration_error"]
    _say(f"    held-out pair accuracy {accuracy:.2f}, calibration error {calibration:.2f}")
    _say("4/5 PPO (rewards: reward model) and GRPO (rewards: reward model + the words asked for), side by side")
    train_policies(run, sizes, seed)
    _say("5/5 answers to held-out prompts")
    passed, said = conclude(run, seed)
    _say(f"\n{said}\n\n{(time.perf_counter() - started) / 60:.1f} minutes.")
    _say(f"Look at {run / 'curves.png'}; results.md there has more stories, data/ and logs/ what they came from.")
    if fast and not passed:
        _say("A fast run shows that everything works; it is too short to pass.")
    prompt = "Tell a story about Mia the fox with a kite and an egg."
    _say(f"Next: {shlex.join(['lit-rlhf', 'generate', '--model', str(run / 'ppo'), '--prompt', prompt])}")
    return 0 if passed else 1


def make_world(run: Path, sizes: Sizes, seed: int) -> None:
    """Write stories, prompts (none of them twice) and the folder of the untrained model."""
    from .corpus import make_prompts, make_stories, write_rows
    from .network import build_folder

    counts = (sizes.stories, sizes.pairs, sizes.prompts, sizes.held_out)
    prompts = make_prompts(sum(counts), seed)
    parts = {}
    for name, count in zip(("stories", "pair_prompts", "prompts", "held_out"), counts, strict=True):
        parts[name], prompts = prompts[:count], prompts[count:]
    stories = make_stories(parts.pop("stories"), seed)
    write_rows(run / "data/stories.jsonl", stories)
    for name, texts in parts.items():
        write_rows(run / f"data/{name}.jsonl", [{"prompt": text} for text in texts])
    build_folder(run / "base", (row["prompt"] + row["completion"] for row in stories), seed)


def make_pairs(run: Path, sizes: Sizes, seed: int) -> None:
    """Sample two stories a prompt from the SFT policy and have the gold judge say, with noise, which is better."""
    from .corpus import label_pairs, write_rows
    from .measure import sample

    rollouts = sample(str(run / "sft"), str(run / "data/pair_prompts.jsonl"), seed, samples=2)
    prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
    stories = [story for rollout in rollouts for story in rollout.completions]
    write_rows(run / "data/pairs.jsonl", label_pairs(prompts, stories, seed))


def train_policies(run: Path, sizes: Sizes, seed: int) -> None:
    """Train PPO and GRPO, each in a process of its own; one after the other where there is one core."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from .train import train_grpo, train_ppo

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(min(2, cores), mp_context=multiprocessing.get_context("spawn")) as pool:
        for training in [pool.submit(train, run, sizes, seed) for train in (train_ppo, train_grpo)]:
            training.result()


def conclude(run: Path, seed: int) -> tuple[bool, str]:
    """Measure the three policies on held-out prompts, judge them, draw and write; curves.png, results.md, results.json.

    Args:
        run: folder of the run, its stages trained.
        seed: of the answers.

    Returns:
        Whether PPO and GRPO passed, and what there is to say.
    """
    from .measure import measure
    from .picture import draw, read_curves
    from .report import judge_policy, side_by_side, summary, write

    paths = {"start": str(run / "sft"), "reward": str(run / "reward"), "rows": str(run / "data/held_out.jsonl")}
    results = [measure(name, str(run / name.lower()), seed=seed, **paths) for name in ("SFT", "PPO", "GRPO")]
    verdicts = [judge_policy(results[0], tuned) for tuned in results[1:]]
    curves = {name: read_curves(run / f"logs/{name.lower()}/metrics.csv") for name in ("PPO", "GRPO")}
    draw(curves, results, run / "curves.png")
    write(results, verdicts, run)
    said = f"{summary(results, verdicts)}\n\nBefore and after, the same prompts (gold score in brackets):\n\n"
    return all(verdict.passed for verdict in verdicts), said + side_by_side(results, 4)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
