"""From messages and text to tokens and loss masks.

What is learned must look as it will when the model is asked: the tokens of a prompt here are the very tokens that the
prompt gives alone, a rendered template is never given a second BOS, and an example ends with a learned EOS.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from lit_rlhf.data.files import DataError
from lit_rlhf.data.templates import Message, assistant_spans, render, split_render, template

Prompt = str | list[Message]
Learn = Literal["completion", "assistant", "all"]


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a hub id or folder."""
    from transformers import AutoTokenizer

    if not Path(name).expanduser().is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise DataError(f"tokenizer: the folder {name} does not exist (seen from {Path.cwd()})")
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # whatever the hub, transformers and tokenizers raise: say it in one line
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"tokenizer: {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error


def find_tokenizer(name: str | None, trainer: Any) -> Any:
    """The tokenizer called ``name``, or else the one of the module that ``trainer`` runs; it must fit that module."""
    theirs = getattr(getattr(trainer, "lightning_module", None), "tokenizer", None)
    if name is None and theirs is None:
        raise DataError("no tokenizer: set the data module's tokenizer, or use it with a module that has .tokenizer")
    if name is None:
        return theirs
    tokenizer = load_tokenizer(name)
    if theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
        raise DataError(f"the tokenizer {name} has other tokens than the model's own; leave the data's tokenizer out")
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The id to pad with; which one matters to nobody, since masks come from lengths."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text with the special tokens that the tokenizer itself puts before text, and none after it.

    A text that already begins with the BOS token gets no second one.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = _ids(tokenizer, text, specials=not (bos and text.startswith(bos)))
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids.pop()
    return ids


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokenise what a model is to continue: text as it stands, messages up to where the assistant begins."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _ids(tokenizer, render(tokenizer, prompt, generation=True))


def encode_completion(tokenizer: Any, prompt: Prompt, completion: Prompt) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and what follows it.

    The text is tokenised in one piece where that leaves the prompt's tokens as they are alone, else in two: the border
    stands where it does when a model continues the prompt.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: text or messages.
        completion: text, or messages if the prompt is messages.

    Returns:
        (token ids of the prompt, token ids of the completion, which end with EOS).
    """
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError("the prompt is text but the completion is messages: both text, or the prompt messages too")
        head, tail = encode_text(tokenizer, prompt), completion
        whole = encode_text(tokenizer, prompt + completion)
    else:
        before, tail = split_render(tokenizer, prompt, as_turns(completion))
        head, whole = _ids(tokenizer, before), _ids(tokenizer, before + tail)
    rest = whole[len(head) :] if whole[: len(head)] == head else _continuation(tokenizer, tail)
    return head, _ended(tokenizer, rest)


def encode_conversation(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation and mark every token that an assistant wrote, the end of its turns included."""
    if not tokenizer.is_fast:
        raise ValueError('learn="assistant" and "all" need a fast tokenizer (one with character offsets)')
    if re.search(r"\{%-?\s*generation\b", template(tokenizer)):
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learned = list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
    else:
        text = render(tokenizer, messages)
        spans = assistant_spans(tokenizer, messages, text)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded.input_ids)
        learned = [any(a <= start < b for a, b in spans) for start, _ in encoded.offset_mapping]
    for i in range(1, len(ids)):  # the end of a turn is part of it
        learned[i] = learned[i] or (ids[i] == tokenizer.eos_token_id and learned[i - 1])
    if messages[-1]["role"] == "assistant":
        ids = _ended(tokenizer, ids)
        learned = [*learned, any(learned)][: len(ids)]
    return ids, learned


def encode_example(
    tokenizer: Any,
    *,
    text: str | None = None,
    messages: list[Message] | None = None,
    prompt: Prompt | None = None,
    completion: Prompt | None = None,
    learn: Learn = "completion",
) -> tuple[list[int], list[bool]]:
    """Tokenise one example to imitate: ``text``, ``messages``, or ``prompt`` and ``completion``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: plain text; all of it is learned.
        messages: a conversation.
        prompt: what comes before ``completion``.
        completion: what is to be learned.
        learn: "completion" = the last turn, "assistant" = every assistant turn, "all" = every token.

    Returns:
        (token ids, True where a token is learned). The first token follows nothing, so it is never learned.

    Raises:
        ValueError: nothing would be learned, and why.
    """
    if text is not None:
        ids = _ended(tokenizer, encode_text(tokenizer, text))
        learned = [text.strip() not in ("", tokenizer.bos_token)] * len(ids)
        why = "the text is empty"
    elif learn == "completion" or isinstance(prompt, str):
        before, turns = _last_turn(messages) if messages is not None else (prompt or "", completion or "")
        head, tail = encode_completion(tokenizer, before, turns)
        ids, learned, why = head + tail, [False] * len(head) + [True] * len(tail), "the completion is empty"
    else:
        ids, learned = encode_conversation(tokenizer, messages or [*(prompt or []), *as_turns(completion or "")])
        why = "no message has the role assistant, or the template's {% generation %} markers enclose none of its text"
    if learn == "all":
        learned = [True] * len(ids)
    learned[:1] = [False]
    if not any(learned):
        raise ValueError(f"no token of it would be learned: {why}")
    return ids, learned


def keep_end(tokenizer: Any, ids: list[int], length: int) -> list[int]:
    """The last ``length`` tokens of a prompt; a BOS at its start stays in its place."""
    if len(ids) <= length:
        return ids
    if ids[0] == tokenizer.bos_token_id and length > 1:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text, for people: messages become ``role: content`` lines."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in prompt)


def as_turns(completion: Prompt) -> list[Message]:
    """A completion as messages: text becomes one assistant turn."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _ids(tokenizer: Any, text: str, *, specials: bool = False) -> list[int]:
    """Tokens of a text; without ``specials`` no BOS is put before it (rendered text has its own)."""
    return list(tokenizer(text, add_special_tokens=specials, verbose=False).input_ids)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids up to their last EOS if only white space follows it, else with an EOS put behind them."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so a model could not learn where to stop: set its eos_token")
    if eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        if end == len(ids) or not tokenizer.decode(ids[end:]).strip():
            return ids[:end]
    return [*ids, eos]


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of text that stands behind other text; some tokenizers put a space before what they take for a start."""
    for anchor in ("\n", "a"):
        head, whole = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _ids(tokenizer, text)


def _last_turn(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    if messages[-1]["role"] != "assistant":
        who = messages[-1]["role"]
        raise ValueError(f"no token of it would be learned: the last message is from {who!r}, not from the assistant")
    if len(messages) == 1:
        raise ValueError("nothing stands before the assistant's turn; it needs a prompt")
    return messages[:-1], messages[-1:]
