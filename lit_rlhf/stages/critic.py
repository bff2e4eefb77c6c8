"""PPO's critic, a network of its own or a head on the policy: how it is made, what it says, what it learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.models import Network, evaluating, load_scalar, new_value_head, policy_and_values, response_values
from lit_rlhf.objectives import clipped_value_loss, masked_mean
from lit_rlhf.stages.reading import read

if TYPE_CHECKING:
    from lit_rlhf.stages.ppo import PPO


def new_critic(stage: PPO, critic: str | None, model: str, network: Network) -> Any:
    """The critic before training.

    Args:
        stage: PPO with its policy.
        critic: hub id or folder of its first weights; ``model`` if null.
        model: that of the policy.
        network: how it is loaded.

    Raises:
        ValueError: weights are named for a critic that has none but a new head.
    """
    if not stage.value.shared:
        return load_scalar(critic or model, network, seed=stage.seed)
    if critic is not None:
        raise ValueError(
            f"critic={critic!r} is not read where value.shared makes the critic a head on the policy: leave out one"
        )
    return new_value_head(stage.policy, seed=stage.seed)


@torch.no_grad()
def appraise(stage: PPO, rollout: Rollout) -> Rollout:
    """Have the critic, as it is before any update, say what it expects before each token."""

    def values(part: Rollout) -> Tensor:
        if stage.value.shared:
            return policy_and_values(stage.policy, stage.critic, part)[2]
        return response_values(stage.critic, part)

    with stage.timed("score"), evaluating(stage.policy, stage.critic):
        return rollout.with_(values=read(stage, rollout, values))


def read_both(stage: PPO, part: Rollout) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs, entropy where the loss wants it, and values, [B, T] each, from one pass through a shared trunk."""
    return policy_and_values(
        stage.policy, stage.critic, part, temperature=stage.sampling.temperature, entropy=stage.entropy.counts
    )


def value_terms(stage: PPO, part: Rollout, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token value loss [B, T] from the values [B, T] of the critic being trained, and its metrics."""
    per_token, found = clipped_value_loss(values, part.values, part.returns, part.mask, clip=stage.value.clip)
    return per_token, {
        **{f"value/{key}": metric for key, metric in found.items()},
        "value/loss": masked_mean(per_token, part.mask),
    }
