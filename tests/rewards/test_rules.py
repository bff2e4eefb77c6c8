"""Every shipped rule against a table of hostile rows."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lit_rlhf.rewards import (
    ContainsWords,
    ExactMatch,
    LengthBounds,
    NumericMatch,
    RegexFormat,
    Repetition,
    RowError,
    VaderSentiment,
)


def one(rule: Any, completion: str, **columns: Any) -> float | None:
    """The rule's value for a single row."""
    (value,) = rule(["p"], [completion], **{key: [value] for key, value in columns.items()})
    return value


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("Paris", "  Paris ", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
        ("Rome", ["Paris", "Rome"], 1.0),
        ("Bern", ("Paris", "Rome"), 0.0),
        ("cafe\u0301", "caf\u00e9", 1.0),
        ("Paris", None, None),
    ],
)
def test_exact_match(completion: str, answer: Any, value: float | None) -> None:
    assert one(ExactMatch(), completion, answer=answer) == value


def test_exact_match_options() -> None:
    assert one(ExactMatch(ignore_case=True), "STRASSE", answer="straße") == 1.0
    assert one(ExactMatch(column="gold"), "a", gold="a", answer="b") == 1.0


@pytest.mark.parametrize("answer", [3, [], ["a", 3], [None], {"a": 1}])
def test_exact_match_refuses_an_answer_that_is_no_text(answer: Any) -> None:
    with pytest.raises(RowError, match="column 'answer' holds") as caught:
        ExactMatch()(["p", "q"], ["a", "a"], answer=["a", answer])
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so 1,234.0", "1234", 1.0),
        ("so 1234", "long story\n#### 1,234", 1.0),
        ("so $5", 5, 1.0),
        ("so 5.0", 5.0, 1.0),
        ("so 5.1", 5, 0.0),
        ("so -5", 5, 0.0),
        ("no idea", 5, 0.0),
        ("", 0, 0.0),
        ("0", 0, 1.0),
        ("0.3333333", r"\frac{1}{3}", 1.0),
        ("0.333", r"\frac{1}{3}", 0.0),
        ("1000000.5", 1_000_000, 1.0),
        ("1000002", 1_000_000, 0.0),
        ("7", None, None),
    ],
)
def test_numeric_match(completion: str, answer: Any, value: float | None) -> None:
    assert one(NumericMatch(), completion, answer=answer) == value


def test_numeric_match_options() -> None:
    assert one(NumericMatch(tolerance=0.1), "109", answer=100) == 1.0
    assert one(NumericMatch(tolerance=0), "100.0001", answer=100) == 0.0
    assert one(NumericMatch(tolerance=0), "100", answer=100) == 1.0
    assert one(NumericMatch(tolerance=0.01), "0.105", answer=0.1) == 1.0
    assert one(NumericMatch(column="gold"), "3", gold=3, answer=4) == 1.0
    with pytest.raises(ValueError, match="tolerance is -1"):
        NumericMatch(tolerance=-1)


@pytest.mark.parametrize("answer", ["none", "", True, float("nan"), float("inf"), [3], {}])
def test_numeric_match_refuses_an_answer_without_a_number(answer: Any) -> None:
    with pytest.raises(RowError, match="column 'answer' holds") as caught:
        NumericMatch()(["p", "q"], ["1", "1"], answer=[1, answer])
    assert caught.value.row == 1


def test_regex_format() -> None:
    rule = RegexFormat(r"(?s)^<think>.*</think>\s*<answer>.*</answer>\s*$")
    assert one(rule, "<think>a\nb</think>\n<answer>3</answer>\n") == 1.0
    assert one(rule, "x <think>a</think><answer>3</answer>") == 0.0
    assert one(rule, "<think>a</think>") == 0.0
    assert one(RegexFormat("b"), "abc") == 1.0
    with pytest.raises(ValueError, match=r"'\(a' is no regular expression"):
        RegexFormat("(a")


@pytest.mark.parametrize(
    ("bounds", "completion", "ids", "value"),
    [
        ({"min": 2}, "a b", [], 1.0),
        ({"min": 2}, "a", [], 0.0),
        ({"max": 2}, "a  b\n", [], 1.0),
        ({"max": 2}, "a b c", [], 0.0),
        ({"max": 0}, "", [], 1.0),
        ({"max": 0}, " ", [], 1.0),
        ({"min": 3, "max": 3, "unit": "characters"}, "añb", [], 1.0),
        ({"min": 3, "max": 3, "unit": "characters"}, "a b c", [], 0.0),
        ({"min": 3, "max": 3, "unit": "tokens"}, "a", [5, 6, 2], 1.0),
        ({"min": 3, "max": 3, "unit": "tokens"}, "a b c", [5, 2], 0.0),
    ],
)
def test_length_bounds(bounds: dict[str, Any], completion: str, ids: list[int], value: float) -> None:
    assert one(LengthBounds(**bounds), completion, completion_ids=ids) == value


