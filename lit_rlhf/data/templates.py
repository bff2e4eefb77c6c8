"""What a chat template makes of messages, and where in its text the assistant speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_rlhf.data.files import DataError

Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end) of a rendered conversation

# The turns of Bai et al. 2022 (HH-RLHF) as plain text, for models that were not made for chat.
DIALOGUE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_MARK = "@@lit-rlhf-turn-{}@@"


def set_template(tokenizer: Any, chat_template: str | None) -> None:
    """Make ``chat_template`` (Jinja text, a file that holds it, or "dialogue") the tokenizer's own, if one is given.

    The tokenizer is saved with the model, so whoever loads the model later renders its prompts the same way.
    """
    if chat_template is None:
        return
    if chat_template == "dialogue":
        tokenizer.chat_template = DIALOGUE_TEMPLATE
    elif "{" in chat_template:
        tokenizer.chat_template = chat_template
    elif Path(chat_template).expanduser().is_file():
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template: {chat_template} cannot be read as text: {error}") from None
    else:
        raise DataError(f'chat_template: expected "dialogue", Jinja text or an existing file, got {chat_template!r}')
    _check_syntax(tokenizer)


def _check_syntax(tokenizer: Any) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise DataError(f"chat_template, line {error.lineno}: {error.message}; expected a Jinja template") from None
    except Exception:  # it is asked again with the rows' own messages
        return


def template(tokenizer: Any) -> str:
    """The chat template in use, as text."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, and messages need one: set chat_template (a Jinja file or text, or "
            '"dialogue" for plain Human/Assistant turns)'
        )
    return str(tokenizer.get_chat_template())


def render(tokenizer: Any, messages: list[Message], *, generation: bool = False) -> str:
    """Render messages as text; ``generation`` adds what opens the assistant's turn."""
    from jinja2 import TemplateError

    template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program, and not ours
        raise ValueError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}; mend it or them"
        ) from error


def split_render(tokenizer: Any, prompt: list[Message], turns: list[Message]) -> tuple[str, str]:
    """The rendered prompt and the rendered rest; joined they are the rendered whole."""
    whole = render(tokenizer, [*prompt, *turns])
    before = render(tokenizer, prompt, generation=True)
    if whole.startswith(before):
        return before, whole[len(before) :]
    if len(turns) > 1:
        raise ValueError("the chat template rewrites the prompt once an answer follows: give completions of one turn")
    start = _marked_spans(tokenizer, [*prompt, *turns], whole)[-1][0]
    return whole[:start], whole[start:]


def assistant_spans(tokenizer: Any, messages: list[Message], text: str) -> list[Span]:
    """Where the assistant's turns, their EOS included, stand in the rendered conversation ``text``."""
    spans = _prefix_spans(tokenizer, messages, text)
    return _marked_spans(tokenizer, messages, text) if spans is None else spans


def _prefix_spans(tokenizer: Any, messages: list[Message], text: str) -> list[Span] | None:
    """Where the assistant's turns stand in ``text``, from the renderings of its beginnings.

    None if one of those is no beginning of ``text``, as with templates that treat the last turn in a way of its own.
    """
    spans, eos = [], tokenizer.eos_token
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = render(tokenizer, messages[:i], generation=True)
            upto = render(tokenizer, messages[: i + 1])
        except ValueError:
            return None
        if not (text.startswith(before) and text.startswith(upto) and len(upto) > len(before)):
            return None
        turn = upto[len(before) :]
        end = turn.rfind(eos) + len(eos) if eos and eos in turn else len(turn)
        spans.append((len(before), len(before) + end))
    return spans


def _marked_spans(tokenizer: Any, messages: list[Message], text: str) -> list[Span]:
    """Where the assistant's words stand in ``text``, from a rendering with marks in their place."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [{**message, "content": _MARK.format(i)} if i in turns else message for i, message in enumerate(messages)]
    rest, spans, at, eos = render(tokenizer, marked), [], 0, tokenizer.eos_token or ""
    for i in turns:
        between, _, rest = rest.partition(_MARK.format(i))
        content = messages[i].get("content") or ""
        at += len(between)
        content = content if text.startswith(content, at) else content.strip()
        if not text.startswith(between, at - len(between)) or not text.startswith(content, at):
            break
        end = at + len(content)
        spans.append((at, end + len(eos) if text.startswith(eos, end) else end))
        at = end
    if len(spans) < len(turns) or text[at:] != rest:
        raise ValueError(
            "the chat template changes the assistant's words, so which tokens are theirs cannot be told: put "
            "{% generation %} … {% endgeneration %} around them in the template, or give another chat_template"
        )
    return spans
