"""Parsers that say in a few lines what is wrong with the arguments, and which key may have been meant.

jsonargparse explains a wrong key by the whole tree of types it tried, often fifty lines. The problem stands at the
leaves of that tree, the place of the problem in the branches above them; only these are shown.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser

from lit_rlhf.commands.configs import config_folder
from lit_rlhf.commands.yaml_loader import MODE

BRANCH = re.compile(r'Parser key "(?P<key>[^"]+)":')
CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)'|class_path='(?P<inner>[\w.]+)'")
NO_OPTION = re.compile(
    r"(?:Option '|(?:Group '(?P<group>[\w.]+)' )?does not accept option '|"
    r"unrecognized arguments?: (?:--)?|does not accept nested key ')"
    r"(?P<key>[\w.+-]+?)(?:'|=|\s|$)"
)
NOT_SAID = re.compile(
    r"Does not validate|Subtypes:|Errors:$|Given value|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subclass types expect one of|a class path \(str\)|a dict with"
)

CONFIG_HINT = (
    "  name a config, for instance --config sft.yaml; lit-rlhf configs lists those that come with the package\n"
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One leaf of jsonargparse's explanation.

    Args:
        key: where, in dots.
        owner: import path of the class whose arguments were being read; empty at the top.
        text: what is wrong.
        value: what was given, if the explanation says so.
    """

    key: str
    owner: str
    text: str
    value: str


def problems(message: str) -> list[Problem]:
    """Find the leaves of jsonargparse's explanation, in order, each with its place."""
    found: list[Problem] = []
    branches: list[tuple[int, str, str]] = []  # (indent, key, class)
    for line in filter(str.strip, message.splitlines()):
        bare = line.strip().removeprefix("- ").strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith("Given value:"):
            given = bare.removeprefix("Given value:").strip()
            found = [p if p.value else dataclasses.replace(p, value=given) for p in found]
        branches = [branch for branch in branches if branch[0] < indent]
        branch, owner = BRANCH.match(bare), CLASS.match(bare)
        if branch or owner:
            branches.append((indent, branch["key"] if branch else "", (owner["path"] or "") if owner else ""))
            bare = bare[branch.end() :].strip() if branch else ""
        if bare and not NOT_SAID.match(bare):
            inner = CLASS.search(bare)
            classes = [name for _, _, name in branches if name] + ([inner["inner"] or ""] if inner else [])
            text, _, value = bare.partition(" Got value: ")
            key = ".".join(key for _, key, _ in branches if key)
            found.append(Problem(key, classes[-1] if classes else "", text, value))
    return found


def options(owner: str, parts: list[str]) -> list[str]:
    """Names of the arguments of a class, or of a settings group among them.

    Args:
        owner: import path of the class.
        parts: names of the arguments that lead to the group.
    """
    module, _, name = owner.rpartition(".")
    kind: typing.Any = getattr(importlib.import_module(module), name)
    for part in parts:
        hint = typing.get_type_hints(kind.__init__).get(part)
        kinds = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if not kinds:
            return []
        kind = kinds[0]
    return [name for name in inspect.signature(kind).parameters if name != "self"]


def check_groups(section: str, owner: str, values: typing.Mapping[str, typing.Any]) -> None:
    """Refuse a list, text or number where a class has a group of settings; jsonargparse lets a list through.

    Args:
        section: where the class is configured, for the error.
        owner: import path of the class.
        values: its arguments, as they were parsed.

    Raises:
        ValueError: names the argument, what it got and the group's keys.
    """
    for name, value in values.items():
        known = options(owner, [name])
        if known and isinstance(value, (list, tuple, str, int, float)):
            raise ValueError(
                f"{section}.{name}: expected keys with values ({', '.join(known)}), got {str(value)[:40]!r}"
            )


def nearest(key: str, known: list[str]) -> str:
    """Words that name what may have been meant; empty if nothing is near."""
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.55)
    return f"  did you mean {' or '.join(close)}?\n" if close else ""


