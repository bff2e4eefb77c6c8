"""What a reward is, how it is called, and what is said when it misbehaves."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

# f(prompts, completions, **columns) -> list[float | None], or a module that has score_rollout(rollout) -> Tensor [B].
# Kept this wide because jsonargparse then takes a YAML entry "package.function" as well as {class_path, init_args}.
Reward: TypeAlias = Callable[..., Any]

LARGEST = 3.4028234e38  # float32: scores are float32 tensors


class RewardError(ValueError):
    """A reward misbehaved; the message names the reward, the row, the value and the prompt."""


class RowError(ValueError):
    """Raised inside a reward about one row, so that the error that comes out can name it.

    Args:
        row: number of the row within the call, from 0.
        problem: what is wrong with it.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(row, problem)
        self.row, self.problem = row, problem

    def __str__(self) -> str:
        return self.problem


def reward_name(reward: Reward) -> str:
    """Name under which a reward is logged: its ``name``, else the name of the function, else that of its class."""
    own = getattr(reward, "name", None)
    if isinstance(own, str) and own:
        return own
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    function = getattr(reward, "__name__", None)
    if isinstance(function, str):
        return function.strip("<>")  # "<lambda>" would be no name for a metric
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(reward).__name__).lower()


def excerpt(prompt: Any, length: int = 60) -> str:
    """The beginning of a prompt on one line; of a conversation, its last message."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content", "")
    text = " ".join(str(prompt).split())
    return repr(text if len(text) <= length else f"{text[: length - 1]}…")


def complaint(name: str, row: int, problem: str, prompts: list[Any]) -> RewardError:
    """The error about one row of one reward."""
    shown = excerpt(prompts[row]) if 0 <= row < len(prompts) else "unknown"
    return RewardError(f"reward {name!r}, row {row} (rows 0 to {len(prompts) - 1}): {problem}. Its prompt: {shown}")


def _whole(prompts: list[Any]) -> str:
    return f"It was given rows 0 to {len(prompts) - 1}; the first prompt: {excerpt(prompts[0])}"


def accepted(reward: Reward, name: str, available: dict[str, Any]) -> dict[str, Any]:
    """The arguments to call a reward with: everything if it takes ``**columns``, else what it names.

    Args:
        reward: the callable.
        name: what it is called in errors.
        available: ``prompts``, ``completions``, ``completion_ids`` and every column of the dataset.

    Raises:
        RewardError: the reward asks for something that there is not.
    """
    try:
        # A module's __call__ takes anything; what it wants stands in forward.
        parameters = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return available
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    unpacked = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for key, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in unpacked
        if required and key not in available:
            raise RewardError(
                f"reward {name!r} asks for {key!r}, which is no column of the prompts. There are: "
                f"{', '.join(available)}. Arguments are passed by name"
            )
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return available
    return {key: value for key, value in available.items() if key in parameters and parameters[key].kind in keyword}


def checked(result: Any, name: str, prompts: list[Any]) -> list[float]:
    """The values that a reward returned, as finite floats, NaN where it returned None.

    Args:
        result: what the reward returned: a list or tuple, or a one-dimensional tensor or array.
        name: what the reward is called in errors.
        prompts: B prompts, one a row.

    Raises:
        RewardError: no list, not B values, or a value that is neither None nor a number finite in float32.
    """
    returned = type(result).__name__
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned {returned} ({excerpt(result)}), expected a list of {len(prompts)} values, "
            f"each a number or None. {_whole(prompts)}"
        )
    if len(result) != len(prompts):
        problem = f"returned {len(result)} values for {len(prompts)} completions"
        raise RewardError(f"reward {name!r} {problem}. {_whole(prompts)}")
    return [math.nan if value is None else _number(value, name, row, prompts) for row, value in enumerate(result)]


def _number(value: Any, name: str, row: int, prompts: list[Any]) -> float:
    try:
        # Text has no __float__: "0.5" is refused, as whoever returns it forgot to parse it.
        number = value.__float__()
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        problem = f"returned {excerpt(value)} ({type(value).__name__}), expected a number or None"
        raise complaint(name, row, problem, prompts) from error
    if not abs(number) <= LARGEST:
        problem = f"returned {number!r}, expected a number finite in float32, or None where the reward does not apply"
        raise complaint(name, row, problem, prompts)
    return float(number)


def failure(error: BaseException, name: str, prompts: list[Any]) -> RewardError:
    """What to raise from an exception that a reward raised."""
    if isinstance(error, RowError):
        return complaint(name, error.row, error.problem, prompts)
    if isinstance(error, RewardError):  # says itself which reward
        return RewardError(f"{error}. {_whole(prompts)}")
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error}. {_whole(prompts)}")


def on_device(scores: Any, name: str, prompts: list[Any], device: Any) -> Tensor:
    """Check the scores [B] that a ``score_rollout`` returned and move them, as float32.

    Raises:
        RewardError: no tensor of shape [B], or a score that is not finite.
    """
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward {name!r}: score_rollout returned {got}, expected a tensor of shape [{len(prompts)}]")
    scores = scores.detach().to(device).float()
    wrong = (~scores.isfinite()).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise complaint(name, row, f"score_rollout returned {scores[row].item()!r}, expected a finite number", prompts)
    return scores
