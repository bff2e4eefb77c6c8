"""Low-rank adapters inside a model: put in, switched off for the reference, merged into what is saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.deferred import is_deferred, set_weight
from lit_rlhf.models.network import Lora
from lit_rlhf.models.sharding import whole

ADAPTER = "default"


def inject_adapters(model: Any, lora: Lora, *, task: str, seed: int = 0) -> None:
    """Put low-rank adapters into a model, in place; from then on only they are trainable.

    The model keeps its class, so generation and sharding see an ordinary transformers model. An adapter starts as 0, so
    the model's outputs do not change.

    Args:
        model: a transformers model.
        lora: rank, scale, targets.
        task: peft's task type, "CAUSAL_LM" or "SEQ_CLS".
        seed: for the adapters' random half; equal on every process, which sharding relies on.

    Raises:
        ValueError: no layer matches ``lora.targets``, or the head is a target though it is tied to the embedding.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    if getattr(model, "all_tied_weights_keys", None) and "lm_head" in (lora.targets or []):
        raise ValueError("lora.targets names lm_head, which shares its weight with the embedding and cannot be merged")
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.targets is None else list(lora.targets),
        task_type=task,
        base_model_name_or_path=model.name_or_path,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    training = model.training
    with torch.random.fork_rng(devices=[]):
        try:
            inject_adapter_in_model(settings, model, adapter_name=ADAPTER, low_cpu_mem_usage=is_deferred(model))
        except ValueError as error:
            linear = (
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, (nn.Linear, Conv1D))
            )
            known = ", ".join(sorted(set(linear)))
            raise ValueError(f"lora.targets={lora.targets}: {error}. Linear layers of this model: {known}") from None
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # peft follows the base; small steps would be lost in half precision
            parameter.data = parameter.data.float()
            set_weight(model, name, _first_weight(name, parameter, generator))
    model.train(training)


def _first_weight(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """As Hu et al. (2021, §4.1) begin: A at random, B zero, so that B·A is 0; an embedding's B at random, its A zero.

    What is drawn depends on the seed and the adapters alone, not on how the model was loaded.
    """
    value = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        bound = parameter.shape[1] ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(generator=generator) if ".lora_embedding_B." in name else value


def _adapted(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, "peft_config"):  # spares the import of peft where no adapters are
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def has_adapters(model: nn.Module) -> bool:
    """Say whether a model carries adapters."""
    return bool(_adapted(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model as it was before its adapters: inside, its outputs are bitwise the base model's.

    Only a switch in each adapted layer is turned. peft's own ``disable_adapter`` also changes ``requires_grad``, which
    drops gradients in silence and lets processes drift apart.

    Raises:
        ValueError: the model has no adapters, so there is no base to go back to.
    """
    layers = list(_adapted(model).values())
    if not layers:
        raise ValueError("this model has no adapters to switch off; its reference must be a frozen copy")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def same_place(place: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Give ``place`` if it can hold ``like`` in ``dtype``, else new memory that can."""
    if place is not None and (place.shape, place.device, place.dtype) == (like.shape, like.device, dtype):
        return place
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


def adapters_in_use(model: nn.Module) -> list[bool]:
    """Say of each adapted layer whether its adapter takes part."""
    return [not layer._disable_adapters for layer in _adapted(model).values()]


@contextmanager
def merged(model: nn.Module, kept: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Run a model with its adapters added to the weights: one product a layer instead of three.

    The weights come back bit for bit, since they are put aside and not computed back. Adapters on sharded weights, or
    on weights in half precision (which would round the adapters' part away), are left as they are.

    Args:
        model: the model.
        kept: where the sums stand, by layer; given again, they are written to the same places.
    """
    before = []
    for name, layer in _adapted(model).items():
        weight = layer.base_layer.weight
        is_whole = not hasattr(weight, "full_tensor")
        if weight.dtype == torch.float32 and is_whole and not layer._disable_adapters:
            before.append((name, layer, weight.data))
    try:
        with torch.no_grad():
            for name, layer, weight in before:
                place = same_place((kept or {}).get(name), weight, weight.dtype)
                if kept is not None:
                    kept[name] = place
                layer.base_layer.weight.data = torch.add(weight, layer.get_delta_weight(ADAPTER), out=place)
                layer._disable_adapters = True
        yield
    finally:
        for _, layer, weight in before:
            layer.base_layer.weight.data = weight
            layer._disable_adapters = False


@torch.no_grad()
def merged_state(model: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """Give the weights of an ordinary model: adapters added to what they adapt, shards put together on the CPU.

    The model itself is left alone: merging in place and back would change the base weights, and with them the
    reference, by rounding.

    Args:
        model: the model; where it is sharded, every process must call.
        keep: whether this process wants them; the others have one weight at a time.
    """
    adapted, tied, state = _adapted(model), getattr(model, "all_tied_weights_keys", None) or {}, {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or name in tied:  # tied weights are stored once; a gathered one is not seen as the same
            continue
        found, layer = whole(tensor), adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            found = (found.float() + whole(layer.get_delta_weight(ADAPTER)).float()).to(found.dtype)
        if keep:
            state[name.replace(".base_layer.", ".")] = found.cpu()
    return state


@torch.no_grad()
def save_adapters(model: Any, folder: str | Path, *, write: bool) -> None:
    """Write the adapters alone, as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        model: a model with adapters.
        folder: where to; must exist.
        write: whether this process writes (all must call when the model is sharded).
    """
    from safetensors.torch import save_file

    state = {
        "base_model.model." + name.replace(f".{ADAPTER}.", "."): whole(tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    if write:
        save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = copy.deepcopy(model.peft_config[ADAPTER])
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
