"""Build the demo's tokenizer and its untrained language model from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, a token each with the space before it, so that decoding is exact.

    A vocabulary of two hundred words costs a fifth of what bytes and their merges would, and a copied name is one
    token. Words never seen become ``<unk>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = pre_tokenizers.Split(Regex(r" ?\w+|\W"), behavior="isolated")
    count = Counter(piece for text in texts for piece, _ in pieces.pre_tokenize_str(text))
    words = sorted(count, key=lambda word: (-count[word], word))
    vocab = {word: i for i, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def build_folder(folder: Path, texts: Iterable[str], seed: int, *, hidden: int = 64, layers: int = 2) -> str:
    """Save a word tokenizer made from texts and a small random GPT-2 as a Hugging Face folder.

    Positions are learned (GPT-2) and not rotary: the prompts name hero and things at fixed places, which such a model
    learns to look up in a third of the time.

    Args:
        folder: Where model and tokenizer go.
        texts: Where the vocabulary comes from.
        seed: Of the model's weights.
        hidden: Width of the model; heads are 16 wide.
        layers: Depth of the model.

    Returns:
        The folder, as text, for a stage's ``model`` argument.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = word_tokenizer(texts)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=hidden,
        n_inner=2 * hidden,
        n_layer=layers,
        n_head=hidden // 16,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
