"""The recipes of configs/ that are named after their papers, and what a two-step run on tiny data takes."""

from __future__ import annotations

MATH = ("math.jsonl", "--model.model", "base")
TLDR = ("sft.jsonl",)
# What the tiny overlay leaves too large for two prompts: groups, minibatches.
RECIPES = {
    "grpo-deepseekmath": (*MATH, "--model.group_size", "4"),
    "dapo": (*MATH, "--model.groups", "1"),
    "dr-grpo": MATH,
    "rloo": TLDR,
    "gspo": MATH,
    "cispo": MATH,
    "reinforce-pp": (*TLDR, "--model.updates.minibatches", "2"),
    "tldr-ppo": TLDR,
    "instructgpt-ppo": (
        *TLDR,
        *("--data.pretraining", "texts.jsonl", "--data.pretraining_batch_size", "4"),
        *("--model.updates.minibatches", "2"),
    ),
}
