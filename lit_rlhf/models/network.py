"""How a network is loaded: the settings, and the loading itself, at once or as a shape to be filled later."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lit_rlhf.models.deferred import build_empty
from lit_rlhf.models.foreign import announce_code
from lit_rlhf.models.hub import check_folder, hub_errors, quiet
from lit_rlhf.models.kernels import apply_liger
from lit_rlhf.models.noise import add_residual_dropout
from lit_rlhf.models.switches import same_role_again
from lit_rlhf.ranges import check_number

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021): the update of a weight is ``alpha / r · B·A``, and only A and B learn.

    Args:
        r: rank of the update.
        alpha: scale; the update counts ``alpha / r`` times.
        dropout: dropout on the adapters' input.
        targets: names of the layers to adapt, for instance ``[q_proj, v_proj]``; None adapts every linear layer but the
            head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r is {self.r}: the rank must be at least 1 (leave lora out to train all weights)")
        check_number("lora.r", self.r, least=1, whole=True)
        check_number("lora.alpha", self.alpha, above=0)  # at 0 the adapters would change nothing
        check_number("lora.dropout", self.dropout, least=0, below=1)
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets is an empty list: name layers, or leave it out to adapt every linear layer")


@dataclass
class Network:
    """How a model is loaded and held.

    Args:
        dtype: number format of the weights, whatever the files hold. Train in float32 (with ``precision: bf16-mixed``
            where speed counts); bfloat16 is for frozen models.
        attention: attention implementation of transformers: eager, sdpa, flash_attention_2 …
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lora: train low-rank adapters in place of the weights.
        trust_remote_code: run Python code that comes with a hub model. Only for authors you trust.
        dropout: probability of every dropout in the model. 0 by default: with dropout, RL's probability ratios are
            wrong from the first update (Huang et al. 2023).
        residual_dropout: probability of dropping an element of what attention and MLP add to the residual stream,
            besides the dropouts of the model's own (InstructGPT's SFT: 0.2, Ouyang et al. 2022, §C.1). For SFT.
        revision: branch, tag or commit of a hub model.
        kernels: ``liger`` puts Liger's fused norms, rotary embedding and gated MLP into the model (CUDA only;
            ``pip install liger-kernel``).
    """

    dtype: Dtype = "float32"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    trust_remote_code: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.0
    revision: str | None = None
    kernels: Literal["liger"] | None = None

    def __post_init__(self) -> None:
        for name in ("dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"network.{name} is {getattr(self, name)}: a probability from 0 to less than 1")


def fits(model: Any, tokens: int) -> bool:
    """Whether a sequence of so many tokens has no more than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit is None or tokens <= limit


def _set_dropout(config: Any, probability: float) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and ("dropout" in key or key.endswith("pdrop")):
                setattr(part, key, float(probability))


def load_config(name: str, network: Network) -> Any:
    """Read a model's configuration, its dropouts set to ``network.dropout``."""
    from transformers import AutoConfig, PretrainedConfig

    check_folder(name)
    with hub_errors(name, "model"), quiet():
        if network.trust_remote_code:
            raw, _ = PretrainedConfig.get_config_dict(name, revision=network.revision)
            announce_code(name, network.revision, raw, "model")
        config = AutoConfig.from_pretrained(
            name, revision=network.revision, trust_remote_code=network.trust_remote_code
        )
    kinds = config.architectures or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"config.json of {name}: architectures is {kinds!r}; expected a list of class names")
    _set_dropout(config, network.dropout)
    return config


def _load_whole(auto_class: Any, name: str, config: Any, settings: dict[str, Any]) -> tuple[Any, set[str]]:
    with hub_errors(name, "model with safetensors weights"):
        model, report = auto_class.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **settings,
        )
    for key, of_file, of_config in sorted(report["mismatched_keys"])[:1]:
        raise ValueError(
            f"the weights of {name} do not fit its config.json: {key} is {list(of_file)} in the files, "
            f"{list(of_config)} by the config"
        )
    return model, set(report["missing_keys"])


def load_weights(auto_class: Any, name: str, config: Any, network: Network, seed: int) -> tuple[Any, set[str]]:
    """Load a model from safetensors, all of it trainable and in train mode; `without_weights` only its shape.

    Args:
        auto_class: the transformers ``AutoModelFor…`` class.
        name: folder or hub id.
        config: from `load_config`.
        network: how to hold it.
        seed: for weights that the files lack; the global random state is left as it was.

    Returns:
        The model, and the names of the weights that the files lack (made up by transformers).
    """
    settings = {
        "dtype": getattr(torch, network.dtype),
        "attn_implementation": network.attention,
        "revision": network.revision,
        "trust_remote_code": network.trust_remote_code,
    }
    with torch.random.fork_rng(devices=[]), quiet():
        torch.random.default_generator.manual_seed(seed)
        with hub_errors(name, "model with safetensors weights"):
            empty = build_empty(auto_class, name, config, settings)
        if empty is not None:
            model, missing = empty
        else:
            model, missing = _load_whole(auto_class, name, config, settings)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = float(network.dropout)
    if network.kernels == "liger":
        apply_liger(model)
    if network.residual_dropout:
        add_residual_dropout(model, network.residual_dropout)
    if network.gradient_checkpointing:
        # Newer releases of transformers 5 call it activation checkpointing.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": partial(same_role_again, model)})
    return model.train(), missing


def to_left_edge(ids: torch.Tensor, mask: torch.Tensor, *, but_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each row's real tokens to the left edge, so that a causal model needs neither a mask nor positions.

    What stands after a row is never seen by it, positions count from 0 by themselves, and attention takes its fast
    causal path. The padding that remains is id 0, so that one beyond the vocabulary does no harm.

    Args:
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token.
        but_last: leave out the last token of the longest rows, which predicts nothing that is asked for.

    Returns:
        (ids [B, W], W = the longest row; columns [B, L], where each token went, padding and the token left out to W).
    """
    columns = mask.long().cumsum(dim=1) - 1
    width = max(int(columns[:, -1].max()) + (0 if but_last else 1), 1)
    columns = columns.masked_fill(~mask, width).clamp(max=width)
    moved = ids.new_zeros(ids.shape[0], width + 1).scatter_(1, columns, ids)
    return moved[:, :width].contiguous(), columns
