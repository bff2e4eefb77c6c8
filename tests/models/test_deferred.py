"""Networks built without weights: shapes only, until each weight is read from its file."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.models import Lora, Network, fill, load_causal, load_scalar, without_weights

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])
NETWORKS = {
    "whole": Network(),
    "lora": Network(lora=Lora(r=2)),
    "bfloat16": Network(dtype="bfloat16"),
    "embedding adapters": Network(lora=Lora(r=2, targets=["embed_tokens", "q_proj"])),
}


def same(one, other) -> None:
    """Weights, buffers, what is trained, and logits, to the last bit."""
    here, there = dict(one.named_parameters()), dict(other.named_parameters())
    assert here.keys() == there.keys()
    for name, weight in here.items():
        assert torch.equal(weight, there[name]), name
        assert (weight.dtype, weight.requires_grad) == (there[name].dtype, there[name].requires_grad), name
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name
    assert one.training == other.training
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("load", [load_causal, load_scalar])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_later_is_what_is_read_at_once(load, kind, tied, tmp_path):
    tiny.tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    with without_weights():
        later = load(str(tmp_path), NETWORKS[kind], seed=4)
    assert all(weight.is_meta for weight in later.parameters())
    copied = copy.deepcopy(later)  # as the reference is one of the policy
    for model in (later, copied):
        fill(model, CPU)
        same(model, load(str(tmp_path), NETWORKS[kind], seed=4))


def test_files_without_the_base_models_prefix(tmp_path):
    """GPT-2's own files name h.0.attn.c_attn, the network transformer.h.0.attn.c_attn."""
    tiny.tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with without_weights():
        later = load_causal(str(tmp_path))
    assert next(later.parameters()).is_meta
    fill(later, CPU)
    same(later, load_causal(str(tmp_path)))


def test_stop_ids_of_a_chat_model_are_kept(tmp_path):
    model = tiny.tiny_llama()
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path)
    with without_weights():
        assert load_causal(str(tmp_path)).generation_config.eos_token_id == [2, 9]


def test_other_names_are_loaded_at_once_and_it_is_said(tmp_path):
    tiny.tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.other"] = weights.pop("lm_head.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with (
        without_weights(),
        pytest.warns(UserWarning, match=r"loaded whole by every process.*for instance for lm_head.weight"),
        pytest.raises(ValueError, match="lacks weights"),
    ):
        load_causal(str(tmp_path))


def test_outside_nothing_is_deferred(model_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_weights():
            pass
        model = load_causal(model_folder)
    before = copy.deepcopy(model.state_dict())
    fill(model, CPU)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
