"""What the policy's loss is made of, the same in PPO and GRPO: improvement, KL, entropy; what steers their weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.models import token_logprobs
from lit_rlhf.objectives import (
    adapt_kl_coef,
    adapt_kl_penalty,
    clipped_policy_loss,
    importance_weights,
    kl_estimate,
    masked_mean,
    penalized_policy_loss,
    truncated_policy_loss,
)
from lit_rlhf.stages.guards import run_length
from lit_rlhf.stages.settings import Clip

if TYPE_CHECKING:
    from lit_rlhf.stages.grpo import GRPO
    from lit_rlhf.stages.inner_loop import InnerLoop
    from lit_rlhf.stages.ppo import PPO


def improvement(part: Rollout, logprobs: Tensor, clip: Clip, penalty: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [B, T] of the form that ``clip`` names, and its metrics."""
    given = (logprobs, part.old_logprobs, part.advantages, part.mask)
    if clip.form == "penalty":
        return penalized_policy_loss(*given, kl_penalty=penalty)
    if clip.form == "truncate":
        assert clip.high is not None
        return truncated_policy_loss(*given, low=clip.low, high=clip.high)
    return clipped_policy_loss(*given, clip_low=clip.low, clip_high=clip.high, ratio=clip.ratio, dual_clip=clip.dual)


def read_policy(stage: PPO | GRPO, part: Rollout) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the policy being trained, [B, T], and its entropy where the loss wants it (it costs a great sum)."""
    temperature = stage.sampling.temperature
    if stage.entropy.counts:
        return token_logprobs(stage.policy, part, temperature=temperature, entropy=True)
    return token_logprobs(stage.policy, part, temperature=temperature), None


def policy_terms(
    stage: PPO | GRPO, part: Rollout, logprobs: Tensor, entropy: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss of the policy: w·L_policy + β·KL(π‖π_ref) − c_e·H; the last two where their weights ask for them.

    Args:
        stage: whose settings count.
        part: a microbatch.
        logprobs: [B, T] of the policy being trained.
        entropy: [B, T] of its distributions, or None where it costs nothing.

    Returns:
        [B, T], 0 where the mask is False, and metrics.
    """
    mask = part.mask
    loss, found = improvement(part, logprobs, stage.clip, stage.clip_penalty)
    metrics = {f"policy/{key}": metric for key, metric in found.items()}
    metrics["policy/loss"] = masked_mean(loss, mask)
    if part.weights is not None:
        loss = loss * part.weights
    if part.ref_logprobs is not None and stage.kl.place == "loss":
        kl = kl_estimate(logprobs, part.ref_logprobs, stage.kl.estimator).where(mask, 0.0)
        loss = loss + stage.kl_coef * kl  # a tensor: read on the host it would have to be waited for
        metrics["policy/kl_loss"] = masked_mean(kl, mask)
    if entropy is not None:
        loss = loss - entropy_coef(stage) * entropy
        metrics["policy/entropy"] = masked_mean(entropy, mask)
    return loss, metrics


def entropy_coef(stage: PPO | GRPO) -> float:
    """Weight of the entropy bonus at this rollout."""
    start, final = stage.entropy.coef, stage.entropy.final
    if final is None:
        return start
    done = stage.global_step / run_length(stage.trainer, "model.entropy.final")
    return start + (final - start) * min(done, 1.0)


def kl_to_reference(stage: PPO | GRPO, rollout: Rollout) -> Tensor:
    """Estimated KL(π‖π_ref) of each token before any update, [B, T]; 0 where there is no reference."""
    if rollout.ref_logprobs is None:
        return torch.zeros_like(rollout.old_logprobs)
    kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, stage.kl.estimator)
    return kl.where(rollout.mask, 0.0)


def steer_kl(stage: PPO | GRPO, sequence_kl: Tensor, responses: int) -> None:
    """Move β towards the KL that is wanted, from that of this rollout: for the next one.

    Args:
        stage: PPO or GRPO.
        sequence_kl: mean KL of the responses of this process, in nats.
        responses: responses of all processes.
    """
    target = stage.kl.target
    if target is not None:
        seen, beta = float(stage.mean_over_ranks(sequence_kl)), float(stage.kl_coef)
        if math.isfinite(seen):  # else β would be lost for good; the step that follows is not made
            beta = adapt_kl_coef(beta, seen, target=target, horizon=stage.kl.horizon, samples=responses)
        stage.kl_coef.fill_(beta)


def steer_penalty(stage: InnerLoop, old_kl: Tensor) -> None:
    """Move the weight of the KL to the old policy, from that of the last update (Schulman et al. 2017, §4)."""
    if stage.clip.form == "penalty" and stage.clip.penalty_target is not None:
        seen, weight = float(stage.mean_over_ranks(old_kl)), float(stage.clip_penalty)
        stage.clip_penalty.fill_(adapt_kl_penalty(weight, seen, target=stage.clip.penalty_target))


def mismatch_weights(stage: PPO | GRPO, rollout: Rollout) -> Rollout:
    """Give tokens importance weights where the sampler's probabilities are not the trainer's and the stage corrects."""
    correction = stage.correction
    if correction is None or rollout.sampler_logprobs is None:
        return rollout
    weights, metrics = importance_weights(
        rollout.old_logprobs,
        rollout.sampler_logprobs,
        rollout.mask,
        level=correction.level,
        how=correction.how,
        low=correction.low,
        high=correction.high,
    )
    stage.rollout_metrics |= {f"sampler/{key}": metric for key, metric in metrics.items()}
    return rollout.with_(weights=weights)
