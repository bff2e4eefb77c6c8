"""Algorithms side by side on real text, from the runs that run.sh left: ``algorithms.py OUT/MODEL PICTURE``.

Every policy continues the same held-out prompts with the same random numbers; gold, proxy and the KL to the SFT policy
are measured here, so that runs without a reference have theirs too. Prints a table over the seeds, draws the curves.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from report import last, plt, rows

from lit_rlhf.batch import Rollout
from lit_rlhf.data import PromptData
from lit_rlhf.models import load_causal, load_tokenizer, token_logprobs
from lit_rlhf.rewards import RewardModel, VaderSentiment
from lit_rlhf.rollout import DecodeSampler, Sampling

NAMES = {"ppo": "PPO", "ptx": "PPO-ptx", "grpo": "GRPO", "dr-grpo": "Dr. GRPO", "rloo": "RLOO", "dapo": "DAPO"}


def answers(policy: Path, prompts: Path, count: int, tokens: int, temperature: float) -> Rollout:
    """Continue the first held-out prompts."""
    data = PromptData(str(prompts), val=str(prompts), val_limit=count, tokenizer=str(policy), val_batch_size=count)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature)
    model = load_causal(str(policy)).eval()
    return DecodeSampler()(model, load_tokenizer(str(policy)), batch, sampling, seed=0)


@torch.no_grad()
def measured(out: Path, run: Path, count: int, tokens: int) -> dict[str, float]:
    """Gold (sampled and greedy), proxy and KL of one policy, and what its run cost."""
    policy, start = run / "model", out / "sft" / "model"
    sampled, greedy = (answers(policy, out / "val.jsonl", count, tokens, t) for t in (1.0, 0.0))
    own, other = (token_logprobs(load_causal(str(folder)).eval(), sampled) for folder in (policy, start))
    judge = VaderSentiment()
    texts = last(out / "perplexity" / run.name)
    phases = [row.get(f"time/{phase}", 0.0) for row in rows(run) for phase in ("rollout", "score", "update")]
    return {
        "gold": statistics.fmean(judge(list(sampled.prompts), list(sampled.completions))),
        "greedy": statistics.fmean(judge(list(greedy.prompts), list(greedy.completions))),
        "proxy": float(RewardModel(str(out / "reward" / "model"), normalize=True).score_rollout(sampled).mean()),
        "kl": float((own - other).sum(dim=1).mean()),
        "perplexity": texts.get("val/perplexity", float("nan")),
        "tokens": max((row.get("tokens", 0.0) for row in rows(run)), default=0.0),
        "minutes": sum(phases) / 60,
    }


def draw(out: Path, found: dict[str, list[Path]], picture: Path) -> None:
    """Gold in training over rollouts and against KL, the mean of the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for kind, runs in found.items():
        training = [[row for row in rows(run) if "rewards/gold/mean" in row] for run in runs]
        gold = [statistics.fmean(row["rewards/gold/mean"] for row in step) for step in zip(*training, strict=False)]
        kl = [
            statistics.fmean(row.get("objective/kl", float("nan")) for row in step)
            for step in zip(*training, strict=False)
        ]
        smooth = [[statistics.fmean(x[max(0, i - 2) : i + 3]) for i in range(len(x))] for x in (gold, kl)]
        (line,) = left.plot(range(1, len(gold) + 1), smooth[0], label=NAMES[kind])
        right.plot(smooth[1], smooth[0], color=line.get_color())
    left.set(xlabel="rollouts", ylabel="gold (VADER) in training, mean of the seeds")
    right.set(xlabel="KL to the SFT policy, nats a response (DAPO keeps no reference)")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Read the command line, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--count", type=int, default=256, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {kind: sorted(run for run in args.out.glob(f"{kind}_*") if (run / "model").exists()) for kind in NAMES}
    found = {kind: runs for kind, runs in found.items() if runs}
    print("| | gold, sampled (least, most) | gold, greedy | proxy | KL, nats | perplexity | tokens | minutes |")
    print("|" + " --- |" * 8)
    for name, runs in [("SFT", [args.out / "sft"]), *((NAMES[kind], runs) for kind, runs in found.items())]:
        seeds = [measured(args.out, run, args.count, args.tokens) for run in runs]
        mean = {key: statistics.fmean(one[key] for one in seeds) for key in seeds[0]}
        golds = [one["gold"] for one in seeds]
        cost = f"{mean['tokens'] / 1e3:.0f}k | {mean['minutes']:.1f}" if name != "SFT" else " | "
        print(
            f"| {name} | **{mean['gold']:.2f}** ({min(golds):.2f}, {max(golds):.2f}) | {mean['greedy']:.2f} "
            f"| {mean['proxy']:.2f} | {mean['kl']:.1f} | {mean['perplexity']:.3f} | {cost} |"
        )
    draw(args.out, found, args.picture)


if __name__ == "__main__":
    main()
