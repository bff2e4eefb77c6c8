"""From a checkpoint to a Hugging Face folder."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from lightning.pytorch import LightningModule

from lit_rlhf.checkpoint_parts import read_any
from lit_rlhf.checkpoints import CheckpointError


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
    # Importing runs code: whoever made the file must not choose which. Own stages are known once they are imported.
    known = module in sys.modules or module.partition(".")[0] == "lit_rlhf"
    found = getattr(importlib.import_module(module), name, None) if known else None
    if not (isinstance(found, type) and issubclass(found, LightningModule) and hasattr(found, "export")):
        raise ValueError(f"{checkpoint} was not made by a stage of lit_rlhf (SFT, RewardModeling, PPO, GRPO)")
    return found


def export(checkpoint: str, folder: str, merge: bool = True, trust_remote_code: bool = False) -> None:
    """Write the network of a checkpoint as a Hugging Face folder, which transformers loads like any other.

    The folder that the run started from must still be there: frozen weights are not in a checkpoint.

    Args:
        checkpoint: a .ckpt file, as a fit writes it, or a folder of parts.
        folder: where to.
        merge: add adapters to the weights; false writes the adapters alone.
        trust_remote_code: run Python code that comes with the model which the checkpoint names, if it asks for that.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: it is damaged, or holds objects.
        ValueError: a file that no stage wrote.
    """
    saved = read_any(checkpoint, mmap=True)
    network = saved.get("hyper_parameters", {}).get("network") or {}
    if network.get("trust_remote_code") and not trust_remote_code:  # whoever made the file must not choose that
        raise CheckpointError(
            f"{checkpoint} was trained with trust_remote_code, and asks to run Python code that comes with "
            f"{saved['hyper_parameters'].get('model')}: if you trust its author, say --trust_remote_code true"
        )
    stage = stage_class(saved.get("hyper_parameters", {}), checkpoint)
    known = inspect.signature(stage).parameters
    arguments = {key: value for key, value in saved["hyper_parameters"].items() if key in known}
    module: Any = stage(**arguments, **({"rewards": [no_reward]} if "rewards" in known else {}))
    module.load_state_dict(saved["state_dict"])
    module.export(folder, merge=merge)
    print(f"exported: {folder}")