@pytest.mark.parametrize(
    "bounds", [{}, {"min": 3, "max": 2}, {"max": -1}, {"min": -3, "max": -1}, {"min": 1, "unit": "lines"}]
)
def test_length_bounds_that_say_nothing_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LengthBounds: "):
        LengthBounds(**bounds)


@pytest.mark.parametrize(
    ("completion", "words", "value"),
    [
        ("The cat sat.", ["cat", "dog"], 0.5),
        ("The CAT sat on a Dog", ["cat", "DOG"], 1.0),
        ("concatenate", ["cat"], 0.0),
        ("cats", ["cat"], 0.0),
        ("cat's", ["cat"], 1.0),
        ("(cat)", ["cat"], 1.0),
        ("an ice  cream", ["ice cream"], 1.0),
        ("an ice cold cream", ["ice cream"], 0.0),
        ("don\u2019t", ["don't"], 1.0),
        ("tomcat", ["cat"], 0.0),
        ("aab", ["a.b"], 0.0),
        ("C++ and more", ["c++"], 1.0),
        ("cafe\u0301", ["caf\u00e9"], 1.0),
        ("cat cat cat", ["cat", "Cat", "dog"], 0.5),
        ("a cat, a dog", "cat, dog,", 1.0),
        ("a cat", "cat dog", 0.5),
        ("an ice cream", "ice cream, dog", 0.5),
        ("cat", ("cat",), 1.0),
        ("cat", [], None),
        ("cat", "", None),
        ("cat", [" "], None),
        ("cat", None, None),
        ("", ["cat"], 0.0),
    ],
)
def test_contains_words(completion: str, words: Any, value: float | None) -> None:
    assert one(ContainsWords(), completion, words=words) == value


def test_contains_words_options() -> None:
    assert one(ContainsWords(words=["cat", "dog"]), "a dog") == 0.5
    assert one(ContainsWords(words=["cat"]), "a cat", words=["dog"]) == 1.0
    assert one(ContainsWords(column="use"), "a dog", use=["dog"], words=["cat"]) == 1.0
    with pytest.raises(ValueError, match="expected at least one word"):
        ContainsWords(words=[])


@pytest.mark.parametrize("words", [3, ["cat", 3], {"cat": 1}, [None]])
def test_contains_words_refuses_what_are_no_words(words: Any) -> None:
    with pytest.raises(RowError, match="column 'words' holds") as caught:
        ContainsWords()(["p", "q"], ["a", "a"], words=[["a"], words])
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("options", "completion", "ids", "value"),
    [
        ({}, "one two three four five", [], 0.0),
        ({}, "a b c a b c", [], 3 / 4 - 1),
        ({}, "a a a a a a", [], 1 / 4 - 1),
        ({}, "A a a A", [], 1 / 2 - 1),
        ({}, "a a", [], 0.0),
        ({}, "", [], 0.0),
        ({"n": 1}, "a b a b", [], 1 / 2 - 1),
        ({"n": 2, "unit": "tokens"}, "x", [4, 4, 4, 5], 2 / 3 - 1),
    ],
)
def test_repetition(options: dict[str, Any], completion: str, ids: list[int], value: float) -> None:
    assert one(Repetition(**options), completion, completion_ids=ids) == pytest.approx(value)


def test_repetition_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        Repetition(n=0)
    with pytest.raises(ValueError, match="unit is 'lines'"):
        Repetition(unit="lines")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [ExactMatch(), NumericMatch(), ContainsWords(), LengthBounds(min=1, unit="tokens")])
def test_a_missing_column_is_named_with_those_there_are(rule: Any) -> None:
    column = getattr(rule, "column", "completion_ids")
    with pytest.raises(LookupError, match=f"no column '{column}'; there are: text, score"):
        rule(["p"], ["a"], text=["x"], score=[1])


RULES = [
    ExactMatch("gold", True, "a"),
    NumericMatch("gold", 0.5, "b"),
    RegexFormat("a+", "c"),
    LengthBounds(1, 3, "characters", "d"),
    ContainsWords("gold", ["a"], "e"),
    Repetition(2, "tokens", "f"),
    VaderSentiment(-2.0, "g"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_survives_pickling_and_keeps_its_rows_apart(rule: Any) -> None:
    completions = ["a a 3", "b", "", "3"]
    columns = {"gold": ["3", "4", "5", "3"], "completion_ids": [[1, 1, 1], [2], [], [3]]}
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    together = again(["p"] * 4, completions, **columns)
    alone = [rule(["p"], [completions[i]], **{k: [v[i]] for k, v in columns.items()})[0] for i in range(4)]
    assert together == alone
    assert rule([], [], gold=[], completion_ids=[]) == []
