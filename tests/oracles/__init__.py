"""What the papers say, literally and slowly: Python numbers, loops and cases. Never imports the code it judges.

Rows are lists of floats, masks are lists of bools (True = counts). Results per token are 0 where nothing counts.
"""

from oracles.credit import (
    baseline_advantages,
    gae,
    gdpo,
    group_advantages,
    leave_one_out,
    rewards_to_go,
    step_advantages,
    token_rewards,
)
from oracles.policy import (
    adaptive_kl,
    adaptive_penalty,
    clipped_policy,
    clipped_value,
    explained_variance,
    importance_weight,
    penalized_policy,
    sequence_ratio,
    truncated_policy_weight,
)
from oracles.preference import (
    best_of_k,
    bradley_terry,
    calibration_error,
    correlation,
    k_wise,
    reliability,
    smoothed_bradley_terry,
)
from oracles.reduce import (
    aggregate,
    entropy,
    exact_kl,
    mean,
    softmax,
    whiten,
)

__all__ = [
    "adaptive_kl",
    "adaptive_penalty",
    "aggregate",
    "baseline_advantages",
    "best_of_k",
    "bradley_terry",
    "calibration_error",
    "clipped_policy",
    "clipped_value",
    "correlation",
    "entropy",
    "exact_kl",
    "explained_variance",
    "gae",
    "gdpo",
    "group_advantages",
    "importance_weight",
    "k_wise",
    "leave_one_out",
    "mean",
    "penalized_policy",
    "reliability",
    "rewards_to_go",
    "sequence_ratio",
    "smoothed_bradley_terry",
    "softmax",
    "step_advantages",
    "token_rewards",
    "truncated_policy_weight",
    "whiten",
]
