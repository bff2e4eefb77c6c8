"""The random states that user code draws from, of every process: stored as plain values, put back bit for bit.

The stages seed what they draw by counters, so a resume is exact without these. Rewards, callbacks and data modules of
a user may draw from Python's, NumPy's and torch's global generators, and Lightning stores none of them.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def states(device: torch.device) -> dict[str, Any]:
    """The state of each global generator of this process: numbers, tuples and byte tensors.

    Args:
        device: the one this process computes on; its own generator too, where it is a GPU.
    """
    numpy: Any = np.random.get_state(legacy=False)
    inner = {key: item.tolist() if isinstance(item, np.ndarray) else item for key, item in numpy["state"].items()}
    found = {"python": random.getstate(), "numpy": {**numpy, "state": inner}, "torch": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def put_back(found: dict[str, Any], device: torch.device) -> None:
    """Set the generators of this process to what `states` found.

    Args:
        found: of the same process in the run that was stopped.
        device: the one this process computes on.
    """
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["torch"])
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)


def states_of_all(trainer: Trainer) -> list[dict[str, Any]]:
    """`states` of every process, by rank; all processes ask together."""
    own = states(trainer.strategy.root_device)
    if trainer.world_size == 1:
        return [own]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, own)
    return gathered
