"""Settings that the user must change: their error, and the check of those that are numbers."""

from __future__ import annotations

import math
from typing import Any


class SettingError(ValueError):
    """A setting is wrong, by itself or beside others; says which, and what to set."""


MOST_SEED = 2**32 - 1  # as PyTorch Lightning and NumPy have it


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    null: bool = False,
) -> None:
    """Refuse what is no finite number or lies out of a knob's range.

    Args:
        name: of the knob, as a config has it.
        value: what was given.
        least: the smallest that is allowed.
        above: it must be larger than this.
        most: the largest that is allowed.
        below: it must be smaller than this.
        whole: it must be an integer.
        null: None is allowed, too.

    Raises:
        SettingError: names the knob, its value and the range.

    >>> check_number("optim.lr", -1.0, least=0)
    Traceback (most recent call last):
    ...
    lit_rlhf.ranges.SettingError: optim.lr is -1.0: expected a number, 0 or more
    """
    if value is None and null:
        return
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    wrong = not is_number or not math.isfinite(value)
    wrong = wrong or (least is not None and value < least) or (above is not None and value <= above)
    if wrong or (most is not None and value > most) or (below is not None and value >= below):
        bounds = {"{} or more": least, "above {}": above, "at most {}": most, "below {}": below}
        text = " and ".join(words.format(bound) for words, bound in bounds.items() if bound is not None)
        kind = f"a {'whole ' if whole else 'finite ' if not text else ''}number"
        more = f"{', ' if text else ''}{text}{' (or null)' if null else ''}"
        raise SettingError(f"{name} is {value!r}: expected {kind}{more}")


def check_seed(name: str, value: Any) -> None:
    """Refuse what is no seed: a whole number from 0 to 2³² − 1.

    Raises:
        SettingError: names the knob and its value.
    """
    check_number(name, value, least=0, most=MOST_SEED, whole=True)
