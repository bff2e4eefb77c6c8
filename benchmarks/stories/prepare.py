"""Make prompt files from stories: the first words of each, and which of those words the continuation should use again.

    python benchmarks/stories/prepare.py stories.jsonl.gz prompts.jsonl --words 16

Reads rows with a ``text``; writes rows with ``prompt`` (the first words), ``words`` (content words of the prompt, the
hero's name first, that the story itself comes back to) and ``story`` (the rest, as it really goes on).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path

STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a about after again all also always am an and another any are around as at away back be because been
        before best big but by called came can could day did do down each even ever every felt find first
        for from fun gave get go goes going good got had happy has have he her here hers him his home how i
        if in inside into is it its just kind knew know like liked little live lived long look looked lot
        lots love loved made make many me more most mother much my name named near new next nice no not now
        of off old on once one only or other our out outside over play played playing put ran run said sad
        sat saw say see she sing small so some special started still take than that the their them then
        there they thing things this time to together told too took try two up upon us use used very wanted
        want was way we went were what when where which who will with woke would you young your years three
        """,
    )
)


def given_words(prompt: str, rest: str, most: int = 3) -> list[str]:
    """Content words of the prompt that the story comes back to, names first, then by how often it does."""
    later = Counter(re.findall(r"[A-Za-z]+", rest))
    names, nouns = [], []
    for match in re.finditer(r"[A-Za-z]+", prompt):
        word = match.group()
        if len(word) < 3 or word.lower() in STOP or not later[word]:
            continue
        starts_sentence = not prompt[: match.start()].rstrip() or prompt[: match.start()].rstrip()[-1] in '.!?"“'
        (names if word[0].isupper() and not starts_sentence else nouns).append(word)
    ranked = sorted(dict.fromkeys(names), key=lambda word: -later[word])
    ranked += sorted((word for word in dict.fromkeys(nouns) if word not in names), key=lambda word: -later[word])
    return ranked[:most]


def main() -> None:
    """Read the stories, write the prompts, say how many were left out and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stories", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--words", type=int, default=16, help="words of a prompt")
    arguments = parser.parse_args()
    opener = gzip.open if arguments.stories.suffix == ".gz" else open
    with opener(arguments.stories, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    rows, short, wordless = [], 0, 0
    for text in texts:
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        if len(starts) < 2 * arguments.words:
            short += 1
            continue
        cut = starts[arguments.words]
        prompt, rest = text[:cut].rstrip(), text[len(text[:cut].rstrip()) :]
        words = given_words(prompt, rest)
        if not words:
            wordless += 1
            continue
        rows.append({"prompt": prompt, "words": words, "story": rest})
    arguments.prompts.parent.mkdir(parents=True, exist_ok=True)
    with arguments.prompts.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(
        f"{arguments.prompts}: {len(rows)} prompts; left out {short} short and {wordless} without a word to use again"
    )


if __name__ == "__main__":
    main()
