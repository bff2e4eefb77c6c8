"""Tokens: tokenizers that can pad, the ids that end a response, and what of both a model can read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_rlhf.models.foreign import announce_code
from lit_rlhf.models.hub import hub_errors, is_path, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad, with its end token if need be: masks come from lengths and never from ids.

    Args:
        name: folder or hub id.
        trust_remote_code: run Python code that comes with it.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: it has neither a padding nor an end token, or names a chat template like a path.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if is_path(name):
        folder = Path(name).expanduser()
        if not name.strip() or not folder.is_dir():
            raise FileNotFoundError(f"no such tokenizer folder: {name or repr(name)}")
        if not any(folder.glob("token*")):
            raise FileNotFoundError(f"{name} has no tokenizer.json; name a folder that has one as tokenizer")
    with hub_errors(name, "tokenizer"), quiet():
        if trust_remote_code:
            announce_code(name, None, get_tokenizer_config(name), "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    templates = tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else ():
        if Path(template).name != template:  # an export writes each to a file of its name
            raise ValueError(f"the tokenizer of {name} names a chat template {template!r}, which is a path: refused")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name} has neither a pad token nor an eos token: give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Give the ids of all tokens that end a response: those of the model's generation config and the tokenizer's.

    Chat models name several. Empty if neither names one.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(named if isinstance(named, (list, tuple)) else [named])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(int(i) for i in ids if i is not None))
