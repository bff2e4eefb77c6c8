"""Files of rows, and tokenizers with the habits that real ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows to a jsonl file and returns its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The byte tokenizer as a folder, for data modules that load it by name."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer, but it puts BOS before and EOS behind every text."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    return tokenizer


@pytest.fixture
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: a blank before every text, and tokens of a blank and a letter or digit."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789:\n"
    merges = [("a", "z"), ("\n", "z"), *(("▁", letter) for letter in "ax4")]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
