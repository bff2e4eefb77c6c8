"""Networks built without weights: shapes only, until each weight is read from its file."""

from __future__ import annotations

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.models import Lora, Network, fill, load_causal, load_scalar, without_weights
from lit_rlhf.models.deferred import _why_not

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


def test_weights_are_read_once(model_folder):
    """Not before each validation, over what was learned."""
    with without_weights():
        later = load_causal(model_folder)
    fill(later, CPU)
    with torch.no_grad():
        later.lm_head.weight.fill_(2)
    fill(later, CPU)
    assert (later.lm_head.weight == 2).all()


def test_a_weight_of_another_shape_is_refused_by_name(tmp_path):
    tiny.tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(3, 4)}, path, metadata={"format": "pt"})
    with (
        without_weights(),
        pytest.warns(UserWarning, match="loaded whole by every process"),
        pytest.raises(ValueError, match=r"^the weights of .* do not fit its config.json: lm_head.weight is \[3, 4\]"),
    ):
        load_causal(str(tmp_path))


def test_quantised_weights_are_left_to_transformers():
    model = SimpleNamespace(config=SimpleNamespace(quantization_config={"bits": 4}))
    assert _why_not(model, set(), torch.float32) == "it is quantised"


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


def test_a_buffer_that_the_files_hold_is_read(tmp_path, monkeypatch):
    """As the bias of an expert's router, which is learned though it is no parameter."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    build = LlamaRMSNorm.__init__

    def with_buffer(norm, *sizes, **settings) -> None:
        build(norm, *sizes, **settings)
        norm.register_buffer("shift", torch.zeros(3))

    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_buffer)
    model = tiny.tiny_llama()
    model.model.norm.shift += torch.tensor([1.0, 2.0, 3.0])
    model.save_pretrained(tmp_path)
    with without_weights():
        later = load_causal(str(tmp_path))
    fill(later, CPU)
    assert later.model.norm.shift.tolist() == [1, 2, 3]
    same(later, load_causal(str(tmp_path)))


def test_files_that_the_index_names_are_read_and_no_others(tmp_path):
    model = tiny.tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    save_file(
        {key: torch.zeros_like(value) for key, value in model.state_dict().items()}, tmp_path / "other.safetensors"
    )
    with without_weights():
        later = load_causal(str(tmp_path))
    fill(later, CPU)
    same(later, load_causal(str(tmp_path)))


@pytest.mark.parametrize(
    ("which", "dtype", "at_once"),
    [("_strict", "bfloat16", True), ("_strict", "float32", False), ("", "float16", True), ("", "bfloat16", False)],
)
def test_a_part_that_stays_in_float32_is_loaded_at_once(which, dtype, at_once, tmp_path, monkeypatch):
    from transformers import LlamaPreTrainedModel

    tiny.tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaPreTrainedModel, f"_keep_in_fp32_modules{which}", ["norm"])
    said = pytest.warns(UserWarning, match="stays in float32") if at_once else contextlib.nullcontext()
    with said, without_weights():
        later = load_causal(str(tmp_path), Network(dtype=dtype))
    fill(later, CPU)
    for name, weight in load_causal(str(tmp_path), Network(dtype=dtype)).named_parameters():
        assert weight.dtype == later.get_parameter(name).dtype, name
        assert torch.equal(weight, later.get_parameter(name)), name


def test_outside_nothing_is_deferred(model_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_weights():
            pass
        model = load_causal(model_folder)
    before = copy.deepcopy(model.state_dict())
    fill(model, CPU)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
