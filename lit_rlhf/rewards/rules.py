"""Rewards by rule: what a completion can be checked for without a model.

Every rule is a small picklable object that is called as ``rule(prompts, completions, **columns)``.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from lit_rlhf.rewards.numbers import extract_number
from lit_rlhf.rewards.protocol import RowError

Unit = Literal["words", "tokens"]


def _column(columns: dict[str, list[Any]], column: str) -> list[Any]:
    if column not in columns:
        raise LookupError(f"there is no column {column!r}; there are: {', '.join(columns) or 'none'}")
    return columns[column]


def _pieces(completions: list[str], columns: dict[str, list[Any]], unit: Unit) -> list[list[Any]]:
    """Words (split at white space, lower case) or token ids of each completion."""
    if unit == "tokens":
        return _column(columns, "completion_ids")
    return [completion.casefold().split() for completion in completions]


@dataclass
class ExactMatch:
    """1 if the completion is the right answer, else 0; white space at both ends does not count.

    Args:
        column: holds the right answer as text, or a list of texts any of which is right; None = does not apply.
        ignore_case: upper and lower case are the same.
        name: what it is logged as.
    """

    column: str = "answer"
    ignore_case: bool = False
    name: str = "exact_match"

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """1, 0 or None for each of the B completions."""
        rows = zip(completions, _column(columns, self.column), strict=True)
        return [self._score(row, completion, answer) for row, (completion, answer) in enumerate(rows)]

    def _score(self, row: int, completion: str, answer: Any) -> float | None:
        if answer is None:
            return None
        answers = list(answer) if isinstance(answer, (list, tuple)) else [answer]
        if not answers or not all(isinstance(right, str) for right in answers):
            raise RowError(row, f"column {self.column!r} holds {answer!r}, expected text or a list of texts")
        return float(self._plain(completion) in map(self._plain, answers))

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text).strip()
        return text.casefold() if self.ignore_case else text


@dataclass
class NumericMatch:
    r"""1 if the completion's answer is the right number, else 0 (also when it gives no number).

    The answer is what ``extract_number`` finds: the number after ``####``, in ``\boxed{}``, or the last one.

    Args:
        column: holds the right number, or text from which it is extracted the same way; None = does not apply.
        tolerance: largest error that counts as right, relative to the right number (absolute where that is below 1).
        name: what it is logged as.
    """

    column: str = "answer"
    tolerance: float = 1e-6
    name: str = "numeric_match"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"NumericMatch: tolerance is {self.tolerance}, expected a number of 0 or more")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """1, 0 or None for each of the B completions."""
        rows = zip(completions, _column(columns, self.column), strict=True)
        return [self._score(row, completion, answer) for row, (completion, answer) in enumerate(rows)]

    def _score(self, row: int, completion: str, answer: Any) -> float | None:
        if answer is None:
            return None
        right = answer if isinstance(answer, (int, float)) and not isinstance(answer, bool) else None
        if isinstance(answer, str):
            right = extract_number(answer)
        if right is None or not abs(right) < float("inf"):
            raise RowError(row, f"column {self.column!r} holds {answer!r}, expected a number or text with one")
        given = extract_number(completion)
        return float(given is not None and abs(given - right) <= self.tolerance * max(1.0, abs(right)))


@dataclass
class RegexFormat:
    r"""1 if a regular expression is found in the completion, else 0.

    For the whole completion write the anchors: ``(?s)^<think>.*</think>\s*<answer>.*</answer>\s*$``.

    Args:
        pattern: the expression, as for ``re.search``.
        name: what it is logged as.

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """

    pattern: str
    name: str = "regex_format"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"RegexFormat: {self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
        """1 or 0 for each of the B completions."""
        return [float(re.search(self.pattern, completion) is not None) for completion in completions]


@dataclass
class LengthBounds:
    """1 if the completion's length lies within the bounds, both included, else 0.

    Args:
        min: smallest length.
        max: largest length; no limit if null.
        unit: words are split at white space; the token that ends a response counts as one.
        name: what it is logged as.

    Raises:
        ValueError: bounds that nothing, or everything, satisfies.
    """

    min: int = 0
    max: int | None = None
    unit: Literal["words", "characters", "tokens"] = "words"
    name: str = "length_bounds"

    def __post_init__(self) -> None:
        if self.unit not in ("words", "characters", "tokens"):
            raise ValueError(f"LengthBounds: unit is {self.unit!r}, expected 'words', 'characters' or 'tokens'")
        if self.min <= 0 and self.max is None:
            raise ValueError("LengthBounds: every completion is within these bounds: give min, max or both")
        if self.max is not None and self.max < max(self.min, 0):
            raise ValueError(f"LengthBounds: no completion is within these bounds: min {self.min}, max {self.max}")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
        """1 or 0 for each of the B completions."""
        pieces = completions if self.unit == "characters" else _pieces(completions, columns, self.unit)
        largest = float("inf") if self.max is None else self.max
        return [float(self.min <= len(piece) <= largest) for piece in pieces]


@dataclass
class ContainsWords:
    """Share of the given words that the completion uses, 0 to 1: whole words, upper and lower case alike.

    ``run`` is not found in ``running``; several words in one entry must stand together.

    Args:
        column: holds the words of each row, as a list or as text split at commas (at white space if it has none);
            None or no words = does not apply.
        words: the words for every row, instead of a column.
        name: what it is logged as.

    Raises:
        ValueError: ``words`` holds no word.
    """

    column: str = "words"
    words: list[str] | None = None
    name: str = "contains_words"

    def __post_init__(self) -> None:
        if self.words is not None and not self._distinct(0, self.words):
            raise ValueError(f"ContainsWords: words is {self.words!r}, expected at least one word")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Share of the words, or None, for each of the B completions."""
        wanted = [self.words] * len(completions) if self.words else _column(columns, self.column)
        rows = zip(completions, wanted, strict=True)
        return [self._score(completion, self._distinct(row, words)) for row, (completion, words) in enumerate(rows)]

    def _distinct(self, row: int, words: Any) -> set[str]:
        if isinstance(words, str):
            words = words.split(",") if "," in words else words.split()
        if not isinstance(words, (list, tuple, type(None))) or not all(isinstance(word, str) for word in words or ()):
            raise RowError(row, f"column {self.column!r} holds {words!r}, expected a list of words or text")
        return {plain for word in words or () if (plain := _plain_words(word))}

    def _score(self, completion: str, words: set[str]) -> float | None:
        text = _plain_words(completion)
        used = sum(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None for word in words)
        return used / len(words) if words else None


def _plain_words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.replace("’", "'")).casefold().split())


@dataclass
class Repetition:
    """Minus the share of n-grams that repeat an earlier one: 0 (none) to almost −1 (one n-gram over and over).

    −(1 − distinct n-grams / n-grams); 0 for a completion of fewer than n pieces. A penalty as it stands: give it a
    positive weight.

    Args:
        n: pieces an n-gram.
        unit: words are split at white space, upper and lower case alike.
        name: what it is logged as.

    Raises:
        ValueError: ``n`` below 1, or another ``unit``.
    """

    n: int = 3
    unit: Unit = "words"
    name: str = "repetition"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Repetition: n is {self.n}, expected 1 or more")
        if self.unit not in ("words", "tokens"):
            raise ValueError(f"Repetition: unit is {self.unit!r}, expected 'words' or 'tokens'")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
        """Penalty of each of the B completions."""
        return [self._score(pieces) for pieces in _pieces(completions, columns, self.unit)]

    def _score(self, pieces: list[Any]) -> float:
        grams = list(zip(*(pieces[start:] for start in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1 if grams else 0.0
