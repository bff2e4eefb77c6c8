"""Several rewards, weighted, as one score a response."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards.protocol import Reward, RewardError, accepted, checked, complaint, failure, on_device, reward_name
from lit_rlhf.rewards.steps import Steps, check_steps, padded_steps
from lit_rlhf.rewards.waiting import wait_for

__all__ = ["Reward", "RewardError", "Rewards"]

RESERVED = ("prompts", "completions", "completion_ids")


_Said: TypeAlias = "tuple[list[float] | Tensor, list[Steps | None] | None]"  # values, and what was said of steps


class Rewards(nn.Module):
    """Weighted sum of rewards: ``scores[b] = Σᵢ wᵢ · rᵢ[b]`` over the rewards that apply to row b.

    A reward is called ``f(prompts=…, completions=…, completion_ids=…, **columns)`` with lists of B entries and returns
    B numbers; None = does not apply to this row, and then counts as nothing. It gets the columns that it names, all of
    them if it takes ``**columns``. Prompts are as the dataset holds them (text, or a list of messages), completions are
    plain text, ``completion_ids`` are token ids without padding, the ending token included. ``async def`` works; all
    asynchronous rewards of a call run concurrently. What has a method ``score_rollout(rollout) -> Tensor [B]``, such as
    ``RewardModel``, is given the rollout and its token ids instead. What has ``bind(tokenizer)`` gets the policy's;
    what has ``attach(policy)`` gets the policy itself, before it is sharded.

    Args:
        rewards: functions, objects and modules; classes are given as instances.
        weights: a factor for each reward, 0 = computed and logged only; all 1 if null.

    Raises:
        ValueError: no rewards, something that cannot be called, or weights that do not fit.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.rewards = list(rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(weight) for weight in weights]
        _check_rewards(self.rewards)
        _check_weights(self.weights, len(self.rewards))
        self.names: list[str] = []
        for reward in self.rewards:
            name = candidate = reward_name(reward)
            number = 1
            while candidate in self.names:
                number += 1
                candidate = f"{name}_{number}"
            self.names.append(candidate)
        # Known to PyTorch, so that a reward model moves with the stage that holds it.
        self.networks = nn.ModuleList(reward for reward in self.rewards if isinstance(reward, nn.Module))

    def bind(self, tokenizer: Any, policy: Any = None) -> None:
        """Tell the rewards that ask for them the policy's tokenizer (``bind``) and the policy (``attach``)."""
        for reward in self.rewards:
            if hasattr(reward, "bind"):
                reward.bind(tokenizer)
            if policy is not None and hasattr(reward, "attach"):
                reward.attach(policy)

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Judge the responses.

        Args:
            rollout: B responses with prompts, completions and columns.

        Returns:
            scores [B] and, by the name of each reward, its own values [B] before weighting, NaN where it does not
            apply. All float32, on the rollout's device.

        Raises:
            RewardError: a reward raised, asked for a column that there is not, returned anything but B finite numbers
                or None; or no reward (of a weight other than 0) applies to a row.
        """
        scores, parts, _ = self._judged(rollout)
        return scores, parts

    def _judged(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor], dict[str, list[Steps | None]]]:
        """Scores, the rewards' own values, and what those that judge steps said of them."""
        device = rollout.response_ids.device
        if len(rollout) == 0:
            empty = torch.zeros(0, device=device)
            return empty, {name: empty.clone() for name in self.names}, {}
        prompts = list(rollout.prompts)
        parts: dict[str, Tensor] = {}
        steps: dict[str, list[Steps | None]] = {}
        for name, (result, of_steps) in zip(self.names, self._results(rollout, prompts), strict=True):
            if not isinstance(result, Tensor):
                result = torch.tensor(result, dtype=torch.float32, device=device)
            parts[name] = result
            if of_steps is not None:
                steps[name] = of_steps
        values = torch.stack(list(parts.values()), dim=1)  # [B, rewards]
        weights = torch.tensor(self.weights, device=device)
        applies = ~values.isnan()
        unjudged = (~(applies & (weights != 0)).any(dim=1)).nonzero()
        if unjudged.numel():
            names = ", ".join(name for name, weight in zip(self.names, self.weights, strict=True) if weight)
            raise complaint(names, int(unjudged[0]), "every value is None: no reward applies to this row", prompts)
        return (values.nan_to_num(nan=0.0) * weights).sum(dim=1), parts, steps

    def judge(self, rollout: Rollout) -> Rollout:
        """Judge the responses: the rollout gains ``scores`` and ``parts``, and those of steps where there are any."""
        scores, parts, steps = self._judged(rollout)
        rollout = rollout.with_(scores=scores, parts=parts)
        weights = dict(zip(self.names, self.weights, strict=True))
        if not any(weights[name] for name in steps):
            return rollout
        of_steps, ends = padded_steps([(weights[name], said) for name, said in steps.items()], scores)
        # Added up, not left over: rounding in a difference would look like a signal once a group is scaled.
        whole = torch.zeros_like(scores)
        for name, values in parts.items():
            is_whole = [said is None for said in steps[name]] if name in steps else [True] * len(values)
            values = torch.where(torch.tensor(is_whole, device=values.device), values.nan_to_num(nan=0.0), 0.0)
            whole = whole + values * weights[name]
        return rollout.with_(outcomes=whole, step_scores=of_steps, step_ends=ends)

    def weighed(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values [B, R] of the rewards whose weight is not 0 (NaN where one does not apply), and their weights [R]."""
        assert rollout.parts is not None
        chosen = [(name, weight) for name, weight in zip(self.names, self.weights, strict=True) if weight]
        values = torch.stack([rollout.parts[name] for name, _ in chosen], dim=1)
        return values, values.new_tensor([weight for _, weight in chosen])

    def _results(self, rollout: Rollout, prompts: list[Any]) -> list[_Said]:
        """Checked values of every reward, in order; the asynchronous ones run together at the end."""
        arguments = _arguments(rollout, prompts)
        results: list[Any] = [None] * len(self.rewards)
        waiting: dict[int, Awaitable[Any]] = {}
        try:
            for i, (reward, name) in enumerate(zip(self.rewards, self.names, strict=True)):
                result = _call(reward, name, rollout, prompts, arguments)
                if inspect.isawaitable(result):
                    waiting[i] = result
                else:
                    results[i] = result
        except BaseException:
            for awaitable in waiting.values():
                if inspect.iscoroutine(awaitable):
                    awaitable.close()  # else Python warns that it was never awaited
            raise
        if waiting:
            for i, result in zip(waiting, wait_for(list(waiting.values())), strict=True):
                if isinstance(result, BaseException):
                    raise failure(result, self.names[i], prompts) from result
                results[i] = _said(result, self.names[i], rollout, prompts)
        return results


def _arguments(rollout: Rollout, prompts: list[Any]) -> dict[str, Any]:
    taken = [key for key in RESERVED if key in rollout.columns]
    if taken:
        raise RewardError(f"rename the dataset's column {taken[0]!r}: rewards are given something else by that name")
    ids = zip(rollout.response_ids.tolist(), rollout.mask.tolist(), strict=True)
    return {
        "prompts": prompts,
        "completions": list(rollout.completions),
        "completion_ids": [[token for token, counts in zip(*row, strict=True) if counts] for row in ids],
        **{key: list(column) for key, column in rollout.columns.items()},
    }


def _call(reward: Reward, name: str, rollout: Rollout, prompts: list[Any], arguments: dict[str, Any]) -> Any:
    """What a reward said (a tensor [B], or a list), checked, or what to wait for if it is asynchronous."""
    by_ids = getattr(reward, "score_rollout", None)
    # Each reward gets lists of its own: one that sorts its argument in place must not mislead the next.
    own = {} if by_ids else {key: list(value) for key, value in accepted(reward, name, arguments).items()}
    try:
        result = by_ids(rollout) if by_ids else reward(**own)
    except Exception as error:
        raise failure(error, name, prompts) from error
    if by_ids:
        return on_device(result, name, prompts, rollout.response_ids.device), None
    return result if inspect.isawaitable(result) else _said(result, name, rollout, prompts)


def _said(result: Any, name: str, rollout: Rollout, prompts: list[Any]) -> _Said:
    values = checked(result, name, prompts)
    has_steps = isinstance(result, (list, tuple)) and any(isinstance(value, Steps) for value in result)
    return values, check_steps(list(result), name, rollout) if has_steps else None


def _check_rewards(rewards: list[Reward]) -> None:
    if not rewards:
        raise ValueError("rewards is empty: give at least one reward")
    for i, reward in enumerate(rewards):
        if isinstance(reward, type):
            raise ValueError(f"rewards[{i}] is the class {reward.__name__}: give an instance, {reward.__name__}(...)")
        if not callable(reward) and not hasattr(reward, "score_rollout"):
            raise ValueError(
                f"rewards[{i}] is {reward!r}, which cannot be called: give a function f(prompts, completions, "
                "**columns) (in YAML its dotted path, or class_path and init_args)"
            )


def _check_weights(weights: list[float], rewards: int) -> None:
    if len(weights) != rewards:
        raise ValueError(f"{len(weights)} reward weights for {rewards} rewards: give one a reward, or none")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights must be finite numbers: {weights}")
    if not any(weights):
        raise ValueError("every reward weight is 0: nothing would be learned. A weight of 0 means logged only")
