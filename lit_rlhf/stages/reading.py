"""From a rollout to what it is worth and how likely it was: rewards judge it, policy and reference read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.models import evaluating, token_logprobs
from lit_rlhf.stages.measure import gap_metrics, response_metrics, reward_metrics
from lit_rlhf.stages.penalties import mismatch_weights

if TYPE_CHECKING:
    from lit_rlhf.stages.grpo import GRPO
    from lit_rlhf.stages.ppo import PPO


@torch.no_grad()
def judge(stage: PPO | GRPO, rollout: Rollout) -> Rollout:
    """Have the responses scored by the rewards; a cut-off response gets what ``missing_eos`` says."""
    with stage.timed("score"):
        rollout = stage.rewards.judge(rollout)
        if stage.missing_eos is not None:
            scores = stage.missing_eos.apply(rollout.scores, rollout.ended)
            whole = None if rollout.outcomes is None else rollout.outcomes + (scores - rollout.scores)
            rollout = rollout.with_(scores=scores, outcomes=whole)
    # Steps are compared over all processes where anything is: one whose responses have none takes part.
    if stage.max_over_ranks(torch.tensor(float(rollout.step_scores is not None))):
        rollout = with_steps(rollout)
    return rollout


def with_steps(rollout: Rollout) -> Rollout:
    """The rollout as one whose rewards judge steps: where they judged none, no response has any."""
    if rollout.step_scores is not None:
        return rollout
    none = rollout.scores.new_zeros(len(rollout), 1)
    return rollout.with_(outcomes=rollout.scores, step_scores=none, step_ends=torch.full_like(none, -1).long())


@torch.no_grad()
def recall(stage: PPO | GRPO, rollout: Rollout) -> Rollout:
    """Read the judged responses by policy and reference as they are before any update; plan the updates."""
    assert rollout.parts is not None
    stage.rollout_metrics |= reward_metrics(rollout.parts) | response_metrics(rollout)
    stage.plan(rollout)
    reference, temperature = stage.reference, stage.sampling.temperature
    with stage.timed("score"), evaluating(stage.policy):
        rollout = rollout.with_(old_logprobs=old_logprobs(stage, rollout))
        if reference is not None:
            ref = read(stage, rollout, lambda p: reference.token_logprobs(stage.policy, p, temperature=temperature))
            rollout = rollout.with_(ref_logprobs=ref)
    return mismatch_weights(stage, rollout)


def read(
    stage: PPO | GRPO, rollout: Rollout, reader: Callable[[Rollout], Tensor], like_updates: bool = False
) -> Tensor:
    """Apply a per-token reader to the rollout, rows of like length together; [B, T].

    With ``like_updates`` in the updates' own microbatches, so that what is read is what they will read.
    """
    whole = torch.zeros(rollout.mask.shape, device=stage.device)
    for rows in stage.updates.parts(like_updates):
        part = reader(rollout.select(rows).trim())
        whole[rows.to(stage.device), : part.shape[1]] = part
    return whole


def old_logprobs(stage: PPO | GRPO, rollout: Rollout) -> Tensor:
    """Log-probs of the policy before any update: the sampler's where they are the trainer's own, else read; [B, T].

    Whether they are is seen on a sample of rows, one in thirty-two and four at least.
    """

    def reader(part: Rollout) -> Tensor:
        return token_logprobs(stage.policy, part, temperature=stage.sampling.temperature)

    sampled, bound = rollout.sampler_logprobs, stage.updates.settings.sampler_gap
    if sampled is not None and bound > 0:
        rows = torch.linspace(0, len(rollout) - 1, min(len(rollout), max(4, len(rollout) // 32))).long()
        part = rollout.select(rows).trim()
        gap = gap_metrics(part, reader(part))
        stage.rollout_metrics |= gap
        if stage.max_over_ranks(gap["sampler/logprob_gap_max"]) <= bound:
            return sampled
    own = read(stage, rollout, reader, like_updates=True)
    if sampled is not None:
        stage.rollout_metrics |= gap_metrics(rollout, own)
    return own
