"""Answers of a policy to a file of prompts, and what a reward says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_rlhf.batch import Rollout
from lit_rlhf.commands.generate import load_policy, read_prompts, sample
from lit_rlhf.models import Network, load_tokenizer
from lit_rlhf.rewards import Reward, Rewards
from lit_rlhf.rollout import Sampling


def judged_answers(
    policy: str,
    prompts: str,
    reward: Reward,
    samples: int,
    sampling: Sampling,
    network: Network,
    device: str,
    seed: int,
    **settings: Any,
) -> Iterator[tuple[Rollout, list[float]]]:
    """Rollouts of ``samples`` answers a prompt, side by side, each with its scores.

    Args:
        policy: folder or hub id of the model that answers.
        prompts: file, folder or hub id of the prompts.
        reward: what judges; a reward model stands on the policy's device.
        samples: answers a prompt.
        sampling: how they are drawn.
        network: how the policy is loaded.
        device: auto, cpu, cuda, cuda:1 …
        seed: the same seed gives the same answers.
        settings: of ``PromptData``.
    """
    tokenizer = load_tokenizer(policy, trust_remote_code=network.trust_remote_code)
    model = load_policy(policy, network, device)
    judge = Rewards([reward]).to(model.device)
    judge.bind(tokenizer)
    batches = (batch.repeat(samples) for batch in read_prompts(prompts, policy, **settings))
    for rollout in sample(model, tokenizer, batches, sampling, seed):
        yield rollout, judge(rollout)[0].tolist()