def _plain(text: str) -> str:
    """Jsonargparse's words for a type, in shorter ones."""
    text = re.sub(
        r"Type collections\.abc\.Callable\S* (?:typing\.Any\] )?expects a function or a callable class: ", "", text
    )
    text = re.sub(r"Expected a <class '(?:\w+\.)*(\w+)'>", r"expected \1", text)
    text = re.sub(r"'(\w+)' object has no attribute '\w+'", r"expected keys with values, got a \1", text)
    text = re.sub(r"Not a valid subclass of (\w+)", r"expected class_path (a \1) and init_args", text)
    text = re.sub(
        r"argument of type '(\w+)' is not .+", r"expected a dotted path as class_path, got a value of type \1", text
    )
    text = re.sub(r"Expected a (?:typing\.)?Literal\[(.+?)\]", r"expected one of \1", text)
    return text.rstrip(". ")


class FriendlyParser(ArgumentParser):
    """jsonargparse's parser with short errors: the key, what is wrong with it, the nearest right one; exit code 2."""

    def __init__(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        super().__init__(*args, **{"parser_mode": MODE, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain what is wrong, and exit."""
        inner = not self.exit_on_error  # a parser inside another one: only the outermost speaks
        if inner or os.environ.get("JSONARGPARSE_DEBUG") == "true":
            super().error(message, ex)
        readable = "Problems parsing config" not in message  # the YAML reader's own words have line and column
        lines = dict.fromkeys(self._explain(problem) for problem in problems(message)) if readable else ()
        sys.stderr.write("".join(lines) or f"error: {message}\n")
        self.exit(2)

    def _explain(self, problem: Problem) -> str:
        key, text = problem.key, _plain(problem.text)
        if wrong := NO_OPTION.search(text):
            return self._unknown(problem, ".".join(filter(None, (wrong["group"], wrong["key"]))))
        if missing := re.match(r"the following arguments are required: (.+)", text):
            names = [re.sub(r"^(fit|validate|test|predict)\.", "", name.strip()) for name in missing[1].split(",")]
            given = ", ".join(f"{problem.key}.{name}" if problem.key else name for name in names)
            return f"error: not given: {given}\n" + (CONFIG_HINT if {"model", "data"} & {*names} else "")
        if problem.key == "config" and (name := re.search(r"does not exist: '(.+)'", text)):
            shipped = [path.name for path in config_folder().glob("*.yaml")]
            return f"error: no config {name[1]}\n{nearest(Path(name[1]).name, shipped)}{CONFIG_HINT}"
        if unknown := re.search(r"module '([\w.]+)' has no attribute '(\w+)'|dot import path string: (\w+)", text):
            module, wanted = importlib.import_module(unknown[1] or "lit_rlhf"), unknown[2] or unknown[3]
            return f"error: {key or 'arguments'}: {module.__name__} has no {wanted}\n{nearest(wanted, dir(module))}"
        value = f", got {problem.value[:100]}" if problem.value and text.startswith("expected") else ""
        return f"error: {f'{key}: ' if key else ''}{text}{value}\n"

    def _unknown(self, problem: Problem, key: str) -> str:
        *groups, last = key.split(".")
        place = f"{problem.key}.{key}" if problem.key else key
        if problem.owner:
            known = options(problem.owner, groups)
            name = ".".join([problem.owner, *groups])
            return f"error: {place} is no option of {name}\n{nearest(last, known)}  it has: {', '.join(known)}\n"
        known = sorted(set(self._keys()))
        sections = sorted({one.split(".")[0] for one in known})
        hint = nearest(key, known) if key.split(".")[0] in sections else nearest(key.split(".")[0], sections)
        return f"error: {place} is no option of {self.prog.removesuffix(' [options]')}\n{hint}"

    def _keys(self) -> Iterator[str]:
        """Every key of this parser and its sub-commands."""
        yield from (action.dest for action in self._actions)
        commands = getattr(self, "_subcommands_action", None)
        for parser in set((commands.choices or {}).values()) if commands else ():
            yield from parser._keys()
