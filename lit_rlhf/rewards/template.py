"""JSON as a scoring server wants it and gives it: a request with places to fill, a path to the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LISTS = {"$texts": "texts", "$prompts": "prompts", "$completions": "completions", "$messages": "messages"}
ROWS = {"$text": "texts", "$prompt": "prompts", "$completion": "completions", "$conversation": "messages"}
_PLACES = LISTS | ROWS


def fields_of(template: Any) -> set[str]:
    """Names of the fields that a template asks for.

    Raises:
        ValueError: a "$…" that is no place to fill, or one of a single response outside of a list of one entry.
    """
    if isinstance(template, str):
        if template.startswith("$") and template not in _PLACES:
            raise ValueError(f"HTTPReward: request has {template!r}; there are: {', '.join(_PLACES)}")
        return {_PLACES[template]} if template in _PLACES else set()
    if isinstance(template, Mapping):
        return set().union(*map(fields_of, template.values()))
    return set().union(*map(fields_of, template)) if isinstance(template, list) else set()


def _of_a_row(template: Any) -> bool:
    if isinstance(template, str):
        return template in ROWS
    entries = template.values() if isinstance(template, Mapping) else template if isinstance(template, list) else ()
    return any(map(_of_a_row, entries))


def fill(template: Any, fields: Mapping[str, Sequence[Any]], row: int | None = None) -> Any:
    """Put the responses into a template.

    Args:
        template: JSON values. "$texts" and the like become lists; a list of one entry that holds "$text" or the like
            is repeated for each response.
        fields: lists of one a response.
        row: fill in this response alone.

    >>> fill({"inputs": [["$text"]]}, {"texts": ["a", "b"]})
    {'inputs': [['a'], ['b']]}
    """
    if isinstance(template, str):
        if template in LISTS:
            return list(fields[LISTS[template]])
        if template in ROWS:
            if row is None:
                raise ValueError(f"HTTPReward: {template} stands for one response: put it into a list of one entry")
            return fields[ROWS[template]][row]
        return template
    if isinstance(template, Mapping):
        return {key: fill(value, fields, row) for key, value in template.items()}
    if not isinstance(template, list):
        return template
    if row is None and len(template) == 1 and _of_a_row(template):
        return [fill(template[0], fields, i) for i in range(len(next(iter(fields.values()))))]
    return [fill(entry, fields, row) for entry in template]


def numbers_at(answer: Any, path: str, rows: int) -> list[float]:
    """The finite number of each response in a server's answer.

    Args:
        answer: parsed JSON.
        path: keys and places with points between them, ``*`` = each response. Lists of one entry need no place.
        rows: how many responses were sent.

    Raises:
        ValueError: something else stands there; the message says what.

    >>> numbers_at({"data": [{"index": 1, "probs": [2.0]}, {"index": 0, "probs": [-1.0]}]}, "data.*.probs", 2)
    [-1.0, 2.0]
    """
    before, _, after = path.partition("*")
    entries = _step_down(answer, before)
    if not isinstance(entries, list):
        raise ValueError(f"there is no list of scores at {path!r}, but {_short(entries)}")
    if len(entries) != rows:
        raise ValueError(f"{len(entries)} scores for {rows} responses")
    if all(isinstance(entry, Mapping) and "index" in entry for entry in entries):
        entries = sorted(entries, key=lambda entry: str(entry["index"]).zfill(20))
        if [entry["index"] for entry in entries] != list(range(rows)):
            raise ValueError(f"the scores' index is not 0 to {rows - 1}, each once")
    return [_number(_step_down(entry, after), row) for row, entry in enumerate(entries)]


def _step_down(value: Any, keys: str) -> Any:
    for key in filter(None, keys.split(".")):
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
            continue
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"there is no {key!r} in {_short(value)}")
        value = value[key]
    return value


def _number(value: Any, row: int) -> float:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{len(value)} numbers for response {row}, but a reward model gives one")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        hint = ", which is how some servers write NaN" if value is None else ""
        raise ValueError(f"the score of response {row} is {_short(value)}{hint}, expected a finite number")
    return float(value)


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
