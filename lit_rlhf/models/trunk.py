"""Scalar heads on the policy's own trunk: a critic that shares its pass, or roles that share its base weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models.causal import response_tokens
from lit_rlhf.models.heads import first_weight, shared_scores
from lit_rlhf.models.network import to_left_edge
from lit_rlhf.models.output import head_inputs
from lit_rlhf.models.places import response_states
from lit_rlhf.models.prefix import Shared


def new_value_head(policy: Any, *, seed: int = 0, weight: Tensor | None = None) -> nn.Linear:
    """A scalar head for the policy's own trunk, in float32.

    Args:
        policy: whose hidden states it reads.
        seed: of the weights, drawn as in `load_scalar`.
        weight: [1, d], in their place.
    """
    width = policy.get_output_embeddings().in_features
    head = nn.Linear(width, 1, bias=False, device="cpu" if policy.device.type == "meta" else policy.device)
    with torch.no_grad():
        head.weight.copy_(first_weight(head, seed) if weight is None else weight)
    return head


def policy_and_values(
    policy: Any, head: nn.Linear, rollout: Rollout, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs of the response tokens and the values of the states before them, from one pass through the policy.

    The state before token t is the one that predicts it, so both heads read the same hidden states.

    Args:
        policy: a causal language model.
        head: from `new_value_head`.
        rollout: prompts and responses; only ids and masks are read.
        temperature: that of the sampler; does not touch the values.
        entropy: also give the entropy of each distribution.

    Returns:
        logprobs [B, T], entropy [B, T] or None, values [B, T]; float32, 0 where the mask is False.
    """
    place, found = response_tokens(policy, rollout, temperature=temperature, entropy=entropy, hidden=True)
    nothing = found.logprobs.new_zeros(rollout.mask.shape)
    assert found.hidden is not None
    logprobs, values = nothing.index_put(place, found.logprobs), nothing.index_put(place, _scalars(head, found.hidden))
    return logprobs, nothing.index_put(place, found.entropy) if entropy else None, values


def trunk_values(policy: Any, head: nn.Linear, rollout: Rollout) -> Tensor:
    """Values of the states before the response tokens, from a pass through the policy in the role it stands in.

    `response_values` of a critic with the same weights.

    Args:
        policy: a causal language model, in the critic's `role`.
        head: from `new_value_head`.
        rollout: prompts and responses; only ids and masks are read.

    Returns:
        [B, T] float32, 0 where the mask is False.
    """
    place, states = response_states(policy, rollout)
    values = _scalars(head, states)
    return values.new_zeros(rollout.mask.shape).index_put(place, values)


def trunk_scores(policy: Any, head: nn.Linear, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the scalar at the last real token of each row; `sequence_scores` of a reward model with the same weights.

    Args:
        policy: a causal language model, in the reward's `role`.
        head: the reward's.
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token, padding on either side.

    Returns:
        [B] float32.
    """
    moved, _ = to_left_edge(ids, mask)
    length = mask.sum(dim=1)
    last = torch.arange(len(moved), device=moved.device) * moved.shape[1] + (length - 1).clamp(min=0)
    scores = scalars_at(policy, head, last, input_ids=moved, use_cache=False)
    return torch.where(length > 0, scores, 0.0)


def shared_trunk_scores(policy: Any, head: nn.Linear, shared: Shared) -> Tensor:
    """`trunk_scores` of rows whose beginnings are read once, [B]."""
    return shared_scores(policy, shared, partial(scalars_at, policy, head))


def scalars_at(policy: Any, head: nn.Linear, positions: Tensor, **inputs: Any) -> Tensor:
    """What a head says at places [N] of the flattened inputs, [N] float32."""
    return _scalars(head, head_inputs(policy, positions, **inputs))


def _scalars(head: nn.Linear, states: Tensor) -> Tensor:
    return head(states.to(head.weight.dtype)).squeeze(-1).float()
