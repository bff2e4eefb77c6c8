"""What PPO and GRPO report about a rollout, and how both are judged on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import evaluating, token_logprobs
from lit_rlhf.objectives import explained_variance, kl_estimate, masked_mean
from lit_rlhf.stages.seeds import seed_for

if TYPE_CHECKING:
    from lit_rlhf.stages.grpo import GRPO
    from lit_rlhf.stages.ppo import PPO
    from lit_rlhf.stages.sft import SFT

SHOWN = 8  # texts kept of a validation, per mode


def response_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Length of the responses, and how they end."""
    ended = rollout.ended.float().mean()
    return {
        "response/length_mean": rollout.lengths.float().mean(),
        "response/eos_fraction": ended,
        "response/truncated_fraction": 1 - ended,
    }


def gap_metrics(rollout: Rollout, logprobs: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's ``logprobs`` [B, T], in nats a token."""
    assert rollout.sampler_logprobs is not None
    gap = torch.where(rollout.mask, rollout.sampler_logprobs - logprobs, 0.0).abs()
    most = gap.max() if gap.numel() else gap.new_zeros(())
    return {"sampler/logprob_gap_mean": masked_mean(gap, rollout.mask), "sampler/logprob_gap_max": most}


def reward_metrics(parts: dict[str, Tensor], prefix: str = "rewards/") -> dict[str, Tensor]:
    """Mean and standard deviation of each reward over the rows it applied to (0 where it applied to none)."""
    metrics = {}
    for name, values in parts.items():
        applied = values[~values.isnan()]
        metrics[f"{prefix}{name}/mean"] = applied.mean() if applied.numel() else values.new_zeros(())
        metrics[f"{prefix}{name}/std"] = applied.std(correction=0) if applied.numel() else values.new_zeros(())
    return metrics


def without_signal(scores: Tensor, group_size: int) -> Tensor:
    """Which groups' answers all score the same, but for rounding; [B / G] bool.

    Args:
        scores: [B], the answers to a prompt side by side.
        group_size: G.
    """
    groups = scores.view(-1, group_size)
    return groups.amax(dim=1) - groups.amin(dim=1) <= 1e-6 * groups.abs().amax(dim=1).clamp(min=1.0)


def group_metrics(scores: Tensor, group_size: int) -> dict[str, Tensor]:
    """Mean score, mean spread within a group, and the share of groups without signal.

    Args:
        scores: [B], the answers to a prompt side by side.
        group_size: G.
    """
    return {
        "reward": scores.mean(),
        "reward_std": scores.view(-1, group_size).std(dim=1, correction=0).mean(),
        "groups/zero_std_fraction": without_signal(scores, group_size).float().mean(),
    }


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL(π‖π_ref) in nats a response, estimated by k1 on samples of π: the mean over rows of Σₜ (log π − log π_ref)."""
    return kl_estimate(logprobs, ref_logprobs, "k1").mul(mask).sum(dim=1).mean()


def objective_metrics(rollout: Rollout, kl_coef: float) -> dict[str, Tensor]:
    """What PPO maximises and what it pays for it, and how much of the returns the critic foresaw.

    Args:
        rollout: with scores, log-probs, values and returns; without a reference the KL is 0.
        kl_coef: the β of this rollout.
    """
    old, scores = rollout.old_logprobs, rollout.scores.mean()
    kl = sequence_kl(old, old if rollout.ref_logprobs is None else rollout.ref_logprobs, rollout.mask)
    return {
        "objective/scores": scores,
        "objective/kl": kl,
        "objective/kl_coef": kl.new_tensor(kl_coef),
        "objective/entropy": -masked_mean(old, rollout.mask),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "value/explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask),
    }


@torch.no_grad()
def judge_held_out(stage: PPO | GRPO, prompts: Prompts, batch_idx: int) -> None:
    """Answer held-out prompts greedily and by sampling; log scores, KL and length; keep a few texts.

    The seed depends on the batch only, so that every validation of a run draws from the same random numbers.

    Args:
        stage: PPO or GRPO.
        prompts: one held-out batch.
        batch_idx: its number.
    """
    to = "test" if stage.trainer.testing else "val"
    greedy = dataclasses.replace(stage.sampling, temperature=0.0)
    for mode, sampling in (("greedy", greedy), ("sampled", stage.sampling)):
        seed = seed_for(stage.seed, "validation", batch_idx, stage.global_rank)
        rollout = stage.sampler(stage.policy, stage.tokenizer, prompts, sampling, seed=seed)
        scores, parts = stage.rewards(rollout)
        metrics = {f"{to}/score_{mode}": scores.mean(), f"{to}/eos_fraction_{mode}": rollout.ended.float().mean()}
        metrics |= reward_metrics(parts, f"{to}/rewards_{mode}/")
        metrics[f"{to}/length_{mode}"] = rollout.lengths.float().mean()
        if mode == "sampled" and stage.reference is not None:
            with evaluating(stage.policy):
                logprobs = token_logprobs(stage.policy, rollout, temperature=sampling.temperature)
            ref_logprobs = stage.reference.token_logprobs(stage.policy, rollout, temperature=sampling.temperature)
            metrics[f"{to}/kl"] = sequence_kl(logprobs, ref_logprobs, rollout.mask)
        stage.log_dict(metrics, on_epoch=True, batch_size=len(prompts), sync_dist=True)
        if batch_idx == 0:
            shown = zip(rollout.prompts[:SHOWN], rollout.completions, scores.tolist(), strict=False)
            stage.samples += [
                {"step": stage.global_step, "mode": mode, "prompt": p, "completion": c, "score": s} for p, c, s in shown
            ]


@torch.no_grad()
def answer(stage: SFT | PPO | GRPO, prompts: Prompts, batch_idx: int) -> list[dict[str, Any]]:
    """Answer prompts by sampling: one dict each of prompt, completion and whether it ended, and the other columns."""
    seed = seed_for(stage.seed, "validation", batch_idx, stage.global_rank)
    rollout = stage.sampler(stage.policy, stage.tokenizer, prompts, stage.sampling, seed=seed)
    rows = zip(rollout.prompts, rollout.completions, rollout.ended.tolist(), strict=True)
    return [
        {**{key: column[i] for key, column in rollout.columns.items()}, "prompt": p, "completion": c, "ended": e}
        for i, (p, c, e) in enumerate(rows)
    ]
