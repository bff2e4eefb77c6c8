"""Constructor arguments as plain values, so that a checkpoint holds no objects and loads with ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import os
import typing
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lit_rlhf.ranges import check_number, check_seed

GroupT = TypeVar("GroupT")
OBJECTS = ("rewards", "sampler")
# Numbers among the stages' own arguments; those of a settings group are checked where the group is made.
RANGES: dict[str, dict[str, Any]] = {
    "gamma": {"least": 0, "most": 1},
    "lam": {"least": 0, "most": 1},
    "ptx_coef": {"least": 0},
    "ema": {"least": 0, "below": 1, "null": True},
    "group_size": {"least": 1, "whole": True},
    "groups": {"least": 1, "whole": True, "null": True},
    "refresh_reference": {"least": 1, "whole": True, "null": True},
    "center": {"least": 0},
    "sample_prompts": {"least": 0, "whole": True},
}
_DROP = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain for key, item in value.items() if (plain := _plain(item)) is not _DROP}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _DROP if any(item is _DROP for item in items) else items
    return _DROP


def remember(module: LightningModule, arguments: dict[str, Any]) -> None:
    """Save a stage's constructor arguments as its hyperparameters, plain values only.

    Rewards and samplers are objects and left out: who loads the checkpoint in Python passes them again,
    ``PPO.load_from_checkpoint(path, rewards=[...])``.

    Args:
        module: the stage under construction.
        arguments: ``locals()`` of its constructor.

    Raises:
        ValueError: a number among them is out of its range.
    """
    check_seed("seed", arguments["seed"])
    for name in RANGES.keys() & arguments.keys():
        check_number(name, arguments[name], **RANGES[name])
    left_out = ("self", "__class__", *OBJECTS)
    kept = {key: _plain(value) for key, value in arguments.items() if key not in left_out}
    stage = f"{type(module).__module__}.{type(module).__qualname__}"  # so that a checkpoint says what made it
    module.save_hyperparameters({"_class_path": stage, **{key: v for key, v in kept.items() if v is not _DROP}})


def revive(group: type[GroupT], value: GroupT | dict[str, Any]) -> GroupT:
    """Give back a settings group that a checkpoint or a config holds as a dict.

    Args:
        group: the dataclass, for instance ``Optim``.
        value: an instance (returned as it is) or a dict of its fields.
    """
    if not isinstance(value, dict):
        return value
    hints = typing.get_type_hints(group)
    fields = {}
    for name, item in value.items():
        inner = (
            [hint for hint in (hints[name], *typing.get_args(hints[name])) if isinstance(hint, type)]
            if name in hints
            else []
        )
        nested = next((hint for hint in inner if dataclasses.is_dataclass(hint)), None)
        fields[name] = revive(nested, item) if nested and isinstance(item, dict) else item
    return group(**fields)
