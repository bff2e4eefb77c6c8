"""Teach a critic the returns, and say how well it knows them."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.objectives.reduce import masked_mean


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Measure how far values are from returns, without reward for moving more than ``clip`` at a time.

    ℓ_t = ½·max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²).

    Args:
        values: Value of the state before token t by the critic being trained, [B, T]; the gradient flows through these.
        old_values: The same by the critic as it was before the first update on this rollout, [B, T].
        returns: What the values should have been, [B, T].
        mask: Tokens of the response, bool [B, T].
        clip: ε, in units of the value; None = no clip.

    Returns:
        Per-token losses [B, T], 0 where nothing counts, and metrics over counted tokens, detached scalars:
        ``clip_fraction`` share of tokens where the clipped error is the larger one.

    Source: openai/lm-human-preferences (cbfd210) ``PPOTrainer.loss``, lm_human_preferences/train_policy.py; the PPO
    paper has no such equation. The ½ stands before both branches, so a wide clip and none are the same.

    >>> one = torch.ones(1, 1)
    >>> clipped_value_loss(2 * one, one, 3 * one, one > 0, clip=0.5)[0]
    tensor([[1.1250]])
    """
    values, old_values = torch.where(mask, values, 0.0), torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    free = worst = (values - returns).square()
    if clip is not None:
        near = torch.clamp(values, min=old_values - clip, max=old_values + clip)
        worst = torch.maximum(free, (near - returns).square())
    metrics = {"clip_fraction": masked_mean((worst > free).to(values.dtype), mask)}
    return worst / 2, metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Measure what share of the returns' variance the values predict.

    1 − Var(R − V) / Var(R), population variances over counted tokens: 1 is perfect, 0 no better than a constant,
    negative worse than one. Returns that do not vary have no share to predict: 0.

    Args:
        values: Value of the state before token t, before any update on this rollout, [B, T].
        returns: Returns of the same tokens, [B, T].
        mask: Tokens of the response, bool [B, T].

    Returns:
        A detached scalar.

    Source: ``explained_variance``, baselines/common/math_util.py of openai/baselines (there constant returns give NaN).

    >>> explained_variance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]))
    tensor(0.7500)
    """
    with torch.no_grad():
        errors = returns - values
        unexplained = masked_mean((errors - masked_mean(errors, mask)).square(), mask)
        total = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
        return torch.where(total > 0, 1.0 - unexplained / total, torch.zeros_like(total))
