"""Fused kernels from another package, put into a model that transformers has built."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def apply_liger(model: Any) -> None:
    """Put Liger's fused RMSNorm, rotary embedding and gated MLP (SwiGLU or GeGLU) into a model, in place.

    Its fused cross-entropies are left out: they replace the forward whose head is intercepted here to give
    log-probabilities (`lit_rlhf.models.output`), which keeps no logits either. Liger sets the rotary embedding, and the
    classes that models loaded later are built of, for all models of the type in this process.

    Args:
        model: a transformers model; it must run on CUDA.

    Raises:
        ModuleNotFoundError: liger-kernel is not installed.
        ValueError: no CUDA device, or a type of model that Liger has no kernels for.

    Source: Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training" (arXiv 2410.10989).
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("network.kernels is liger, which is not installed: pip install liger-kernel")
    if not torch.cuda.is_available():
        raise ValueError("network.kernels is liger, whose kernels run on CUDA only, and there is no CUDA device here")
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise ValueError(
            f"network.kernels is liger, which has no kernels for models of type {kind!r}; leave it out. "
            f"It knows {', '.join(sorted(known))}"
        )
    monkey_patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
