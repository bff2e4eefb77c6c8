"""What PPO and GRPO report about a rollout, and how both are judged on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import evaluating, token_logprobs
from lit_rlhf.objectives import explained_variance, kl_estimate, masked_mean
from lit_rlhf.rollout import Sampling
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

    What a row draws follows from its number in the held-out set, so every validation of a run draws from the same
    random numbers, on any number of processes. Rows that come again on one of them are answered and not counted.

    Args:
        stage: PPO or GRPO.
        prompts: one held-out batch.
        batch_idx: its number.
    """
    to, counted = "test" if stage.trainer.testing else "val", prompts.counted
    greedy = dataclasses.replace(stage.sampling, temperature=0.0)
    for mode, sampling in (("greedy", greedy), ("sampled", stage.sampling)):
        rollout = answers(stage, prompts, sampling, batch_idx)
        scores, parts = stage.rewards(rollout)
        metrics = {f"{to}/score_{mode}": scores, f"{to}/eos_fraction_{mode}": rollout.ended.float()}
        metrics[f"{to}/length_{mode}"] = rollout.lengths.float()
        if mode == "sampled" and stage.reference is not None:
            with evaluating(stage.policy):
                logprobs = token_logprobs(stage.policy, rollout, temperature=sampling.temperature)
            ref_logprobs = stage.reference.token_logprobs(stage.policy, rollout, temperature=sampling.temperature)
            metrics[f"{to}/kl"] = kl_estimate(logprobs, ref_logprobs, "k1").mul(rollout.mask).sum(dim=1)
        log_rows(stage, {key: values[counted.to(values.device)] for key, values in metrics.items()})
        log_parts(
            stage, {name: values[counted.to(values.device)] for name, values in parts.items()}, f"{to}/rewards_{mode}/"
        )
        if batch_idx == 0:
            shown = zip(rollout.prompts[:SHOWN], rollout.completions, scores.tolist(), strict=False)
            stage.samples += [
                {"step": stage.global_step, "mode": mode, "prompt": p, "completion": c, "score": s} for p, c, s in shown
            ]


def answers(stage: SFT | PPO | GRPO, prompts: Prompts, sampling: Sampling, batch_idx: int) -> Rollout:
    """One answer to each prompt; drawn by the rows' numbers, or by batch and process where they have none."""
    place = () if prompts.rows is not None else (batch_idx, stage.global_rank)
    seed = seed_for(stage.seed, "validation", *place)
    return stage.sampler(stage.policy, stage.tokenizer, prompts, sampling, seed=seed)


def log_rows(stage: SFT | PPO | GRPO, metrics: dict[str, Tensor]) -> None:
    """Log means over all rows of all batches and processes; a process that has no row takes part.

    Args:
        stage: that logs.
        metrics: by name, a number for each row that counts, [n].
    """
    for name, values in metrics.items():
        mean = values.sum() / max(len(values), 1)
        # As a float: Lightning averages the counts over processes, and rounds whole numbers down.
        stage.log(name, mean, on_epoch=True, batch_size=float(len(values)), sync_dist=True)  # type: ignore[arg-type]


def log_parts(stage: PPO | GRPO, parts: dict[str, Tensor], prefix: str) -> None:
    """Log each reward's mean over the rows to which it applied, and the mean of its deviations within batches."""
    for key, value in reward_metrics(parts, prefix).items():
        values = parts[key.removeprefix(prefix).rpartition("/")[0]]
        applied = max(float((~values.isnan()).sum()), 1e-9)  # 0 where it applied to none at all
        stage.log(key, value, on_epoch=True, batch_size=applied, sync_dist=True)  # type: ignore[arg-type]


@torch.no_grad()
def answer(stage: SFT | PPO | GRPO, prompts: Prompts, batch_idx: int) -> list[dict[str, Any]]:
    """Answer prompts by sampling: one dict each of prompt, completion and whether it ended, and the other columns."""
    rollout = answers(stage, prompts, stage.sampling, batch_idx)
    rollout = rollout.select(prompts.counted)
    rows = zip(rollout.prompts, rollout.completions, rollout.ended.tolist(), strict=True)
    return [
        {**{key: column[i] for key, column in rollout.columns.items()}, "prompt": p, "completion": c, "ended": e}
        for i, (p, c, e) in enumerate(rows)
    ]
