"""Model folders with something wrong in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Folder:
    """One case.

    Args:
        name: what is wrong.
        spoil: does it to a good folder.
        says: what the error names beside the folder.
        loads: "policy", "tokenizer" or "reward": what refuses it.
        knobs: of ``Network``.
    """

    name: str
    spoil: Callable[[Path], object]
    says: str
    loads: str = "policy"
    knobs: dict[str, Any] | None = None


def edit(file: str, **keys: Any) -> Callable[[Path], object]:
    """Other values of some keys of a JSON file; "gone" takes one away."""

    def spoil(folder: Path) -> None:
        values = {**json.loads((folder / file).read_text(encoding="utf-8")), **keys}
        kept = {key: value for key, value in values.items() if value != "gone"}
        (folder / file).write_text(json.dumps(kept), encoding="utf-8")

    return spoil


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, share: float = 0.5) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: int(len(whole) * share)])

    return spoil


def remove(*files: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / file).unlink() for file in files]


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def adapters(folder: Path) -> None:
    remove("config.json", "model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("{}", encoding="utf-8")


def renamed_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.gate_projj.weight"] = state.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    edit("config.json", model_type="theirs", auto_map={"AutoConfig": "code.Theirs"})(folder)
    (folder / "code.py").write_text("open('ran', 'w')\n", encoding="utf-8")


CANNOT = "the model.* cannot be loaded: "
WEIGHTS = "model.safetensors"
FOLDERS = [
    Folder("not there", lambda folder: shutil.rmtree(folder), "no such model folder"),
    Folder("a file", as_file, "no such model folder"),
    Folder("empty", remove("config.json", "generation_config.json", WEIGHTS), "it has no config.json"),
    Folder("no weights", remove(WEIGHTS), r"a config.json but no \*.safetensors weights"),
    Folder("pickled weights alone", pickled, "its weights only as .bin; those are pickles, which can run code"),
    Folder("adapters alone", adapters, "holds only adapters; name a folder with the whole model"),
    Folder("config.json empty", write("config.json", b""), "not a valid JSON file|cannot be loaded"),
    Folder("config.json cut short", cut("config.json"), "not a valid JSON file"),
    Folder("config.json a list", write("config.json", b"[]"), CANNOT),
    Folder("config.json a number", write("config.json", b"5"), CANNOT),
    Folder("config.json not UTF-8", write("config.json", b'{"a": "\xff"}'), "cannot be loaded|not a valid JSON"),
    Folder("config.json of nothing", write("config.json", b"{}"), CANNOT + "ValueError: Unrecognized model"),
    Folder("kind unknown", edit("config.json", model_type="lama"), CANNOT + ".*`lama`"),
    Folder("kind a number", edit("config.json", model_type=7), CANNOT),
    Folder("kind with code of its own", own_code, "trust_remote_code|cannot be loaded"),
    Folder("size as text", edit("config.json", hidden_size="big"), CANNOT),
    Folder("size negative", edit("config.json", hidden_size=-32), CANNOT),
    Folder("size zero", edit("config.json", hidden_size=0), "cannot be loaded|do not fit its config.json"),
    Folder("size null", edit("config.json", hidden_size=None), CANNOT),
    Folder("heads that do not divide", edit("config.json", num_attention_heads=5), CANNOT),
    Folder("vocabulary of another size", edit("config.json", vocab_size=300), r"\[259, 32\] in the files, \[300, 32\]"),
    Folder("more layers than weights", edit("config.json", num_hidden_layers=3), "lacks weights of a causal language"),
    Folder("activation unknown", edit("config.json", hidden_act="silly"), CANNOT),
    Folder("a weight of another name", renamed_weight, "lacks weights .*gate_proj"),
    Folder("weights empty", write(WEIGHTS, b""), "cannot be read|cannot be loaded"),
    Folder("weights cut short", cut(WEIGHTS), "the weights of .* cannot be read .*is the download complete"),
    Folder("weights cut in their header", cut(WEIGHTS, 0.001), "cannot be read .*is the download complete"),
    Folder("weights of other bytes", write(WEIGHTS, bytes(range(256)) * 9), "cannot be read"),
    Folder("a pointer of git-lfs", write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    Folder("a header that claims 8 EB", write(WEIGHTS, b"\xff" * 8 + b"{}"), "cannot be read"),
    Folder("tokenizer not there", remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer", "tokenizer"),
    Folder("tokenizer.json empty", write("tokenizer.json", b""), "the tokenizer .* cannot be loaded", "tokenizer"),
    Folder("tokenizer.json cut", cut("tokenizer.json"), "the tokenizer .* cannot be loaded", "tokenizer"),
    Folder("tokenizer.json a list", write("tokenizer.json", b"[]"), "the tokenizer .* cannot be loaded", "tokenizer"),
    Folder("tokenizer.json without model", edit("tokenizer.json", model="gone"), "cannot be loaded", "tokenizer"),
    Folder("tokenizer_config.json cut", cut("tokenizer_config.json"), "tokenizer .*(cannot be|found no)", "tokenizer"),
    Folder("tokenizer_config.json a list", write("tokenizer_config.json", b"[]"), "cannot be loaded", "tokenizer"),
    Folder(
        "LoRA on layers that are not there", lambda folder: None, r"lora.targets=\['nope'\].*q_proj", knobs={"r": 4}
    ),
    Folder(
        "a classifier of 3 labels",
        edit("config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}),
        "is a classifier with 3 labels",
        "reward",
    ),
    Folder("reward weights cut short", cut(WEIGHTS), "is the download complete", "reward"),
    Folder("reward config.json a list", write("config.json", b"[]"), CANNOT, "reward"),
    Folder("architectures a number", edit("config.json", architectures=7), "cannot be loaded|architectures", "reward"),
]
