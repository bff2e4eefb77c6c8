"""Malformed rows: what stands on the third line of a file whose first two are good, and how that ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.data import PreferenceData, PromptData, SFTData

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "yes"}
TALK = [ASKED, ANSWERED]
NESTED = "[" * 100_000 + "]" * 100_000

# Kind of row → its data module and a good one.
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "text": (SFTData, {"text": "a story"}),
    "completion": (SFTData, {"prompt": "Q:", "completion": " A"}),
    "chat": (SFTData, {"messages": TALK}),
    "prompt": (PromptData, {"prompt": "Q:"}),
    "words": (PromptData, {"prompt": "Once upon a"}),
    "asked": (PromptData, {"prompt": [ASKED]}),
    "pair": (PreferenceData, {"prompt": "Q:", "chosen": " yes", "rejected": " no"}),
    "margin": (PreferenceData, {"prompt": "Q:", "chosen": " yes", "rejected": " no", "margin": 1.0}),
    "begun": (PreferenceData, {"chosen": "It is so", "rejected": "It is not"}),
    "ranked": (PreferenceData, {"prompt": "Q:", "responses": [" a", " b"]}),
    "ranks": (PreferenceData, {"prompt": "Q:", "responses": [" a", " b"], "ranks": [1, 2]}),
}


@dataclass(frozen=True)
class Row:
    """One case.

    Args:
        name: what is wrong with it.
        kind: of ``KINDS``.
        row: columns that differ from the good row's, None takes one away with ``gone``; or the line itself.
        says: what the error names beside file and line; why it is dropped; or, of a row that is right, its end.
        ends: "error", "dropped" (and counted) or "read".
        gone: columns that are not there.
        knobs: of the data module.
    """

    name: str
    kind: str
    row: dict[str, Any] | str
    says: str
    ends: str = "error"
    gone: tuple[str, ...] = ()
    knobs: dict[str, Any] = field(default_factory=dict)


def message(**fields: Any) -> list[dict[str, Any]]:
    """A conversation whose second message is this."""
    return [ASKED, {key: value for key, value in fields.items() if value != "gone"}]


TEXT = 'column "text": expected text, got '
MESSAGES = 'column "messages": expected '
ROWS = [
    Row("number as text", "text", {"text": 5}, TEXT + "int '5'"),
    Row("truth value as text", "text", {"text": True}, TEXT + "bool"),
    Row("list as text", "text", {"text": ["a"]}, TEXT + "list"),
    Row("object as text", "text", {"text": {"a": 1}}, TEXT + "dict"),
    Row("null", "text", {"text": None}, TEXT + "nothing; fill it or remove the row"),
    Row("NaN, as pandas writes a gap", "text", '{"text": NaN}', TEXT + "float 'nan'"),
    Row("infinity", "text", '{"text": -Infinity}', TEXT + "float '-inf'"),
    Row("column missing", "text", {}, TEXT + "nothing", gone=("text",)),
    Row("column misspelt", "text", {"txet": "a"}, TEXT + "nothing", gone=("text",)),
    Row("empty", "text", {"text": ""}, 'column "text": the text is empty'),
    Row("white space alone", "text", {"text": " \n\t\u3000"}, 'column "text": the text is empty'),
    Row("start token alone", "text", {"text": "<s>"}, "no token of it would be learned: the text is empty"),
    Row("lone surrogate", "text", '{"text": "a \\ud83d b"}', "column \"text\": '\\ud83d' is half a character"),
    Row("lone low surrogate", "text", '{"text": "\\uDE00"}', "half a character (a lone surrogate)"),
    Row("whole character in two halves", "text", '{"text": "\\ud83d\\ude00"}', "😀", ends="read"),
    Row("NUL in the text", "text", '{"text": "a\\u0000b"}', "a\x00b", ends="read"),
    Row("control characters", "text", '{"text": "\\u0007\\u202e\\ufeffb"}', "\x07\u202e\ufeffb", ends="read"),
    Row("too long", "text", {"text": "x" * 100_000}, "100001 tokens are more than max_length=64; raise it, or set"),
    Row("too long, cut", "text", {"text": "x" * 99}, "x" * 64, ends="read", knobs={"too_long": "truncate"}),
    Row("too long, left out", "text", {"text": "x" * 99}, "longer than", ends="dropped", knobs={"too_long": "drop"}),
    Row("key twice", "text", '{"text": "a", "text": "b"}', 'the key "text" stands twice in one object; leave one'),
    Row("key twice, inside", "chat", '{"messages": [{"role": "user", "role": "user"}]}', 'the key "role" stands twice'),
    Row("line cut short", "text", '{"text": "a sto', "Unterminated string"),
    Row("two objects on a line", "text", '{"text": "a"} {"text": "b"}', "Extra data"),
    Row("no object", "text", '"a story"', "expected a JSON object with named columns, got str"),
    Row("number alone", "text", "3", "expected a JSON object with named columns, got int"),
    Row("null alone", "text", "null", "expected a JSON object with named columns, got NoneType"),
    Row("list on a line", "text", '[{"text": "a"}]', "expected a JSON object with named columns, got list"),
    Row("Python's quotes", "text", "{'text': 'a'}", "expected one JSON object a line"),
    Row("comment", "text", "# a story", "expected one JSON object a line"),
    Row("number of 5,000 digits", "text", '{"text": ' + "9" * 5_000 + "}", "Exceeds the limit (4300 digits)"),
    Row("nested 100,000 times", "text", f'{{"text": {NESTED}}}', "recursion"),
    Row("prompt empty", "completion", {"prompt": ""}, 'column "prompt": the text is empty'),
    Row("completion empty", "completion", {"completion": " "}, 'column "completion": the text is empty'),
    Row("completion missing", "completion", {}, 'column "completion": expected text or', gone=("completion",)),
    Row("completion a number", "completion", {"completion": 4}, 'column "completion": expected text or a list of'),
    Row("text with messages behind", "completion", {"completion": [ANSWERED]}, "the prompt is text but the completion"),
    Row("messages with the user's behind", "completion", {"prompt": [ASKED], "completion": [ASKED]}, "from the assis"),
    Row("messages as a JSON string", "chat", {"messages": '[{"role": "user"}]'}, MESSAGES + "a list of messages, got"),
    Row("no messages", "chat", {"messages": []}, 'column "messages": the list of messages is empty'),
    Row("messages null", "chat", {"messages": None}, MESSAGES + "a list of messages, got nothing"),
    Row("message is text", "chat", {"messages": ["hi", "yes"]}, MESSAGES + "message 1 to be"),
    Row("message is a list", "chat", {"messages": [TALK]}, MESSAGES + "message 1 to be"),
    Row("ShareGPT's keys", "chat", {"messages": [{"from": "human", "value": "hi"}]}, 'message 1 to have a "role"'),
    Row("role null", "chat", {"messages": message(role=None, content="a")}, 'message 2 to have a "role"'),
    Row("role a number", "chat", {"messages": message(role=1, content="a")}, 'message 2 to have a "role"'),
    Row("content missing", "chat", {"messages": message(role="assistant")}, "message 2 to have text"),
    Row("content null", "chat", {"messages": message(role="assistant", content=None)}, "message 2 to have text"),
    Row("content a number", "chat", {"messages": message(role="assistant", content=7)}, "message 2 to have text"),
    Row(
        "content in parts",
        "chat",
        {"messages": message(role="assistant", content=[{"type": "text", "text": "a"}])},
        "message 2 to have text",
    ),
    Row(
        "tool call with an object as content",
        "chat",
        {"messages": message(role="assistant", content={"a": 1}, tool_calls=[])},
        "message 2 to have text",
    ),
    Row(
        "tool call that the template cannot render",
        "chat",
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}]}, ANSWERED]},
        "the chat template fails on these messages: TypeError",
        knobs={"chat_template": "{% for m in messages %}{{ 'a' + (m.tool_calls or 'b') }}{% endfor %}"},
    ),
    Row("user last", "chat", {"messages": [ANSWERED, ASKED]}, "the last message is from 'user', not from the assist"),
    Row(
        "a role of 10,000 letters",
        "chat",
        {"messages": message(role="x" * 10_000, content="4")},
        "no token of it would",
    ),
    Row("tool last", "chat", {"messages": message(role="tool", content="4")}, "the last message is from 'tool'"),
    Row("assistant alone", "chat", {"messages": [ANSWERED]}, "nothing stands before the assistant's turn"),
    Row(
        "role that the template refuses",
        "chat",
        {"messages": [{"role": "critic", "content": "a"}, ANSWERED]},
        "the chat template refuses these messages: this template knows the roles",
        knobs={"chat_template": "dialogue"},
    ),
    Row(
        "roles twice in a row, refused by the template",
        "chat",
        {"messages": [ASKED, ASKED, ANSWERED]},
        "the chat template refuses these messages: roles must alternate",
        knobs={
            "chat_template": "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
        },
    ),
    Row("no assistant", "chat", {"messages": [ASKED]}, "no token of it would be lear", knobs={"learn": "assistant"}),
    Row("prompt null", "prompt", {"prompt": None}, 'column "prompt": expected text or a list of messages, got nothing'),
    Row("prompt a float", "prompt", {"prompt": 3.5}, 'column "prompt": expected text or a list of messages, got float'),
    Row(
        "prompt an object", "prompt", {"prompt": ASKED}, 'column "prompt": expected text or a list of messages, got di'
    ),
    Row("prompt that is over", "asked", {"prompt": TALK}, "the prompt ends with the assistant, so there is nothing"),
    Row("prompt too long", "prompt", {"prompt": "x" * 99}, "99 tokens are more than max_prompt_length=64"),
    Row("prompt of too few words", "words", {"prompt": "a b"}, "of no more", "dropped", knobs={"prompt_words": 2}),
    Row(
        "field of the template missing",
        "prompt",
        {},
        'column "prompt": expected a value for prompt_template, got nothing',
        gone=("prompt",),
        knobs={"prompt_template": "Q: {prompt}"},
    ),
    Row("chosen equals rejected", "pair", {"rejected": " yes"}, "with nothing to compare", ends="dropped"),
    Row("chosen null", "pair", {"chosen": None}, 'column "chosen": expected text or a list of messages, got nothing'),
    Row("rejected missing", "pair", {}, 'column "rejected": expected text or a list of', gone=("rejected",)),
    Row(
        "rejected a number", "pair", {"rejected": 1}, 'column "rejected": expected text or a list of messages, got int'
    ),
    Row("chosen ends with the user", "pair", {"chosen": [ASKED]}, "its last message must be from the assistant"),
    Row("chosen alone fills the length", "pair", {"chosen": "x" * 99}, "102 tokens are more than max_length=64"),
    Row("no common beginning", "begun", {"rejected": "That is not"}, "chosen and rejected have no common beginning"),
    Row("text beside messages", "begun", {"chosen": TALK}, "must both be text or both be messages"),
    Row(
        "conversations that begin apart",
        "begun",
        {"chosen": TALK, "rejected": [{"role": "user", "content": "ho"}, ANSWERED]},
        "begin with different messages",
    ),
    Row("margin as text", "margin", {"margin": "1"}, 'column "margin": expected a finite number, got str'),
    Row("margin NaN", "margin", '{"prompt": "Q:", "chosen": "a", "rejected": "b", "margin": NaN}', "a finite number"),
    Row("margin beyond float32", "margin", {"margin": 1e39}, 'column "margin": expected a finite number, got float'),
    Row("margin of 400 digits", "margin", {"margin": 10**400}, 'column "margin": expected a finite number, got int'),
    Row("margin true", "margin", {"margin": True}, 'column "margin": expected a finite number, got bool'),
    Row("one response", "ranked", {"responses": [" a"]}, 'column "responses": expected a list of two or more'),
    Row("responses as text", "ranked", {"responses": "a b"}, 'column "responses": expected a list of two or more'),
    Row("a response null", "ranked", {"responses": [" a", None]}, 'column "responses[1]": expected text or a list'),
    Row("responses alike", "ranked", {"responses": [" a", " a"]}, "with nothing to compare", ends="dropped"),
    Row("too few ranks", "ranks", {"ranks": [1]}, 'column "ranks": expected 2 numbers, one a response'),
    Row("a rank as text", "ranks", {"ranks": [1, "2"]}, 'column "ranks[1]": expected a finite number'),
    Row("all ranks tied", "ranks", {"ranks": [1, 1]}, "with nothing to compare", ends="dropped"),
]
