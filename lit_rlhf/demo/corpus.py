"""Write the demo's data: stories to imitate, prompts to continue, and labelled pairs of a policy's own stories."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .grammar import (
    ANIMALS,
    DEEDS,
    ENDINGS,
    HE,
    NAMES,
    PLACES,
    SHE,
    TEMPLATES,
    THINGS,
    TIMES,
    TRAITS,
    Cast,
    with_article,
)
from .judge import gold_score
from .reader import read_prompt

ANSWERS = {"kind": "glad", "mean": "sorry"}


def make_prompts(count: int, seed: int) -> list[str]:
    """Make different prompts, each with a hero, an animal and two things the story should use."""
    there_are = len(NAMES) * len(ANIMALS) * len(THINGS) * (len(THINGS) - 1)
    if count > there_are:
        raise ValueError(f"{count} different prompts were asked for; there are {there_are}")
    rng = random.Random(f"prompts {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        first, second = (with_article(thing) for thing in rng.sample(THINGS, 2))
        hero, animal = rng.choice(NAMES), rng.choice(ANIMALS)
        prompts[f"Tell a story about {hero} the {animal} with {first} and {second}."] = None
    return list(prompts)


def write_story(cast: Cast, words: tuple[str, str], rng: random.Random) -> str:
    """Write one story about a cast that has no friend yet.

    The writer is no moralist: each story draws a mood, and kind and mean deeds and endings follow it. It uses a word
    that was asked for in two of five finds. So what the judge likes is all there, seldom together.
    """
    mood = rng.random()  # 0 = every deed is mean, 1 = every deed is kind
    story: list[str] = []

    def say(role: str, thing: bool | None = None) -> None:
        nonlocal cast
        choices = [t for t in TEMPLATES[role] if thing is None or ("thing" in t.slots) == thing]
        template = rng.choice(choices)
        slots = {slot: {**_fresh(cast, words, rng), **cast.words()}[slot] for slot in template.slots}
        story.append(template.text.format(**slots))
        cast = cast.after(template, slots)

    for role in ("setting", "journey", "meeting"):
        say(role)
    for _ in range(rng.choices((1, 2, 3), weights=(30, 45, 25))[0]):
        with_thing = rng.random() < 0.65
        if with_thing:
            say("find")
        deed = rng.choices(DEEDS, weights=(mood, 0.5, 1 - mood))[0]
        say(deed, thing=with_thing)
        if deed in ANSWERS and rng.random() < 0.6:
            say(ANSWERS[deed])
    say(rng.choices(ENDINGS, weights=(mood, 0.4, 1 - mood))[0])
    return " ".join(story)


def _fresh(cast: Cast, words: tuple[str, str], rng: random.Random) -> dict[str, str]:
    """Words for the slots that the cast does not fix."""
    asked = rng.random() < 0.4
    return {
        "trait": rng.choice(TRAITS),
        "time": rng.choice(TIMES),
        "place": rng.choice(PLACES),
        "a_thing": with_article(rng.choice(words if asked else THINGS)),
        "friend": rng.choice(HE if cast.hero in SHE else SHE),
        "friend_animal": rng.choice([animal for animal in ANIMALS if animal != cast.animal]),
    }


def make_stories(prompts: Iterable[str], seed: int) -> list[dict[str, str]]:
    """Write one story to each prompt: rows ``prompt``, ``completion``.

    A completion begins with a space, so that prompt and completion joined read as one text.
    """
    rng = random.Random(f"stories {seed}")
    return [{"prompt": prompt, "completion": " " + write_story(*read_prompt(prompt), rng)} for prompt in prompts]


def label_pairs(prompts: list[str], stories: list[str], seed: int, noise: float = 0.5) -> list[dict[str, str]]:
    """Compare neighbouring stories (0 with 1, 2 with 3, …) of one prompt as a noisy human would.

    P(first is chosen) = σ((gold₁ − gold₂) / noise), Bradley and Terry (1952). Pairs of one text are left out, since
    they say nothing.

    Returns:
        Rows ``prompt``, ``chosen``, ``rejected``.
    """
    rng = random.Random(f"pairs {seed}")
    rows = []
    for i in range(0, len(stories) - 1, 2):
        prompt, first, second = prompts[i], stories[i], stories[i + 1]
        if prompt != prompts[i + 1]:
            raise ValueError(f"stories {i} and {i + 1} answer different prompts; a pair needs two answers to one")
        if first == second:
            continue
        lead = (gold_score(prompt, first) - gold_score(prompt, second)) / noise
        if rng.random() >= (1 + math.tanh(lead / 2)) / 2:  # = σ(lead), and never overflows
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
