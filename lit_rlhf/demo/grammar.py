"""The grammar of the demo's stories: words, and sentence templates whose slots must agree through a whole story.

A story is an opening (setting, journey, meeting), one to three episodes and an ending. An episode may bring a thing in
(``find``), holds one deed (``kind``, ``plain`` or ``mean``) and may hold the friend's answer to it (``glad`` after a
kind deed, ``sorry`` after a mean one). The generator (``corpus``) fills the templates; the parser (``reader``) reads
them back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

SHE = ("Mia", "Lily", "Anna", "Rosa", "Nina", "Ella")
HE = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn")
NAMES = SHE + HE
ANIMALS = ("fox", "cat", "dog", "bear", "frog", "duck", "pig", "wolf")
TRAITS = ("little", "brave", "shy", "clever", "funny", "quiet")
TIMES = ("morning", "evening", "winter", "summer")
PLACES = ("river", "forest", "lake", "market", "farm", "beach", "garden", "hill")
THINGS = ("kite", "drum", "ball", "boat", "book", "hat", "lamp", "bell", "cake", "apple", "egg", "umbrella")

ENDINGS = ("happy_end", "plain_end", "sad_end")
DEEDS = ("kind", "plain", "mean")

_TEXTS: dict[str, tuple[str, ...]] = {
    "setting": ("Once there was a {trait} {animal} called {hero}.",),
    "journey": ("One {time} {hero} went to the {place}.",),
    "meeting": ("There {he} met {friend} the {friend_animal}.",),
    "find": (
        "{He} found {a_thing}.",
        "{friend} had {a_thing}.",
        "They saw {a_thing} under a tree.",
        "{friend} showed {him} {a_thing}.",
    ),
    "kind": (
        "{He} gave the {thing} to {friend}.",
        "{He} let {friend} play with the {thing}.",
        "{He} shared the {thing} with {friend}.",
        "{He} hugged {friend}.",
        "{He} sang a song for {friend}.",
        "{He} told {friend} a good joke.",
        "{He} helped {friend} to build a house.",
    ),
    "plain": (
        "They looked at the {thing}.",
        "{He} put the {thing} in {his} bag.",
        "{friend} talked about the {thing}.",
        "They walked along the road.",
        "Then it began to rain.",
        "{He} sat down on a stone.",
        "They heard a noise.",
    ),
    "mean": (
        "{He} broke the {thing}.",
        "{He} hid the {thing} from {friend}.",
        "{He} threw the {thing} at {friend}.",
        "{He} pushed {friend}.",
        "{He} laughed at {friend}.",
        "{He} shouted at {friend}.",
        "{He} called {friend} a bad name.",
    ),
    "glad": ("{friend} smiled.", "{friend} thanked {him}.", "{friend} jumped for joy."),
    "sorry": ("{friend} cried.", "{friend} was hurt.", "{friend} looked at {friend_his} feet."),
    "happy_end": (
        "{friend} and {hero} became best friends.",
        "They went home hand in hand.",
        "At night they both fell asleep with a smile.",
    ),
    "plain_end": ("Then {he} went home.", "Soon it was dark and {he} went to bed."),
    "sad_end": (
        "{He} went home alone.",
        "{friend} did not want to see {him} again.",
        "At night {he} cried in {his} bed.",
    ),
}  # fmt: skip

_HIM = ("he", "He", "him", "his")
_HER = ("she", "She", "her", "her")
_A_THING = "|".join(f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in THINGS)
_PATTERNS = {
    "hero": "|".join(NAMES),
    "friend": "|".join(NAMES),
    "animal": "|".join(ANIMALS),
    "friend_animal": "|".join(ANIMALS),
    "trait": "|".join(TRAITS),
    "time": "|".join(TIMES),
    "place": "|".join(PLACES),
    "thing": "|".join(THINGS),
    "a_thing": _A_THING,
    "he": "he|she",
    "He": "He|She",
    "him": "him|her",
    "his": "his|her",
    "friend_his": "his|her",
}


def with_article(thing: str) -> str:
    """Give a thing its article: ``kite`` → ``a kite``, ``egg`` → ``an egg``."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about so far; every later sentence must agree with it."""

    hero: str
    animal: str
    friend: str | None = None
    friend_animal: str | None = None
    thing: str | None = None  # the thing brought in last: "the kite" means this one

    def words(self) -> dict[str, str]:
        """What each slot that agrees with the cast must hold; slots not known yet are absent."""
        she = self.hero in SHE
        known = {"hero": self.hero, "animal": self.animal}
        known |= dict(zip(("he", "He", "him", "his"), _HER if she else _HIM, strict=True))
        if self.friend and self.friend_animal:
            known |= {"friend": self.friend, "friend_animal": self.friend_animal}
            known |= {"friend_his": "her" if self.friend in SHE else "his"}
        if self.thing:
            known |= {"thing": self.thing}
        return known

    def after(self, sentence: Template, slots: dict[str, str]) -> Cast:
        """The cast once a sentence has been said: a meeting brings the friend in, a find the thing."""
        if sentence.role == "meeting":
            return replace(self, friend=slots["friend"], friend_animal=slots["friend_animal"])
        if sentence.role == "find":
            return replace(self, thing=slots["a_thing"].split(" ", 1)[1])
        return self


@dataclass(frozen=True)
class Template:
    """One sentence with slots, and its role in a story."""

    role: str
    text: str

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots, in order."""
        return tuple(re.findall(r"{(\w+)}", self.text))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the sentence looks like, whatever stands in its slots."""
        parts = re.split(r"{(\w+)}", self.text)
        pieces = [re.escape(p) if i % 2 == 0 else f"(?P<{p}>{_PATTERNS[p]})" for i, p in enumerate(parts)]
        return re.compile("".join(pieces))

    def fits(self, slots: dict[str, str], cast: Cast) -> bool:
        """Whether words read from a sentence agree with the cast: names, pronouns, "the thing", a new friend."""
        known = cast.words()
        if self.role == "meeting":
            return (slots["friend"] in SHE) != (cast.hero in SHE) and slots["he"] == known["he"]
        return all(known.get(slot) == word for slot, word in slots.items() if slot in _AGREEING)


_AGREEING = {"hero", "animal", "he", "He", "him", "his", "friend", "friend_his", "thing"}
TEMPLATES = {role: tuple(Template(role, text) for text in texts) for role, texts in _TEXTS.items()}

# Which roles may follow which; a deed decides which answer may follow it.
_OPEN = {"find", *DEEDS, *ENDINGS}
FOLLOWS: dict[str, set[str]] = {
    "start": {"setting"},
    "setting": {"journey"},
    "journey": {"meeting"},
    "meeting": {"find", *DEEDS},
    "find": set(DEEDS),
    "kind": _OPEN | {"glad"},
    "plain": _OPEN,
    "mean": _OPEN | {"sorry"},
    "glad": _OPEN,
    "sorry": _OPEN,
    **{ending: set() for ending in ENDINGS},
    "salad": set(_TEXTS),  # after a sentence of no template
}
