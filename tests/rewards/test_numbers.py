"""The number that a text gives as its answer."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.rewards import extract_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("The answer is 42.0!", 42),
        ("1,234", 1234),
        ("1,234,567.5 people", 1234567.5),
        ("the list 1, 2, 3", 3),
        ("1,2345", 2345),
        ("12345,678", 678),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("1\u202f234\u00a0567", 1234567),
        ("$5", 5),
        ("$ 5", 5),
        ("$1,200.00", 1200),
        (r"\$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("US$5", 5),
        ("€7 or £8", 8),
        ("-5", -5),
        ("\u22125", -5),
        ("–5", -5),
        ("+5", 5),
        ("x = -5", -5),
        ("$-5$", -5),
        ("(-5)", -5),
        ("10-5", 5),
        ("x-5", 5),
        ("(a+b)-5", 5),
        ("pages 3–5", 5),
        ("- 5 apples", 5),
        ("50%", 50),
        (r"50\%", 50),
        (".5", 0.5),
        ("-.5", -0.5),
        ("wait...5", 5),
        ("no.5", 5),
        ("1e5", 1e5),
        ("1.5E-3", 0.0015),
        ("1e10abc", 1),
        (r"2 \times 10^3", 2000),
        (r"2 \times 10^{-3}", 0.002),
        ("2×10^3", 2000),
        ("3/4", 0.75),
        ("It is 3/4.", 0.75),
        ("-3/4", -0.75),
        (r"\frac{1}{2}", 0.5),
        (r"-\dfrac{1}{2}", -0.5),
        (r"\frac{-1}{2}", -0.5),
        ("\\frac{\u22121}{2}", -0.5),
        ("on 12/05/2024", 2024),
        ("2024/05/12", 12),
        ("1/2.5", 2.5),
        ("1/25.5", 25.5),
        ("7, not 1/0", 7),
        ("GPT42", None),
        ("5 moles of H2O", 5),
        ("v2.5", None),
        ("5kg", 5),
        ("the 3rd", 3),
        ("**42**", 42),
        ("_42_", 42),
        ("答案是42", 42),
        ("４２", 42),
        ("10²", 10),
        ("3 + 4 = 7", 7),
        ("#### 72", 72),
        ("####72", 72),
        ("#### $1,000.00", 1000),
        ("#### -3", -3),
        ("#### **72.**", 72),
        ("#### **72** of 80", 72),
        ("#### **72.** of 80", 72),
        ("#### $-3 of 80", -3),
        ("#### 72 dollars", 72),
        ("#### 72.\nQuestion: 5 apples", 72),
        ("#### 1\n#### 2", 2),
        ("#### 7\n#### none", 7),
        ("#### Step 1: add\nso 12", 12),
        ("#### 2. Then add\nso 12", 12),
        ("##### 3\nso 12", 12),
        ("### 3\nso 12", 12),
        (r"#### 72, not \boxed{3}", 72),
        (r"\boxed{5}, see page 7", 5),
        (r"\boxed {5}, see page 7", 5),
        (r"\fbox{5} 7", 5),
        (r"\unboxed{5} 7", 7),
        (r"\boxed{\text{so } 5}, 7", 5),
        (r"\boxed{\frac{1}{2}}, 7", 0.5),
        (r"\boxed{\boxed{5}}, 7", 5),
        (r"\boxed{\{5\}}, 7", 5),
        (r"\boxed{5 \} 6}, 7", 6),
        (r"\boxed{3} \boxed{4}, 7", 4),
        (r"\boxed{3} \boxed{x}, 7", 3),
        (r"\boxed{x}, 7", 7),
        (r"\boxed{12", 12),
        (r"} \boxed{5}, 7", 5),
        (r"\boxed{$-1{,}234.50$}, 7", -1234.5),
        ("", None),
        ("none", None),
        ("-", None),
        ("$", None),
        ("####", None),
        ("1/0", None),
        ("9" * 400, None),
        ("1e999", None),
        ("1e" + "9" * 5000, None),
        ("-0", 0),
    ],
)
def test_answers(text: str, number: float | None) -> None:
    assert extract_number(text) == (None if number is None else pytest.approx(number, rel=1e-12))


WRITTEN = {
    "plain": str,
    "thousands": lambda x: f"{x:,}",
    "dollars": lambda x: f"${x:,}" if x >= 0 else f"-${-x:,}",
    "unicode minus": lambda x: str(x).replace("-", "\u2212"),
    "percent": lambda x: f"{x}%",
    "gsm8k": lambda x: f"5 + 6 = 11\n#### {x:,}",
    "boxed": lambda x: rf"\boxed{{\text{{answer }} {x}}} (page 3)",
    "sentence": lambda x: f"First 3, then 1/2, so the answer is {x}.",
    "bold": lambda x: f"**{x}**",
}
AROUND = st.sampled_from(["", "7 apples and 8 pears: ", "on 12/05/2024, ", "= ", "GPT4 says ", "a-b, "])


@given(st.integers(-(10**15), 10**15), st.sampled_from(sorted(WRITTEN)), AROUND)
def test_a_written_integer_is_read_back(number: int, form: str, before: str) -> None:
    assert extract_number(before + WRITTEN[form](number)) == number


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(sorted(WRITTEN)), AROUND)
def test_a_written_decimal_is_read_back(number, form: str, before: str) -> None:
    assert extract_number(before + WRITTEN[form](number)) == float(number)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_is_read_back_exactly(number: float) -> None:
    assert extract_number(f"x = {number!r}") == number


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_read_back(top: int, bottom: int) -> None:
    assert extract_number(f"so {top}/{bottom}") == extract_number(rf"\frac{{{top}}}{{{bottom}}}") == top / bottom


PIECES = [
    "0",
    "1",
    "/",
    ",",
    ".",
    "-",
    "\u2212",
    "$",
    "e99",
    "{",
    "}",
    r"\boxed{",
    r"\frac{1}{0}",
    "#### ",
    "×10^9",
    "\n",
    "a",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_breaks_it(text: str) -> None:
    number = extract_number(text)
    assert number is None or math.isfinite(number)


@pytest.mark.parametrize(
    "piece", ["1,", "9", "1,234,", "(", r"\boxed{", "#### ", "1/", "e1", r"\frac{1}{", "-", "$ ", "{", "}", "a1", ".5"]
)
def test_time_grows_with_the_length_only(piece: str) -> None:
    begin = time.thread_time()
    extract_number(piece * (50_000 // len(piece)))
    assert time.thread_time() - begin < 5
