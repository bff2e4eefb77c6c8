"""The settings that make each algorithm, and where they stand in for the papers' own at this small size.

Every rollout has 64 responses and makes four updates, and every algorithm maximises the same reward model: what is
left is the algorithm. Learning rates are those of the demo, one for PPO and one for all others.
"""

from __future__ import annotations

from typing import Any

from lit_rlhf.stages import GRPO, KL, PPO, Advantages, Clip, Optim, Updates, Value

RESPONSES = 64
SPLIT = Updates(epochs=1, minibatches=4)  # as the papers that clip wide have it: more minibatches, one pass
TWICE = Updates(epochs=2, minibatches=2)
_PPO: dict[str, Any] = {
    "optim": Optim(lr=7e-4, eps=1e-5, schedule="linear", warmup_steps=5),
    "updates": Updates(epochs=4),
}
_GROUP: dict[str, Any] = {"optim": Optim(lr=3e-4, schedule="linear"), "updates": TWICE, "group_size": 8}

# name: (stage, its arguments, prompts a batch)
RECIPES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "PPO": (PPO, {**_PPO, "kl": KL(0.05)}, 64),
    "PPO-KL": (PPO, {**_PPO, "kl": KL(0.05), "clip": Clip(form="penalty", penalty_target=0.01)}, 64),
    "PPO-ptx": (PPO, {**_PPO, "kl": KL(0.05), "ptx_coef": 1.0}, 64),
    "PPO, shared trunk": (PPO, {**_PPO, "kl": KL(0.05), "value": Value(shared=True, warmup=5)}, 64),
    "GRPO": (GRPO, {**_GROUP, "kl": KL(0.04, "k3", "loss")}, 8),
    "Dr. GRPO": (
        GRPO,
        {**_GROUP, "kl": KL(0.04, "k3", "loss"), "advantages": Advantages(scale="none"), "aggregation": "fixed_length"},
        8,
    ),
    "DAPO": (
        GRPO,
        {
            **_GROUP,
            "updates": SPLIT,
            "kl": KL(0.0),
            "clip": Clip(0.2, 0.28),
            "aggregation": "token_mean",
            "truncated": "mask",
            "groups": 8,
        },
        12,
    ),
    "RLOO": (
        GRPO,
        {**_GROUP, "kl": KL(0.05, "k1", "score"), "advantages": Advantages("leave_one_out", "none")},
        8,
    ),
    "REINFORCE++": (
        GRPO,
        {
            **_GROUP,
            "group_size": 1,
            "kl": KL(0.05, "k1", "reward"),
            "advantages": Advantages("none", "none", whiten=True),
            "aggregation": "token_mean",
        },
        64,
    ),
    # The paper's bounds, 3e-4 and 4e-4, belong to responses of thousands of tokens and small learning rates.
    "GSPO": (
        GRPO,
        {**_GROUP, "updates": SPLIT, "kl": KL(0.04, "k3", "loss"), "clip": Clip(0.03, 0.04, ratio="sequence")},
        8,
    ),
    "CISPO": (
        GRPO,
        {
            **_GROUP,
            "updates": SPLIT,
            "kl": KL(0.04, "k3", "loss"),
            "clip": Clip(None, 4.0, form="truncate"),
            "aggregation": "token_mean",
        },
        8,
    ),
}
