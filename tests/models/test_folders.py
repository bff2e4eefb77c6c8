"""Loading refuses in plain words, holds models as asked, and what is saved loads elsewhere with equal logits."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lit_rlhf.models import Lora, Network, load_causal, load_scalar, load_tokenizer, save_folder, save_scalar

IDS = torch.tensor([[5, 6, 7, 8, 9, 2]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def stir_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2, lambda: tiny.tiny_llama(tie_word_embeddings=True)])
def test_a_saved_model_loads_in_transformers_with_equal_logits(make, tokenizer, tmp_path):
    model = make()
    save_folder(model, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert load_tokenizer(str(tmp_path))("ab").input_ids == tokenizer("ab").input_ids


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2, lambda: tiny.tiny_llama(tie_word_embeddings=True)])
def test_merged_lora_loads_as_an_ordinary_model_and_leaves_the_trained_one_alone(make, tokenizer, tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = stir_adapters(load_causal(str(tmp_path / "base"), Network(lora=Lora(r=4))))
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert (before - logits(make())).abs().max() > 0.01
    save_folder(model, tokenizer, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=0)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_an_adapter_folder_loads_with_peft(make, tokenizer, tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = stir_adapters(load_causal(str(tmp_path / "base"), Network(lora=Lora(r=4))))
    save_folder(model, tokenizer, tmp_path / "adapters", merge=False)
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns about missing or unknown keys
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own use
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "adapters")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    keys = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)


def test_saving_and_loading_are_silent(model_folder, tokenizer, tmp_path, capfd):
    save_folder(load_causal(model_folder), tokenizer, tmp_path)
    load_scalar(str(tmp_path))
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_half_precision_files_are_held_in_float32_unless_asked(model_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_causal(str(tmp_path)).parameters()} == {torch.float32}
    half = load_causal(str(tmp_path), Network(dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_loaded_model_is_ready_to_train(model_folder):
    model = load_causal(model_folder)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_dropout_knob_reaches_every_dropout(tmp_path):
    tiny.tiny_gpt2().save_pretrained(tmp_path)  # 0.1 everywhere in its config

    def dropouts(model):
        return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}

    still, noisy = load_causal(str(tmp_path)), load_causal(str(tmp_path), Network(dropout=0.3))
    assert dropouts(still) == {0.0}
    assert (still.config.attn_pdrop, still.config.resid_pdrop, still.config.embd_pdrop) == (0.0, 0.0, 0.0)
    assert torch.equal(still(IDS).logits, still(IDS).logits)
    assert dropouts(noisy) == {0.3}
    assert not torch.equal(noisy(IDS).logits, noisy(IDS).logits)


def test_attention_dropout_reaches_llama(model_folder):
    noisy = load_causal(model_folder, Network(dropout=0.5))
    assert not torch.equal(noisy(IDS).logits, noisy(IDS).logits)


def test_attention_implementation_is_the_one_asked_for(model_folder):
    assert load_causal(model_folder, Network(attention="eager")).config._attn_implementation == "eager"
    assert load_causal(model_folder).config._attn_implementation == "sdpa"


def test_gradient_checkpointing_works_in_train_mode_and_sleeps_in_eval(model_folder):
    model = load_causal(model_folder, Network(gradient_checkpointing=True))
    runs = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    model(IDS, use_cache=False).logits.sum().backward()
    assert len(runs) == 2  # once forward, once again in backward
    runs.clear()
    model.eval()(IDS, use_cache=False).logits.sum().backward()
    assert len(runs) == 1


def test_lora_trains_only_adapters_of_the_targets_and_starts_as_the_base(model_folder):
    model = load_causal(model_folder, Network(lora=Lora(r=3, alpha=6, targets=["q_proj", "v_proj"])))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(".lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert torch.equal(logits(model), logits(load_causal(model_folder)))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 2.0


def test_lora_seed_and_dropout_count(model_folder):
    def first(**kwargs):
        return load_causal(model_folder, Network(lora=Lora(r=2)), **kwargs).model.layers[0].self_attn.q_proj

    assert torch.equal(first(seed=1).lora_A["default"].weight, first(seed=1).lora_A["default"].weight)
    assert not torch.equal(first(seed=1).lora_A["default"].weight, first(seed=2).lora_A["default"].weight)
    noisy = stir_adapters(load_causal(model_folder, Network(lora=Lora(r=2, dropout=0.5))))
    assert not torch.equal(noisy(IDS).logits, noisy(IDS).logits)


def test_adapters_of_a_half_precision_base_are_float32(model_folder):
    model = load_causal(model_folder, Network(dtype="bfloat16", lora=Lora(r=2)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_lora_refuses_what_it_cannot_do(tmp_path):
    tiny.tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Lora(r=0)
    with pytest.raises(ValueError, match="shares its weight with the embedding"):
        load_causal(str(tmp_path), Network(lora=Lora(targets=["lm_head"])))
    with pytest.raises(ValueError, match="nowhere_proj"):
        load_causal(str(tmp_path), Network(lora=Lora(targets=["nowhere_proj"])))


def test_a_tokenizer_without_padding_pads_with_its_end(tokenizer, tmp_path):
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tiny.EOS
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "neither")
    with pytest.raises(ValueError, match="neither a pad token nor an eos"):
        load_tokenizer(str(tmp_path / "neither"))


@pytest.mark.parametrize("load", [load_causal, load_scalar, load_tokenizer])
@pytest.mark.parametrize("name", ["./nothere", "/not/here", "not/here/at/all", "nobody/nothing", "nothing"])
def test_what_is_not_there_is_named_in_a_short_error(load, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    assert name in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    assert ("no such" in str(error.value)) == name.startswith((".", "/", "not/"))  # never asked of the hub


def test_folders_that_are_no_models_say_why(model_folder, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_causal(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    shutil.copy(Path(model_folder) / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        load_causal(str(tmp_path))
    torch.save(tiny.tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as \.bin"):
        load_causal(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is the download complete"):
        load_causal(str(tmp_path))
    save_folder(load_causal(model_folder, Network(lora=Lora(r=2))), tokenizer, tmp_path / "a", merge=False)
    with pytest.raises(ValueError, match="only adapters"):
        load_causal(str(tmp_path / "a"))


def test_a_reward_model_is_no_language_model(model_folder, tokenizer, tmp_path):
    save_scalar(load_scalar(model_folder), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_causal(str(tmp_path))


def test_code_in_a_model_folder_runs_only_when_asked(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal(str(tmp_path))
    assert type(load_causal(str(tmp_path), Network(trust_remote_code=True))).__name__ == "Own"
    config["model_type"] = "llama"  # a known kind with code beside it: the code is left alone
    del config["auto_map"]["AutoConfig"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_causal(str(tmp_path))).__name__ == "LlamaForCausalLM"
