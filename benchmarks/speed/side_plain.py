"""Plain PyTorch loops with the mathematics of the stages and nothing around them: side_plain.py WORK FOLDER.

What a stage's step takes beyond these is the price of Lightning, of the inner loop and of the metrics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gate import Gate
from side_ours import prepare
from torch.nn.utils import clip_grad_norm_
from work import Work

from lit_rlhf.models import evaluating, next_token_logprobs, token_logprobs
from lit_rlhf.objectives import aggregate, clipped_policy_loss, group_advantages, kl_estimate, next_token_loss


def sft_steps(stage: Any, batches: Any) -> Iterator[int]:
    """SFT; gives the tokens of each step."""
    policy = stage.policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=stage.optim.lr, betas=stage.optim.betas, weight_decay=0.0)
    for batch in batches:
        logprobs, _ = next_token_logprobs(policy, batch.ids, batch.mask)
        mask = batch.loss_mask[:, 1:] & batch.mask[:, 1:]
        next_token_loss(logprobs, mask, float(mask.sum())).backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield int(batch.mask.sum())


def grpo_steps(stage: Any, batches: Any) -> Iterator[int]:
    """GRPO with one update a rollout; gives the response tokens of each step."""
    policy = stage.policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=stage.optim.lr, betas=stage.optim.betas, weight_decay=0.0)
    for number, batch in enumerate(batches):
        prompts = batch.repeat(stage.group_size)
        rollout = stage.sampler(policy, stage.tokenizer, prompts, stage.sampling, seed=number)
        with torch.no_grad(), evaluating(policy):
            scores, _ = stage.rewards(rollout)
            old = token_logprobs(policy, rollout)
            ref = stage.reference.token_logprobs(policy, rollout)
        mask, advantages = rollout.mask, group_advantages(scores, stage.group_size).unsqueeze(1) * rollout.mask
        logprobs = token_logprobs(policy, rollout)
        per_token, _ = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2)
        per_token = per_token + stage.kl.coef * kl_estimate(logprobs, ref, "k3").where(mask, 0.0)
        aggregate(per_token, mask, "sequence_mean", float(len(rollout))).backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield int(mask.sum())


def train(work: Work, folder: Path, gate: Gate) -> None:
    """Train for as long as the driver lets us."""
    stage, batches = prepare(work, folder)
    gate.ready()
    for tokens in (sft_steps if work.task == "loop_sft" else grpo_steps)(stage, batches):
        gate.done(tokens)


if __name__ == "__main__":
    work = Work(**json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    train(work, Path(sys.argv[2]), Gate(work.burst))
