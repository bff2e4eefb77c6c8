"""Noise on a model's embeddings and in its residual branches, while it trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What decoder layers of transformers call their two branches.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def uniform_noise(model: Any, mask: Tensor, alpha: float, *, seed: int) -> Tensor:
    """Draw NEFTune's noise for a batch: ε·α / √(L·d) with ε ~ Uniform(−1, 1), L = the row's real tokens.

    Jain et al. 2023 (arXiv 2310.05914), Algorithm 1; d = width of the embeddings. It is drawn for the whole batch at
    once, so that neither packing nor reading in parts changes it.

    Args:
        model: what the noise is for; its embeddings' width counts.
        mask: [B, L] bool, True = a real token.
        alpha: α.
        seed: decides the draw, whatever was drawn before.

    Returns:
        [B, L, d] float32.
    """
    width = model.get_input_embeddings().weight.shape[-1]
    generator = torch.Generator(mask.device).manual_seed(seed)
    noise = torch.empty(*mask.shape, width, device=mask.device).uniform_(-1, 1, generator=generator)
    return noise * (alpha / (mask.sum(dim=1).clamp(min=1) * width).sqrt())[:, None, None]


@contextmanager
def embedding_noise(model: Any, noise: Tensor | None) -> Iterator[None]:
    """Add ``noise`` to what the embedding layer gives, as long as gradients are recorded; None adds nothing.

    A model that scales its embeddings afterwards (Gemma 2) scales the noise with them, as in the authors' code.

    Args:
        model: a transformers model.
        noise: [n, W, d] for rows of up to W tokens.
    """
    if noise is None:
        yield
        return

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a first pass may be a trial of the model
            return output
        return output + noise[:, : output.shape[1]].to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def add_residual_dropout(model: Any, probability: float) -> None:
    """Drop elements of what attention and MLP of every decoder layer add to the residual stream, in train mode.

    It acts on the output of either, hence before a norm that a model puts behind it (Gemma 2).

    Args:
        model: a transformers model.
        probability: of an element to become 0; the others are divided by 1 − probability.

    Raises:
        ValueError: the two branches cannot be told, or give back the whole stream and not what is added to it.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    layers = [layer for layer in layers if not any(type(m).__name__ in names for m in list(layer.modules())[1:])]
    pairs = [[getattr(layer, name, None) for name in ATTENTION + MLP] for layer in layers]
    branches = [[branch for branch in pair if isinstance(branch, nn.Module)] for pair in pairs]
    whole = any("residual" in inspect.signature(branch.forward).parameters for pair in branches for branch in pair)
    if not layers or whole or any(len(pair) != 2 for pair in branches):
        raise ValueError(
            f"residual_dropout: {type(model).__name__} has no branches of attention and MLP to put it on; leave it 0, "
            "and see whether network.dropout reaches a residual dropout of the model's own"
        )

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], probability, module.training), *output[1:])
        return F.dropout(output, probability, module.training)

    for pair in branches:
        for branch in pair:
            branch.register_forward_hook(drop)
