"""Measure a policy on held-out prompts: gold and proxy score, KL to the SFT policy, and whether its texts are whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lit_rlhf.batch import Rollout
from lit_rlhf.data import PromptData
from lit_rlhf.models import load_causal, load_tokenizer, token_logprobs
from lit_rlhf.rewards import RewardModel
from lit_rlhf.rollout import DecodeSampler, Sampling

from .judge import gold, words_used
from .reader import read_story

BATCH = 256
# For every policy, in training and afterwards. The longest story of the corpus has 88 tokens.
SAMPLING = Sampling(max_new_tokens=96, temperature=0.8)


@dataclass(frozen=True)
class Measured:
    """What one policy did on the held-out prompts, one entry a prompt, in the prompts' order."""

    name: str
    prompts: list[str]
    texts: list[str]
    gold: list[float]  # by the judge that nothing was trained on
    proxy: list[float]  # by the reward model, in standard deviations of its own held-out scores
    kl: list[float]  # Σₜ log π − log π_SFT, nats a response; its mean estimates KL(π‖π_SFT)
    words: list[float]  # share of the words asked for
    finished: list[bool]  # ended by itself, not by the length limit
    well_formed: list[bool]  # finished, and every sentence right and in its place


def sample(folder: str, rows: str, seed: int, samples: int = 1) -> list[Rollout]:
    """Sample answers to the prompts of a file, a batch at a time, from the policy in a folder.

    Args:
        folder: Model and tokenizer.
        rows: JSON lines with ``prompt``.
        seed: Of the draws; the same seed draws with the same random numbers from every policy.
        samples: Answers to each prompt, side by side.
    """
    policy, tokenizer, sampler = load_causal(folder).eval(), load_tokenizer(folder), DecodeSampler()
    data = PromptData(rows, val=rows, limit=1, tokenizer=folder, val_batch_size=BATCH // samples)
    data.setup("validate")
    return [
        sampler(policy, tokenizer, batch.repeat(samples), SAMPLING, seed=seed * 1000 + number)
        for number, batch in enumerate(data.val_dataloader())
    ]


@torch.no_grad()
def measure(name: str, folder: str, *, start: str, reward: str, rows: str, seed: int) -> Measured:
    """Answer every held-out prompt once and measure the answers.

    Args:
        name: What to call the policy.
        folder: The policy.
        start: The SFT policy, which KL is measured against.
        reward: The reward model.
        rows: JSON lines with the held-out prompts.
        seed: Of the draws.
    """
    policy, sft = load_causal(folder).eval(), load_causal(start).eval()
    proxy = RewardModel(reward, normalize=True, batch_size=BATCH)
    found = Measured(name, [], [], [], [], [], [], [], [])
    for rollout in sample(folder, rows, seed):
        prompts, texts = list(rollout.prompts), list(rollout.completions)
        ended = rollout.ended.tolist()
        readings = [read_story(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        found.prompts.extend(prompts)
        found.texts.extend(texts)
        found.gold.extend(gold(prompts, texts))
        found.proxy.extend(proxy.score_rollout(rollout).tolist())
        logprobs, reference = (token_logprobs(m, rollout, temperature=SAMPLING.temperature) for m in (policy, sft))
        found.kl.extend((logprobs - reference).sum(dim=1).tolist())
        found.words.extend(words_used(prompts, texts))
        found.finished.extend(ended)
        found.well_formed.extend(end and read.well_formed for end, read in zip(ended, readings, strict=True))
    return found


def bootstrap_mean(values: list[float] | list[bool], resamples: int = 4000) -> tuple[float, float, float]:
    """Estimate a mean and its 95 % interval by the percentile bootstrap (Efron 1979).

    Args:
        values: One a prompt; prompts are drawn with replacement. For the gain of one policy over another give the
            differences, prompt by prompt.
        resamples: How often a set of the same size is drawn.

    Returns:
        Mean, lower and upper end. The draws are seeded: the same values give the same interval.

    >>> bootstrap_mean([1.0, 1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    array = np.asarray(values, dtype=float)
    rows = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[rows].mean(axis=1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)
