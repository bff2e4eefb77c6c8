"""The mathematics of the stages: tensors in, tensors out, one function an equation. Imports torch and nothing else.

Every function that takes a ``mask`` returns 0 where it is False, whatever stands there in the inputs (NaN included),
and sends no gradient there. ``B`` sequences, ``G`` sequences a group, ``T`` response tokens, ``M`` comparisons.
"""

from lit_rlhf.objectives.advantages import (
    Scale,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_to_go,
    token_rewards,
)
from lit_rlhf.objectives.kl import KLEstimator, adapt_kl_coef, kl_estimate
from lit_rlhf.objectives.likelihood import entropy_from_logits, next_token_loss
from lit_rlhf.objectives.policy import RatioLevel, clipped_policy_loss
from lit_rlhf.objectives.preference import (
    best_of_k_loss,
    calibration_error,
    centering_loss,
    pairwise_loss,
    ranking_loss,
)
from lit_rlhf.objectives.reduce import Aggregation, aggregate, group_mean, masked_mean, masked_whiten
from lit_rlhf.objectives.value import clipped_value_loss, explained_variance

__all__ = [
    "Aggregation",
    "KLEstimator",
    "RatioLevel",
    "Scale",
    "adapt_kl_coef",
    "aggregate",
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
    "kl_estimate",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_whiten",
    "next_token_loss",
    "pairwise_loss",
    "ranking_loss",
    "rewards_to_go",
    "token_rewards",
]
