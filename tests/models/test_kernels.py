"""Liger: what is asked of the package, and what is refused. ``benchmarks/speed/gpu.py`` runs the real kernels."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from lit_rlhf.models import Network, load_causal
from lit_rlhf.models.kernels import apply_liger


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for the package; gives the calls made to it."""
    calls: list[dict] = []
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen3": None}
    patch._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    inner.monkey_patch = patch
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_the_loaded_model_gets_all_kernels_but_the_cross_entropies(liger, model_folder):
    load_causal(model_folder)
    assert not liger
    model = load_causal(model_folder, Network(kernels="liger"))
    assert liger == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_model_type_without_kernels_is_refused(liger, model_folder):
    model = load_causal(model_folder)
    model.config.model_type = "bloom"
    with pytest.raises(ValueError, match=r"no kernels for models of type 'bloom'.*It knows llama, qwen3"):
        apply_liger(model)
    assert not liger


def test_without_cuda_or_without_the_package_it_says_what_to_do(liger, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no CUDA device here"):
        load_causal(model_folder, Network(kernels="liger"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
        load_causal(model_folder, Network(kernels="liger"))
