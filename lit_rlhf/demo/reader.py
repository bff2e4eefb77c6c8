"""Read a story back: which sentences follow the grammar, agree with each other, and stand where they may."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .grammar import ANIMALS, ENDINGS, FOLLOWS, NAMES, TEMPLATES, THINGS, Cast

_PROMPT = re.compile(
    rf"Tell a story about (?P<hero>{'|'.join(NAMES)}) the (?P<animal>{'|'.join(ANIMALS)}) "
    rf"with an? (?P<first>{'|'.join(THINGS)}) and an? (?P<second>{'|'.join(THINGS)})\."
)
_ALL = tuple(template for templates in TEMPLATES.values() for template in templates)


@dataclass(frozen=True)
class Reading:
    """What a reader makes of a text, sentence by sentence."""

    sentences: tuple[str, ...]
    roles: tuple[str | None, ...]  # role of each sentence; None = broken (no template, disagreement, or out of place)
    rest: str  # words after the last full stop: a sentence that was cut off

    @property
    def ends(self) -> bool:
        """Whether the text stops after an ending, and the ending comes only there."""
        return not self.rest and bool(self.roles) and self.roles[-1] in ENDINGS

    @property
    def well_formed(self) -> bool:
        """Whether every sentence is right, nothing is cut off and the story ends with an ending."""
        return self.ends and None not in self.roles


def read_prompt(prompt: str) -> tuple[Cast, tuple[str, str]]:
    """Take hero, animal and the two words asked for from a prompt of the demo.

    Raises:
        ValueError: The text is not a prompt of this grammar.
    """
    found = _PROMPT.match(prompt.strip())
    if found is None:
        raise ValueError(
            f"not a prompt of the demo: {prompt[:80]!r}; expected "
            "'Tell a story about Mia the fox with a kite and an egg.' (names, animals and things of its grammar)"
        )
    return Cast(found["hero"], found["animal"]), (found["first"], found["second"])


def read_story(prompt: str, story: str) -> Reading:
    """Parse a story told to a prompt.

    One slip is one broken sentence: what follows is read as if a sentence with a wrong word or in a wrong place had
    been right, and after word salad any sentence may stand.
    """
    cast, _ = read_prompt(prompt)
    sentences = tuple(found.strip() for found in re.findall(r"[^.!?]*[.!?]", story))
    rest = re.split(r"[.!?]", story)[-1].strip()
    roles: list[str | None] = []
    last = "start"
    for sentence in sentences:
        readings = [(t, found.groupdict()) for t in _ALL if (found := t.pattern.fullmatch(sentence))]
        right = [(t, slots) for t, slots in readings if t.role in FOLLOWS[last] and t.fits(slots, cast)]
        roles.append(right[0][0].role if right else None)
        last = "salad"
        for template, slots in (right or readings)[:1]:
            cast, last = cast.after(template, slots), template.role
    return Reading(sentences, tuple(roles), rest)
