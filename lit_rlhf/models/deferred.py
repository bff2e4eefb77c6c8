"""Networks built without their weights, which are read later: each process reads its own part and no more.

A network of 70 billion parameters does not fit the memory of every process, not even for the moment before it is
sharded. Within `without_weights` a network gets its shape only (meta tensors); once it is sharded, `fill` reads from
the safetensors files the rows that this process holds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.sharding import own_rows

_DEFERS: ContextVar[bool] = ContextVar("defers", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Leave the weights of stages made inside in their files until the strategy has placed the networks.

    Example::

        with without_weights():
            stage = PPO("my-org/large-model", rewards=[score])
        Trainer(strategy="fsdp2", devices=8).fit(stage, data)
    """
    token = _DEFERS.set(True)
    try:
        yield
    finally:
        _DEFERS.reset(token)


@dataclass
class Deferred:
    """Where a network's weights are while it has none."""

    places: dict[str, tuple[Path, str]]  # by name in the network: the file, and the name in it
    new: dict[str, Tensor] = field(default_factory=dict)  # weights that no file has: adapters, a new head


def build_empty(auto_class: Any, name: str, config: Any, settings: dict[str, Any]) -> tuple[Any, set[str]] | None:
    """Build a network without weights, if asked to and if its files hold them under the names of the network.

    Args:
        auto_class: the transformers ``AutoModelFor…`` class.
        name: folder or hub id.
        config: its configuration.
        settings: dtype, attn_implementation, revision and trust_remote_code, as ``from_pretrained`` takes them.

    Returns:
        The network and the names of the weights that no file has; None where its weights must be loaded now.
    """
    if not _DEFERS.get():
        return None
    from accelerate import init_empty_weights

    folder = _folder(name, settings.get("revision"))
    kept = {key: settings[key] for key in ("dtype", "attn_implementation", "trust_remote_code")}
    with init_empty_weights(include_buffers=False):  # rotary tables are computed, no file has them
        model = auto_class.from_config(config, **kept)
    model.tie_weights()  # which every weight that became empty has left
    places = _places(model, _contents(folder))
    missing = {key for key, tensor in _stored(model).items() if tensor.is_meta and key not in places}
    reason = _why_not(model, missing, settings["dtype"])
    if reason is not None:
        warnings.warn(f"{name} is loaded whole by every process before it is sharded: {reason}", stacklevel=4)
        return None
    _read_generation_config(model, folder)
    model.deferred = Deferred(places)
    return model, missing


def set_weight(model: Any, name: str, value: Tensor) -> None:
    """Give a weight of a network a value, at once or, where it has none yet, when the others are read.

    Args:
        model: from `load_causal` or `load_scalar`.
        name: of the weight.
        value: of its shape.
    """
    weight = model.get_parameter(name)
    if weight.is_meta:
        model.deferred.new[name] = value
    else:
        with torch.no_grad():
            weight.copy_(value)


@torch.no_grad()
def fill(model: Any, device: torch.device) -> None:
    """Read the weights of a network that was built without, or this process's part of them where it is sharded.

    Does nothing to a network that has its weights.

    Args:
        model: from `load_causal` or `load_scalar`, sharded or not.
        device: where the weights are to stand.
    """
    deferred: Deferred | None = getattr(model, "deferred", None)
    if deferred is None:
        return
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    model.tie_weights()  # what was one tensor is one again
    for key, buffer in model.named_buffers():
        if key in buffers:
            buffer.copy_(buffers[key])
    for key, weight in _stored(model).items():
        if key in buffers and key not in deferred.places:  # computed when the network was built
            continue
        own, first = own_rows(weight)
        if own.numel():
            own.copy_(_read(deferred, key, first, own))
    del model.deferred


def first_rows(model: Any) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Name, shape and first row of each weight of a network's base, without head and adapters; read if not yet there.

    Args:
        model: from `load_causal` or `load_scalar`; where it is sharded, the first process's rows are the right ones.
    """
    for name, weight in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}.") or ".lora_" in name:
            continue
        row = _read(model.deferred, name, 0, weight[:1]) if weight.is_meta else own_rows(weight)[0][:1]
        yield name.replace(".base_layer.", "."), weight.shape, row


def is_deferred(model: Any) -> bool:
    """Whether a network has no weights yet."""
    return getattr(model, "deferred", None) is not None


def _read(deferred: Deferred, name: str, first: int, like: Tensor) -> Tensor:
    if name in deferred.new:
        whole = deferred.new[name]
        return whole[first : first + len(like)] if whole.dim() else whole
    from safetensors import safe_open

    path, key = deferred.places[name.replace(".base_layer.", ".")]
    with safe_open(path, framework="pt") as file:
        return file.get_slice(key)[first : first + len(like)] if like.dim() else file.get_tensor(key)


def _folder(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["model*.safetensors", "*.json"]  # the same weights may be there in other formats
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def _contents(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of each weight in a folder; of several files those that transformers reads, or the index names."""
    from safetensors import safe_open

    alone, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = [alone.name]
    if not alone.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    if strange := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {strange[0]!r} for weights, which is no file of its folder: refused")
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in (folder / name for name in names):
        with safe_open(path, framework="pt") as file:
            found |= {key: (path, list(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return found


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers that a file should hold, each once however many names it has."""
    fleeting = {
        f"{place}.{key}".lstrip(".")
        for place, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    buffers = {key: buffer for key, buffer in model.named_buffers() if key not in fleeting}
    return dict(model.named_parameters()) | buffers


def _places(model: Any, contents: dict[str, tuple[Path, list[int]]]) -> dict[str, tuple[Path, str]]:
    """File of each weight and its name there: its own, or without the base model's prefix, which older files lack."""
    prefix, found = f"{model.base_model_prefix}.", {}
    for name, tensor in _stored(model).items():
        for key in (name, name.removeprefix(prefix)):
            path, shape = contents.get(key, (None, []))
            if path is not None and shape == list(tensor.shape):
                found[name] = path, key
                break
    return found


def _why_not(model: Any, missing: set[str], dtype: torch.dtype) -> str | None:
    if missing - {"score.weight"}:
        return f"its files have other names for weights than the network, for instance for {min(missing)}"
    if getattr(model.config, "quantization_config", None) is not None:
        return "it is quantised"
    always, over_float16 = (getattr(model, f"_keep_in_fp32_modules{how}", None) for how in ("_strict", ""))
    if (always and dtype != torch.float32) or (over_float16 and dtype == torch.float16):
        return "a part of it stays in float32"
    return None


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
