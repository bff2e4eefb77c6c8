"""Best-of-N: sample several answers to a prompt and keep what a reward likes best; SFT on it is rejection sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lit_rlhf.batch import Rollout
from lit_rlhf.commands.generate import write_rows
from lit_rlhf.commands.judged import judged_answers
from lit_rlhf.models import Network
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout import Sampling


def kl_bound(samples: int, keep: int = 1) -> float:
    """Bound the KL divergence of the best of N answers from the policy that gave them: log N − (N − 1) / N, in nats.

    Exact where no answer comes twice and none tie, else above the truth. Stiennon et al. 2020 (arXiv 2009.01325),
    appendix G.3; that it is an upper bound: Beirami et al. 2024 (arXiv 2401.01879), theorem 3.1. An answer drawn from
    the best k is at most N / k times likelier than before, so log(N / k) bounds it, too; the smaller one is given.

    Args:
        samples: N.
        keep: k.

    >>> round(kl_bound(16), 3)
    1.835
    """
    return min(math.log(samples) - (samples - 1) / samples, math.log(samples / keep))


def best(
    rollout: Rollout, scores: list[float], samples: int, keep: int, only_ended: bool, count: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Rows of SFT data: the ``keep`` best answers to each prompt, best first.

    Args:
        rollout: ``samples`` answers to each prompt, side by side.
        scores: one each.
        samples: answers a prompt.
        keep: how many of them to keep at most.
        only_ended: leave out answers that the length limit cut off.
        count: what became of the prompts and answers, and sums of scores, are added here.
    """
    ended = rollout.ended.tolist()
    for start in range(0, len(rollout), samples):
        answers = range(start, start + samples)
        # A blank answer is no row that SFT could read.
        fit = [i for i in answers if rollout.completions[i].strip() and (ended[i] or not only_ended)]
        kept = sorted(fit, key=lambda i: -scores[i])[:keep]
        if not kept:
            count["left out"] += 1
            continue
        mean = sum(scores[i] for i in answers) / samples
        count.update({"prompts": 1, "rows": len(kept), "cut off": sum(not ended[i] for i in kept)})
        count["first"] += scores[start]  # type: ignore[assignment]
        count["best"] += scores[kept[0]]  # type: ignore[assignment]
        for i in kept:
            row = {"prompt": rollout.prompts[i], "completion": rollout.completions[i], "ended": ended[i]}
            yield {**row, "score": scores[i], "mean_score": mean, "samples": samples}


def best_of_n(
    policy: str,
    prompts: str,
    reward: Reward,
    output: str,
    samples: int = 8,
    keep: int = 1,
    only_ended: bool = False,
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
    """Sample answers to prompts from a policy, keep those that a reward likes best, and write SFT data (JSON lines).

    Rows hold ``prompt`` and ``completion``, as ``SFTData`` reads them; ``ended``, the answer's ``score``, the
    ``mean_score`` of all answers to the prompt, and their number, ``samples``.

    Args:
        policy: folder or hub id of the model that answers.
        prompts: a file of prompts (jsonl, json, csv, parquet), a folder of such files or a hub id.
        reward: what judges: the dotted path of a function or class, for instance lit_rlhf.rewards.VaderSentiment.
        output: the file to write.
        samples: answers a prompt (N), at least 2.
        keep: best answers to keep of a prompt, fewer than ``samples``.
        only_ended: leave out answers that the length limit cut off; SFT on them teaches to stop in the middle.
        prompt_column: column of ``prompts`` with the prompts, text or messages.
        prompt_words: take only so many words of each prompt, from its start.
        chat: make text prompts the user's message of a conversation.
        max_prompt_length: longest prompt in tokens.
        limit: the first prompts only, so many.
        batch_size: prompts answered at a time.
        sampling: how answers are drawn.
        network: how the policy is loaded.
        device: auto, cpu, cuda, cuda:1 …
        seed: the same seed gives the same answers.

    Raises:
        ValueError: fewer than 2 samples, nothing or everything kept of them, or no answer that can be kept.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}: a choice needs at least 2 answers a prompt")
    if not 1 <= keep < samples:
        raise ValueError(f"keep is {keep}: expected 1 or more and fewer than samples={samples}")
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

    def rows() -> Iterator[dict[str, Any]]:
        for rollout, scores in answers:
            yield from best(rollout, scores, samples, keep, only_ended, count)
            print(f"\r{count['rows']} rows, {count['left out']} prompts left out", end="", flush=True)

    write_rows(rows(), output)
    if not count["prompts"]:
        why = "blank or cut off by sampling.max_new_tokens" if only_ended else "blank"
        raise ValueError(f"no answer can be kept: those to all {count['left out']} prompts are {why}")
    first, top, bound = count["first"] / count["prompts"], count["best"] / count["prompts"], kl_bound(samples, keep)
    kept = "the best" if keep == 1 else f"the best {keep}"
    print(f"\nwrote {output}; mean score: first answer {first:.4g}, best of {samples} {top:.4g}")
    if not count["left out"]:  # a policy that need not answer every prompt may go further
        print(f"KL of {kept} of {samples} from the policy: at most {bound:.3g} nats a response")
    if count["cut off"]:
        print(f"{count['cut off']} of the answers kept were cut off by the length limit (--only_ended leaves them out)")
