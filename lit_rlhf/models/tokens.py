"""Tokens: tokenizers that can pad, the ids that end a response, and what of both a model can read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_rlhf.models.network import hub_errors, is_path, quiet
from lit_rlhf.ranges import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad, with its end token if need be: masks come from lengths and never from ids.

    Args:
        name: folder or hub id.
        trust_remote_code: run Python code that comes with it.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: it has neither a padding nor an end token.
    """
    from transformers import AutoTokenizer

    if is_path(name):
        folder = Path(name).expanduser()
        if not name.strip() or not folder.is_dir():
            raise FileNotFoundError(f"no such tokenizer folder: {name or repr(name)}")
        if not any(folder.glob("token*")):
            raise FileNotFoundError(f"{name} has no tokenizer.json; name a folder that has one as tokenizer")
    with hub_errors(name, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
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


def refuse_unreadable(model: Any, ids: Tensor, mask: Tensor) -> None:
    """Refuse a batch that would end in an index error, which on a GPU names nothing and takes the process with it.

    Args:
        model: a transformers model.
        ids: [B, L] token ids, on the CPU.
        mask: [B, L] bool, True = a real token.

    Raises:
        SettingError: a token that the model has no embedding for, or a row longer than its learned positions.
    """
    rows, largest = model.get_input_embeddings().num_embeddings, int(ids.max())
    if largest >= rows:
        raise SettingError(
            f"the data holds token {largest}, but the model has embeddings for 0 to {rows - 1} only: the tokenizer is "
            "not this model's; name the model's own, or resize the model's embeddings"
        )
    positions, longest = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        int(mask.sum(1).max()),
    )
    if positions is None or longest <= positions:
        return
    learned = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    if learned:  # rotary ones go on without an end
        raise SettingError(
            f"a row has {longest} tokens, but the model learned {positions} positions ({learned[0]}): lower the data's "
            "max_length or max_prompt_length and choose what too_long does"
        )
