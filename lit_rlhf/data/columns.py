"""What a row must hold: each check names its column, what was expected, what stands there, and what to do."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_rlhf.data.chat import Prompt
from lit_rlhf.data.files import DataError
from lit_rlhf.data.sources import nearest
from lit_rlhf.data.templates import Message

LARGEST = 3.4028234663852886e38  # of float32, in which margins are held
FIX = "fill it or remove the row"


def text_of(row: dict[str, Any], column: str, *, empty: bool = False) -> str:
    """The text in ``column``; blank text is an error unless ``empty``."""
    value = row.get(column)
    if not isinstance(value, str):
        raise _wrong(column, "text", value)
    if not empty and not value.strip():
        raise DataError(f'column "{column}": the text is empty; {FIX}')
    return value


def messages_of(row: dict[str, Any], column: str) -> list[Message]:
    """The messages in ``column``, each with a role and content (or tool calls); fields that are None are left out."""
    value = row.get(column)
    if not isinstance(value, (list, tuple)):
        raise _wrong(column, "a list of messages", value)
    if not value:
        raise DataError(f'column "{column}": the list of messages is empty; {FIX}')
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _wrong(column, f'message {number} to be {{"role": …, "content": …}}', message)
        message = {key: field for key, field in message.items() if field is not None}
        if not isinstance(message.get("role"), str):
            raise _wrong(column, f'message {number} to have a "role" (user, assistant, system …)', message)
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and "tool_calls" in message):
            raise _wrong(column, f'message {number} to have text as its "content"', message)
        messages.append(message)
    return messages


def either_of(row: dict[str, Any], column: str, *, empty: bool = False) -> Prompt:
    """Text or messages, whichever stands in ``column``."""
    if isinstance(row.get(column), str):
        return text_of(row, column, empty=empty)
    if isinstance(row.get(column), (list, tuple)):
        return messages_of(row, column)
    raise _wrong(column, "text or a list of messages", row.get(column))


def completion_of(row: dict[str, Any], column: str, *, empty: bool = False) -> Prompt:
    """A completion: text, or messages that end with the assistant."""
    value = either_of(row, column, empty=empty)
    if isinstance(value, list) and value[-1]["role"] != "assistant":
        raise DataError(f'column "{column}": its last message must be from the assistant, not {value[-1]["role"]!r}')
    return value


def number_of(row: dict[str, Any], column: str) -> float:
    """The finite number in ``column``."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise _wrong(column, "a finite number", value)
    return float(value)


@dataclass(frozen=True)
class PromptMaker:
    """How a row becomes a prompt: one column, or a text with ``{column}`` fields, as text or as a chat."""

    column: str
    template: str | None
    chat: bool
    system: str | None

    def columns(self) -> list[str]:
        """The columns it reads."""
        return [self.column] if self.template is None else template_fields(self.template)

    def __call__(self, row: dict[str, Any]) -> Prompt:
        """Make the prompt of one row."""
        if self.template is None:
            prompt = either_of(row, self.column)
        else:
            missing = [field for field in self.columns() if row.get(field) is None]
            if missing:
                raise _wrong(missing[0], "a value for prompt_template", None)
            prompt = self.template.format_map(row)
        return self.dress(prompt)

    def dress(self, prompt: Prompt) -> Prompt:
        """Put text into chat form where that is asked for, and the system message in front."""
        if isinstance(prompt, str) and not self.chat and self.system is None:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = self.with_system(messages)
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f'column "{self.column}": the prompt ends with the assistant, so there is nothing to answer'
            )
        return messages

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The system message in front, unless there is one already."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def template_fields(text: str) -> list[str]:
    """The columns that a prompt template names; only plain names are allowed, so nothing of a row is reached into."""
    try:
        fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(f"prompt_template: {error}; write {{{{ and }}}} for braces") from None
    for name, spec in fields:
        if not name.isidentifier() or spec:
            raise DataError(f"prompt_template: expected {{column}} with a column's name, got {{{name}}}")
    return list(dict.fromkeys(name for name, _ in fields))


def first_kind(kinds: Mapping[str, Iterable[str]], columns: Iterable[str], source: str) -> str:
    """The first kind of row whose columns are all there; an error that names the nearest columns if none is."""
    columns = list(columns)
    for kind, needed in kinds.items():
        if all(column in columns for column in needed):
            return kind
    wanted = "; or ".join(", ".join(needed) for needed in kinds.values())
    missing = [column for needed in kinds.values() for column in needed if column not in columns]
    raise DataError(f"{source} has none of the columns looked for ({wanted}){nearest(missing, columns)}")


def _wrong(column: str, expected: str, value: Any) -> DataError:
    got = "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
    return DataError(f'column "{column}": expected {expected}, got {got}; {FIX}')
