"""From a checkpoint to a Hugging Face folder."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule


def no_reward(completions: list[str]) -> list[float]:
    """Stand in for the rewards of a stage that is only to be exported."""
    return [0.0] * len(completions)


def stage_class(hyper_parameters: dict[str, Any], checkpoint: str) -> type[LightningModule]:
    """Find the class that made a checkpoint.

    Args:
        hyper_parameters: as the checkpoint holds them.
        checkpoint: its path, for the error.

    Raises:
        ValueError: it was not made by a stage that can be exported.
    """
    module, _, name = str(hyper_parameters.get("_class_path", "")).rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    if not (isinstance(found, type) and issubclass(found, LightningModule) and hasattr(found, "export")):
        raise ValueError(f"{checkpoint} was not made by a stage of lit_rlhf (SFT, RewardModeling, PPO, GRPO)")
    return found


def export(checkpoint: str, folder: str, merge: bool = True) -> None:
    """Write the network of a checkpoint as a Hugging Face folder, which transformers loads like any other.

    The folder that the run started from must still be there: frozen weights are not in a checkpoint.

    Args:
        checkpoint: a .ckpt file, as a fit writes it.
        folder: where to.
        merge: add adapters to the weights; false writes the adapters alone.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a file that no stage wrote.
    """
    if not Path(checkpoint).is_file():
        what = "is a folder (a sharded checkpoint); name a .ckpt file" if Path(checkpoint).is_dir() else "is not there"
        raise FileNotFoundError(f"checkpoint {checkpoint} {what}")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    stage = stage_class(saved.get("hyper_parameters", {}), checkpoint)
    rewards: dict[str, Any] = {"rewards": [no_reward]} if "rewards" in inspect.signature(stage).parameters else {}
    module: Any = stage.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **rewards)
    module.export(folder, merge=merge)
    print(f"exported: {folder}")
