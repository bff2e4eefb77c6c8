"""What a run may change when it goes on from a checkpoint, and what it may not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.checkpoints import CheckpointError

# With another value of these the weights, moments and tokens of a checkpoint would not fit, or mean something else.
# Everything else is the user's to change, and is named when he did.
FIXED = (
    "model",
    "critic",
    "tokenizer",
    "network.lora",
    "network.revision",
    "network.dtype",
    "value.shared",
    "value.adapter",
    "data.tokenizer",
    "data.chat_template",
)
FOLDERS = ("model", "critic", "tokenizer", "data.tokenizer")


def greet(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another stage or network; where a fit goes on, say in one line from where.

    Args:
        module: the stage that is to go on; nothing is done where it is in no Trainer.
        checkpoint: as Lightning gives it to ``on_load_checkpoint``.

    Raises:
        CheckpointError: it is another run's: what differs, and in which way.
    """
    if module._trainer is None:
        return
    old, new = dict(checkpoint.get("hyper_parameters", {})), dict(module.hparams)
    made_by, here = old.pop("_class_path", None), new.pop("_class_path", None)
    if made_by is not None and made_by != here:
        raise CheckpointError(f"the checkpoint is one of {made_by}, this run is one of {here}")
    data = getattr(module.trainer, "datamodule", None)
    stored = checkpoint.get("datamodule_hyper_parameters", {})
    changes = [
        *differences(old, new, ""),
        *(differences(dict(stored), dict(data.hparams), "data.") if data is not None and stored else ()),
    ]
    others = [text for key, text in changes if _fixed(key)]
    if others:
        raise CheckpointError(
            f"the checkpoint is of another run than this config describes: {'; '.join(others)}. "
            "Give the settings it was made with, or start anew without ckpt_path"
        )
    if module.trainer.state.fn == TrainerFn.FITTING:
        changed = "; ".join(text for _, text in changes)
        rank_zero_info(f"going on {_place(checkpoint, data)}{f'; changed since: {changed}' if changed else ''}")


def _fixed(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in FIXED)


def differences(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Keys in dots whose values differ, each with its change in words; keys that only one side knows are left out.

    Args:
        old: settings as nested dicts.
        new: the same, of now.
        prefix: put before each key.
    """
    for key in [key for key in old if key in new]:
        before, after, name = _plain(old[key]), _plain(new[key]), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{name}.")
        elif before != after and not (name in FOLDERS and _moved(before, after)):
            yield name, f"{name} {before} → {after}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _moved(before: Any, after: Any) -> bool:
    """Whether two names mean one folder, or it went to another place under its own name."""
    if not (isinstance(before, str) and isinstance(after, str) and os.path.isdir(after)):
        return False
    if os.path.realpath(before) == os.path.realpath(after):
        return True
    same_name = os.path.basename(os.path.normpath(before)) == os.path.basename(os.path.normpath(after))
    return same_name and not os.path.exists(before)


def _place(checkpoint: dict[str, Any], data: Any) -> str:
    """How far a checkpoint's run had come, in words."""
    weights, step = checkpoint["state_dict"], checkpoint.get("global_step", 0)
    episodes = f"rollout {step}, {int(weights['episodes'])} episodes" if "episodes" in weights else f"step {step}"
    place = checkpoint.get(type(data).__qualname__) if data is not None else None
    rows = f", epoch {place['epoch']} and row {place['rows']} of the data" if place else ""
    return f"after {episodes}{rows}"
