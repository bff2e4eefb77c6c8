"""PPO's critic, a network of its own or a guest of the policy: how it is made, what it says, what it learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lit_rlhf.batch import Rollout
from lit_rlhf.models import (
    CRITIC,
    Network,
    evaluating,
    inject_adapters,
    load_adapters,
    load_scalar,
    new_value_head,
    policy_and_values,
    response_values,
    role,
    trunk_values,
    weights_of,
)
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
    if stage.value.adapter:
        return _on_adapters(stage, critic, network)
    if not stage.value.shared:
        return load_scalar(critic or model, network, seed=stage.seed)
    if critic is not None:
        raise ValueError(
            f"critic={critic!r} is not read where value.shared makes the critic a head on the policy: leave out one"
        )
    return new_value_head(stage.policy, seed=stage.seed)


def _on_adapters(stage: PPO, critic: str | None, network: Network) -> Any:
    """The head of a critic whose adapters stand beside the policy's, new ones or those of a reward model."""
    if network.lora is None:
        raise ValueError(
            "value.adapter puts the critic on the policy's base weights, which must not move: set network.lora, or "
            "leave value.adapter out"
        )
    if critic is None:
        inject_adapters(stage.policy, network.lora, task="SEQ_CLS", seed=stage.seed, name=CRITIC)
        return new_value_head(stage.policy, seed=stage.seed)
    weight, _ = load_adapters(stage.policy, critic, CRITIC, trained=True)
    return new_value_head(stage.policy, weight=weight)


def critic_weights(stage: PPO) -> list[Parameter]:
    """What the critic's optimizer group moves."""
    on_base = weights_of(stage.policy, CRITIC).values() if stage.value.adapter else ()
    return [*on_base, *stage.critic.parameters()]


def values_of(stage: PPO, part: Rollout) -> Tensor:
    """What the critic expects before each response token, [B, T]."""
    if stage.value.shared:
        return policy_and_values(stage.policy, stage.critic, part)[2]
    if stage.value.adapter:
        with role(stage.policy, CRITIC):
            return trunk_values(stage.policy, stage.critic, part)
    return response_values(stage.critic, part)


@torch.no_grad()
def appraise(stage: PPO, rollout: Rollout) -> Rollout:
    """Have the critic, as it is before any update, say what it expects before each token."""
    with stage.timed("score"), evaluating(stage.policy, stage.critic):
        return rollout.with_(values=read(stage, rollout, lambda part: values_of(stage, part)))


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
