"""A critic on the policy's own trunk: one pass, two heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models.causal import response_tokens
from lit_rlhf.models.heads import first_weight


def new_value_head(policy: Any, *, seed: int = 0) -> nn.Linear:
    """A new scalar head for the policy's own trunk; weights as in `load_scalar`, in float32.

    Args:
        policy: whose hidden states it reads.
        seed: of the weights.
    """
    width = policy.get_output_embeddings().in_features
    head = nn.Linear(width, 1, bias=False, device="cpu" if policy.device.type == "meta" else policy.device)
    with torch.no_grad():
        head.weight.copy_(first_weight(head, seed))
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
    values = head(found.hidden.to(head.weight.dtype)).squeeze(-1).float()
    logprobs, values = nothing.index_put(place, found.logprobs), nothing.index_put(place, values)
    return logprobs, nothing.index_put(place, found.entropy) if entropy else None, values
