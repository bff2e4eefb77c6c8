r"""Find the number that a text gives as its answer.

Read are ``1,234.50``, ``$5``, ``-$5``, ``−5`` (Unicode minus), ``.5``, ``1e-3``, ``2 \times 10^3``, ``50%`` (as 50),
``3/4`` and ``\frac{3}{4}``. Not read: numbers in words, mixed numbers (``1 1/2``), decimal commas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_MINUS = "-−–‐‑﹣－"  # hyphen-minus, Unicode minus, en dash, hyphens, small and full-width hyphen
_SPACE = "\u00a0\u2009\u202f"  # no-break and thin spaces, as they group digits
_UNSIGNED = rf"(?:\d{{1,3}}(?:[,{_SPACE}]\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+"
_NUMBER = re.compile(
    rf"""
    (?P<name>[A-Za-z]\d+(?:[.,]\d+)*)            # the 4 of GPT4 is no number
  | (?P<sign>(?<![A-Za-z\d)\]}}])[{_MINUS}+])?  # the 5 of 10-5 is not −5
    (?:\\?[$€£¥][ ]?)?
    (?:
        \\[dtc]?frac\{{(?P<top>[{_MINUS}+]?\d+(?:\.\d+)?)\}}\{{(?P<bottom>\d+(?:\.\d+)?)\}}
      | (?<!/)(?P<over>\d+)[ ]?/[ ]?(?P<under>\d+)(?!\d|\.\d)   # but no date
      | (?P<digits>{_UNSIGNED})
        (?:[eE](?P<exponent>[{_MINUS}+]?\d+)(?![A-Za-z\d]))?
        (?:[ ]?(?:×|\\times|\\cdot|\*|x)[ ]?10(?:\^|\*\*)\{{?(?P<power>[{_MINUS}+]?\d+)\}}?)?
    )
    """,
    re.VERBOSE,
)
_GSM8K = re.compile(r"(?<!\#)\#{4}(?!\#)[ \t*\\$€£¥]*")
_LABEL = re.compile(r"[.):][ \t]*[^\s*]")  # "#### 2. Then …" is a heading
_BRACE = re.compile(r"\\[{}]|[{}]")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*$")


def extract_number(text: str) -> float | None:
    r"""Read the number that a text gives as its answer.

    The first of these that there is: the number after the last ``####`` (as in GSM8K), the last number within the last
    ``\boxed{…}`` that holds one (as in MATH), the last number of the text.

    Args:
        text: an answer, or a whole worked solution.

    Returns:
        The number, None if there is none.

    >>> extract_number("3 apples at $1,200.00 each: #### 3,600")
    3600.0
    >>> extract_number(r"So \boxed{\text{half: } \frac{1}{2}}, see page 7.")
    0.5
    """
    text = text.replace("{,}", ",").replace(r"\,", "").replace(r"\!", "").replace(r"\%", "%")
    answers = [number for mark in _GSM8K.finditer(text) if (number := _answer_at(text, mark.end())) is not None]
    if answers:
        return answers[-1]
    for start, end in [*reversed(list(_boxed(text))), (0, len(text))]:
        number = _last_number(text, start, end)
        if number is not None:
            return number
    return None


def _answer_at(text: str, start: int) -> float | None:
    found = _NUMBER.match(text, start)
    return None if found is None or _LABEL.match(text, found.end()) else _value(found)


def _last_number(text: str, start: int, end: int) -> float | None:
    values = [value for found in _NUMBER.finditer(text, start, end) if (value := _value(found)) is not None]
    return values[-1] if values else None


def _boxed(text: str) -> Iterator[tuple[int, int]]:
    r"""Where the content of each closed ``\boxed{…}`` begins and ends, in the order in which they close."""
    opened: list[tuple[int, bool]] = []  # where the content of each open brace begins, and whether it is a box
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            before = text[max(0, brace.start() - 10) : brace.start()]
            opened.append((brace.end(), _BOXED.search(before) is not None))
        elif brace.group() == "}" and opened:
            start, box = opened.pop()
            if box:
                yield start, brace.start()


def _value(found: re.Match[str]) -> float | None:
    """Value of a match of ``_NUMBER``; None for a name, a division by 0 and what no float can hold."""
    group = found.groupdict()
    if group["name"]:
        return None
    try:
        if group["digits"] is None:
            value = float(_ascii(group["top"] or group["over"])) / float(group["bottom"] or group["under"])
        else:
            digits = re.sub(rf"[,{_SPACE}]", "", group["digits"])
            exponent, power = (_ascii(group[key] or "0") for key in ("exponent", "power"))
            value = float(f"{digits}e{int(exponent) + int(power)}")
    except (ZeroDivisionError, ValueError):  # ValueError: an exponent of thousands of digits
        return None
    if not math.isfinite(value):
        return None
    return -value if (group["sign"] or "+") in _MINUS else value


def _ascii(number: str) -> str:
    """The number with a minus sign that ``float`` and ``int`` know."""
    return f"-{number[1:]}" if number[0] in _MINUS else number
