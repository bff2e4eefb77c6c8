"""The demo's tokenizer and model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.demo.corpus import make_prompts, make_stories
from lit_rlhf.demo.network import build_folder, word_tokenizer


def texts() -> list[str]:
    return [row["prompt"] + row["completion"] for row in make_stories(make_prompts(400, 0), 0)]


def test_every_story_survives_the_tokenizer() -> None:
    """A token a word, nothing unknown, and decoding gives the very text back."""
    tokenizer = word_tokenizer(texts())
    for row in make_stories(make_prompts(400, 1), 1):
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"]
        assert tokenizer.unk_token_id not in ids
        assert len(tokenizer(row["prompt"]).input_ids) == 14
    assert tokenizer.tokenize("Mia had an egg.") == ["<unk>", " had", " an", " egg", "."]


def test_the_folder_loads_and_the_seed_decides_the_weights(tmp_path: Path) -> None:
    folders = [build_folder(tmp_path / str(i), texts()[:50], seed) for i, seed in enumerate((0, 0, 1))]
    first, same, other = (AutoModelForCausalLM.from_pretrained(f).transformer.wte.weight for f in folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (len(tokenizer), 64)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token == "</s>"
