"""Low-rank adapters inside a model: put in, drawn or read from a folder, merged into what is saved or saved alone."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.deferred import first_rows, is_deferred, set_weight
from lit_rlhf.models.network import Lora
from lit_rlhf.models.sharding import whole
from lit_rlhf.models.switches import POLICY, adapted_layers, adapter_of, name_in_files, turn

_IN_FILES = "base_model.model."  # peft's prefix to the names of weights


def inject_adapters(model: Any, lora: Lora, *, task: str, seed: int = 0, name: str = POLICY) -> None:
    """Put low-rank adapters into a model, in place; the base is frozen, the new adapters are trainable.

    The model keeps its class, so generation and sharding see an ordinary transformers model, and adapters that it has
    already stay as they are and in use. An adapter starts as 0, so the model's outputs do not change.

    Args:
        model: a transformers model.
        lora: rank, scale, targets.
        task: peft's task type, "CAUSAL_LM" or "SEQ_CLS".
        seed: for the adapters' random half; equal on every process, which sharding relies on.
        name: of the adapters, for `role`.

    Raises:
        ValueError: no layer matches ``lora.targets``, or the head is a target though it is tied to the embedding.
    """
    from peft import LoraConfig
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
    generator = torch.Generator().manual_seed(seed)
    try:
        found = _inject(model, settings, name)
    except ValueError as error:
        linear = (key for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        known = ", ".join(sorted({key.removesuffix(".base_layer").rpartition(".")[2] for key in linear}))
        raise ValueError(f"lora.targets={lora.targets}: {error}. Linear layers of this model: {known}") from None
    for key, weight in found.items():
        set_weight(model, key, _first_weight(key, weight, generator))


def _inject(model: Any, settings: Any, adapter: str) -> dict[str, Tensor]:
    """Put adapters in; give their weights by name. What was there before is as trainable as it was, and in use."""
    from peft import inject_adapter_in_model

    before = list(model.parameters()) if adapted_layers(model) else []
    trained, training = [weight.requires_grad for weight in before], model.training
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that there are several is the point
        inject_adapter_in_model(settings, model, adapter_name=adapter, low_cpu_mem_usage=is_deferred(model))
    for weight, was_trained in zip(before, trained, strict=True):  # not every release of peft leaves it alone
        weight.requires_grad_(was_trained)
    for layer in adapted_layers(model).values():
        turn(layer, [POLICY], off=False)
    found = {key: weight for key, weight in model.named_parameters() if adapter_of(key) == adapter}
    for weight in found.values():  # peft follows the base; small steps would be lost in half precision
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    model.train(training)
    return found


def _first_weight(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """As Hu et al. (2021, §4.1) begin: A at random, B zero, so that B·A is 0; an embedding's B at random, its A zero.

    What is drawn depends on the seed and the adapters alone, not on how the model was loaded.
    """
    value = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        bound = parameter.shape[1] ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(generator=generator) if ".lora_embedding_B." in name else value


@torch.no_grad()
def merged_state(model: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """Give the weights of an ordinary model: the policy's adapters added to what they adapt, shards put together.

    The model itself is left alone: merging in place and back would change the base weights, and with them the
    reference, by rounding.

    Args:
        model: the model; where it is sharded, every process must call.
        keep: whether this process wants them, on the CPU; the others have one weight at a time.
    """
    adapted, tied, state = adapted_layers(model, POLICY), getattr(model, "all_tied_weights_keys", None) or {}, {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or name in tied:  # tied weights are stored once; a gathered one is not seen as the same
            continue
        found, layer = whole(tensor), adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            found = (found.float() + whole(layer.get_delta_weight(POLICY)).float()).to(found.dtype)
        if keep:
            state[name.replace(".base_layer.", ".")] = found.cpu()
    return state


@torch.no_grad()
def save_adapters(model: Any, folder: str | Path, *, write: bool, about: dict[str, str] | None = None) -> None:
    """Write the adapters alone, a reward model's with its head, as a folder that ``peft.PeftModel`` loads.

    Args:
        model: a model with adapters; of several the policy's are meant.
        folder: where to; must exist.
        write: whether this process writes (all must call when the model is sharded).
        about: kept in the file's header, beside a checksum of the base.
    """
    from safetensors.torch import save_file

    state = {
        _IN_FILES + name_in_files(name): whole(tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if adapter_of(name) == POLICY or name.startswith("score.")
    }
    if write:
        header = {"format": "pt", "base": base_checksum(model), **(about or {})}
        save_file(state, Path(folder) / "adapter_model.safetensors", metadata=header)
        settings = copy.deepcopy(model.peft_config[POLICY])
        settings.inference_mode = True
        if _IN_FILES + "score.weight" in state:
            settings.modules_to_save = ["score"]
        settings.save_pretrained(str(folder))


def base_checksum(model: Any) -> str:
    """A checksum by which a base is known again, whatever its head, its number format and how it is loaded.

    Of the first row of each weight, in bfloat16: training moves some number in some of them, and a model that is not
    read yet, or lies in shards (then the first process's counts), need not be read whole.
    """
    digest = hashlib.sha256()
    for name, shape, row in sorted(first_rows(model), key=lambda one: one[0]):
        digest.update(f"{name} {list(shape)}".encode())
        digest.update(row.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load_adapters(model: Any, folder: str, name: str, *, trained: bool) -> tuple[Tensor, dict[str, str]]:
    """Put the adapters of a reward model on a policy's base, beside the policy's own.

    Args:
        model: the policy, with adapters of its own, not yet sharded.
        folder: as `save_adapters` writes it, or peft for a sequence classifier with one label.
        name: of the adapters, for `role`.
        trained: whether they are to be trained on; else they are frozen.

    Returns:
        The weight [1, d] of the scalar head, and what the file's header says.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: something else than a reward model's adapters, or those of another base.
    """
    from peft import LoraConfig

    settings = _settings(folder)
    state, header = _weights(folder)
    head = state.pop("score.weight", None)
    if head is None or head.dim() != 2 or head.shape[0] != 1:
        raise ValueError(
            f"{folder} has no scalar head (score.weight, 1 row): it is a policy's adapter folder, or one of a "
            "classifier. RewardModeling with network.lora writes one with export.merge: false"
        )
    _check_base(model, folder, settings, header)
    known = set(LoraConfig.__dataclass_fields__) - {"modules_to_save", "task_type", "inference_mode"}
    config = LoraConfig(**{key: value for key, value in settings.items() if key in known})
    found = _inject(model, config, name)
    wanted = {name_in_files(key): key for key in found}
    wrong = [
        f"{key} {list(state[key].shape) if key in state else 'is missing'}, expected {list(found[own].shape)}"
        for key, own in wanted.items()
        if key not in state or state[key].shape != found[own].shape
    ] + sorted(state.keys() - wanted.keys())
    if wrong:
        raise ValueError(f"{folder} does not fit the policy: {len(wrong)} weights differ, first {wrong[0]}")
    for key, own in wanted.items():
        set_weight(model, own, state[key].float())
    for weight in found.values():
        weight.requires_grad_(trained)
    return head.float(), header


def _settings(folder: str) -> dict[str, Any]:
    """What an adapter folder says of itself, checked."""
    path = Path(folder).expanduser() / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no adapter folder: it has no adapter_config.json. RewardModeling with network.lora writes "
            "one with export.merge: false; a whole reward model is for RewardModel"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = set(settings.get("modules_to_save") or [])
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or kept - {"score", "classifier"}:
        raise ValueError(
            f"{folder}: peft_type {settings.get('peft_type')!r}, bias {settings.get('bias')!r}, modules_to_save "
            f"{sorted(kept)}; expected LORA, 'none' and no more than the score: other weights would be the policy's too"
        )
    return settings


def _weights(folder: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of an adapter folder by their names in the network, and the header."""
    from safetensors import safe_open

    path = Path(folder).expanduser() / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors")
    with safe_open(path, framework="pt") as file:
        state = {key.removeprefix(_IN_FILES): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return state, dict(file.metadata() or {})


def _check_base(model: Any, folder: str, settings: dict[str, Any], header: dict[str, str]) -> None:
    """Refuse adapters that were trained on another base: by checksum, or by name where there is none."""
    trained_on, base = settings.get("base_model_name_or_path"), model.name_or_path
    if "base" in header:
        fits = header["base"] == base_checksum(model)
    else:
        fits = trained_on == base or Path(str(trained_on)).resolve() == Path(base).resolve()
    if not fits:
        raise ValueError(
            f"{folder} was trained on another base than the policy's: {trained_on!r} there, {base!r} here"
            f"{', and the weights differ' if 'base' in header else ''}. Train the reward model with network.lora from "
            "the policy's own folder, or merge it (export.merge: true) and take it as a RewardModel"
        )
