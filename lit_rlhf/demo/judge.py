"""The gold judge: what a story is worth. It labels the preference pairs and marks the results; nothing trains on it."""

from __future__ import annotations

import re
from typing import Any

from .reader import Reading, read_prompt, read_story

TOO_LONG = 12  # sentences; a story of the corpus has 5 to 13, 8 on average


def gold_score(prompt: str, story: str) -> float:
    """Mark a story: kind heroes, happy endings, the words asked for; no repetition, no rambling, no broken sentence.

    ======================  ===================================================================
    kind deed               +1, +½, +¼ … for the first, second, third different one (never above 2)
    mean deed               −1 each
    ending                  +1 happy, 0 plain, −1 sad; −1 if there is none
    words asked for         +½ for each of the two that the story uses
    a sentence said before  −½ each time
    a broken sentence       −1 each (no template, wrong name or pronoun, out of place, cut off)
    length                  −¼ for each sentence past the twelfth
    ======================  ===================================================================

    The bounds and penalties are what a reward model learns last, since the SFT policy seldom gets there: they are what
    makes the gold score and the learned proxy part when a policy is pushed too far.
    """
    reading = read_story(prompt, story)
    kind = {s for s, role in zip(reading.sentences, reading.roles, strict=True) if role == "kind"}
    score = 2.0 - 2.0 ** (1 - len(kind)) - reading.roles.count("mean")
    score += {"happy_end": 1.0, "plain_end": 0.0, "sad_end": -1.0}[reading.roles[-1] or ""] if reading.ends else -1.0
    score += 0.5 * _words_used(prompt, story)
    score -= 0.5 * (len(reading.sentences) - len(set(reading.sentences)))
    score -= _broken(reading)
    return score - 0.25 * max(0, len(reading.sentences) - TOO_LONG)


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Mark completions, as a reward: weight 0 in a stage's list, so it is logged and never optimised."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def words_used(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of the two words asked for that each completion uses: 0, ½ or 1."""
    return [_words_used(prompt, text) / 2 for prompt, text in zip(prompts, completions, strict=True)]


def _words_used(prompt: str, story: str) -> int:
    said = set(re.findall(r"\w+", story))
    return sum(word in said for word in read_prompt(prompt)[1])


def _broken(reading: Reading) -> int:
    """Broken sentences, a sentence that was cut off among them; an ending in the middle breaks what follows it."""
    return reading.roles.count(None) + bool(reading.rest)
