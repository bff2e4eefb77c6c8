"""Preference data without people: sample answers from a policy, let a reward say which is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lit_rlhf.batch import Rollout
from lit_rlhf.commands.generate import write_rows
from lit_rlhf.commands.judged import judged_answers
from lit_rlhf.models import Network
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout import Sampling


def ranked(rollout: Rollout, scores: list[float], samples: int, min_gap: float, count: Counter[str]) -> Iterator[Any]:
    """Rows of preference data, one a prompt, best answer first.

    Args:
        rollout: ``samples`` answers to each prompt, side by side.
        scores: one each.
        samples: answers a prompt.
        min_gap: leave out prompts whose best and worst answer score no further apart than this.
        count: what became of the prompts is added here.
    """
    for start in range(0, len(rollout), samples):
        answers = sorted(range(start, start + samples), key=lambda i: -scores[i])
        if scores[answers[0]] - scores[answers[-1]] <= min_gap:
            count["left out"] += 1
            continue
        count["written"] += 1
        texts, values = [rollout.completions[i] for i in answers], [scores[i] for i in answers]
        if samples == 2:
            named = {"chosen": texts[0], "rejected": texts[1], "chosen_score": values[0], "rejected_score": values[1]}
        else:  # equal scores are a tie, which is no comparison
            named = {"responses": texts, "ranks": [values.index(value) for value in values], "scores": values}
        yield {"prompt": rollout.prompts[start], **named}


def pairs(
    policy: str,
    prompts: str,
    reward: Reward,
    output: str,
    samples: int = 2,
    min_gap: float = 0.0,
    prompt_column: str = "prompt",
    prompt_words: int | None = None,
    chat: bool = False,
    max_prompt_length: int = 512,
    limit: int | None = None,
    batch_size: int = 16,
    sampling: Sampling = Sampling(),
    network: Network = Network(),
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Sample answers to prompts from a policy, judge them, and write preference data (JSON lines).

    Two samples a prompt give rows of ``prompt``, ``chosen``, ``rejected`` and both scores; more give ranked
    ``responses``. ``PreferenceData`` reads either.

    Args:
        policy: folder or hub id of the model that answers.
        prompts: a file of prompts (jsonl, json, csv, parquet), a folder of such files or a hub id.
        reward: what judges: the dotted path of a function or class, for instance lit_rlhf.rewards.VaderSentiment.
        output: the file to write.
        samples: answers a prompt, at least 2.
        min_gap: leave out prompts whose best and worst answer score no further apart than this; ties always.
        prompt_column: column of ``prompts`` with the prompts, text or messages.
        prompt_words: take only so many words of each prompt, from its start.
        chat: make text prompts the user's message of a conversation.
        max_prompt_length: longest prompt in tokens.
        limit: the first prompts only, so many.
        batch_size: prompts answered at a time.
        sampling: how answers are drawn.
        network: how the policy is loaded.
        device: auto, cpu, cuda, cuda:1 …
        seed: the same seed gives the same pairs.

    Raises:
        ValueError: fewer than 2 samples, or no pair came of it.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}: a comparison needs at least 2 answers a prompt")
    answers = judged_answers(
        policy,
        prompts,
        reward,
        samples,
        sampling,
        network,
        device,
        seed,
        prompt_column=prompt_column,
        prompt_words=prompt_words,
        chat=chat,
        max_prompt_length=max_prompt_length,
        val_limit=limit,
        val_batch_size=batch_size,
    )
    count: Counter[str] = Counter()
    scores: list[float] = []

    def rows() -> Iterator[Any]:
        for rollout, judged in answers:
            scores.extend(judged)
            yield from ranked(rollout, judged, samples, min_gap, count)
            print(f"\r{count['written']} rows, {count['left out']} prompts left out as ties", end="", flush=True)

    write_rows(rows(), output)
    if not count["written"]:
        raise ValueError(f"no pair came of {len(scores)} answers: all tie under this reward within min_gap={min_gap}")
    print(f"\nwrote {output}; mean score of the answers {sum(scores) / len(scores):.4g}")
