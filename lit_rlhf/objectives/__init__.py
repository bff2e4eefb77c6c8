"""The mathematics of the stages: tensors in, tensors out, one function an equation. Imports torch and nothing else.

Every function that takes a ``mask`` returns 0 where it is False, whatever stands there in the inputs (NaN included),
and sends no gradient there. ``B`` sequences, ``G`` sequences a group, ``T`` response tokens, ``M`` comparisons.
"""

from lit_rlhf.objectives.advantages import generalized_advantages, rewards_to_go, token_rewards
from lit_rlhf.objectives.baselines import (
    Baseline,
    Scale,
    baseline_advantages,
    group_advantages,
    leave_one_out_advantages,
    normalize_then_sum,
    step_advantages,
)
from lit_rlhf.objectives.importance import WeightBound, WeightLevel, importance_weights
from lit_rlhf.objectives.kl import KLEstimator, adapt_kl_coef, adapt_kl_penalty, kl_estimate
from lit_rlhf.objectives.likelihood import entropy_from_logits, next_token_loss
from lit_rlhf.objectives.policy import (
    RatioLevel,
    clipped_policy_loss,
    penalized_policy_loss,
    truncated_policy_loss,
)
from lit_rlhf.objectives.preference import (
    Reliability,
    accuracy_by_margin,
    best_of_k_loss,
    calibration_error,
    centering_loss,
    pairwise_loss,
    ranking_loss,
    score_length_correlation,
)
from lit_rlhf.objectives.reduce import Aggregation, OverRanks, aggregate, group_mean, masked_mean, masked_whiten
from lit_rlhf.objectives.value import clipped_value_loss, explained_variance

__all__ = [
    "Aggregation",
    "Baseline",
    "KLEstimator",
    "OverRanks",
    "RatioLevel",
    "Reliability",
    "Scale",
    "WeightBound",
    "WeightLevel",
    "accuracy_by_margin",
    "adapt_kl_coef",
    "adapt_kl_penalty",
    "aggregate",
    "baseline_advantages",
    "best_of_k_loss",
    "calibration_error",
    "centering_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "entropy_from_logits",
    "explained_variance",
    "generalized_advantages",
    "group_advantages",
    "group_mean",
    "importance_weights",
    "kl_estimate",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_whiten",
    "next_token_loss",
    "normalize_then_sum",
    "pairwise_loss",
    "penalized_policy_loss",
    "ranking_loss",
    "rewards_to_go",
    "score_length_correlation",
    "step_advantages",
    "token_rewards",
    "truncated_policy_loss",
]
