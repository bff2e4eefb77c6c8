"""Small decoders of many families, and rollouts with them."""

from __future__ import annotations

import tiny
import torch
import transformers

from lit_rlhf.batch import Prompts
from lit_rlhf.rollout import DecodeSampler, Sampling

SHAPE = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
FAMILIES = {
    "llama": ("Llama", {}),
    "smollm, head tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {"sliding_window": 6}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def family(name: str, seed: int = 0):
    """A two-layer model of a family, with opinions, so that a wrong mask or position shows."""
    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompts(lengths, copies: int = 1, seed: int = 0) -> Prompts:
    """Random prompts of the given lengths, each ``copies`` times."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(3, 259, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return Prompts(ids.where(mask, 0), mask, tuple(f"p{i}" for i in range(len(lengths)))).repeat(copies)


def sample(policy, batch: Prompts, sampler=None, seed: int = 3, **settings):
    """A rollout of up to 24 tokens, which many tokens end."""
    settings = Sampling(**{"max_new_tokens": 24, "stop_ids": tuple(range(3, 20)), **settings})
    return (sampler or DecodeSampler())(policy, tiny.tiny_tokenizer(), batch, settings, seed=seed)


def rows_of(rollout) -> list[list[int]]:
    """Ids of each response, without padding."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
