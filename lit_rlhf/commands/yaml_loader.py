"""YAML of configs and arguments, read with care: nothing in it is run, lost or blown up."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "lit_rlhf_yaml"
DEEPEST = 50  # levels of nesting; configs have under ten
MOST = 100_000  # values, each alias counted as all that it stands for


def load_yaml(text: str, path: str = "") -> Any:
    """Read YAML as jsonargparse does, after a look at its events, which costs neither memory nor recursion.

    Tags of Python objects make nothing: jsonargparse's loader is a safe one.

    Args:
        text: of a config, or of one argument.
        path: where it stands, for the error.

    Raises:
        yaml.YAMLError: what cannot be read; a key that stands twice, of whose values one would be lost; more nesting
            or, through aliases, more values than a config can have.
    """
    try:
        _check(text)
        found = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        said = str(error).replace('"<unicode string>"', str(path) or "the argument")
        tagged = "for the tag" in said
        raise yaml.YAMLError(
            f"{said}{'; a config is plain data, and no tag makes or runs anything' * tagged}"
        ) from error
    except Exception as error:  # a date, a number or a key that YAML can write and Python cannot make
        raise yaml.YAMLError(f"{path}: {type(error).__name__}: {error}") from error
    if path and not isinstance(found, dict):
        got = "nothing" if found is None else f"{type(found).__name__} {str(found)[:40]!r}"
        raise yaml.YAMLError(f"{path}: expected keys with values (model: …, data: …, trainer: …), got {got}")
    return found


def _check(text: str) -> None:
    """Walk over the events and keep count of what is open."""
    sizes: dict[str, int] = {}  # of what an anchor names
    levels = [_Level()]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Level(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(levels) > DEEPEST:
                raise _error(f"more than {DEEPEST} levels of nesting; a config has under ten", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = levels.pop()
            if done.anchor:
                sizes[done.anchor] = done.size
            levels[-1].add(done.size)
        elif isinstance(event, yaml.AliasEvent):
            if any(level.anchor == event.anchor for level in levels):
                raise _error(f"*{event.anchor} stands within what it names, so it has no end", event)
            levels[-1].add(sizes.get(event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                sizes[event.anchor] = 1
            if levels[-1].has_key(event.value):
                raise _error(f"the key {event.value!r} stands twice; of its two values one would be lost", event)
            levels[-1].add(1)
        if levels[-1].size > MOST:
            raise _error(f"more than {MOST} values, each alias counted as all that it stands for", event)


class _Level:
    """An open list or mapping: what names it, the keys of a mapping, and how many values it has."""

    def __init__(self, anchor: str | None = None, keys: set[str] | None = None) -> None:
        self.anchor, self.keys, self.size, self.children = anchor, keys, 0, 0

    def add(self, size: int) -> None:
        """Count one child of so many values."""
        self.size, self.children = self.size + size, self.children + 1

    def has_key(self, value: str) -> bool:
        """Whether a scalar that comes now is a key that was there before; it is noted."""
        if self.keys is None or self.children % 2 or value == "<<":
            return False
        before = len(self.keys)
        self.keys.add(value)
        return len(self.keys) == before


def _error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


set_loader(MODE, load_yaml, (yaml.YAMLError,))
