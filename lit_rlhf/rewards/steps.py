"""Rewards that judge the steps of a response one by one (process supervision)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards.protocol import complaint


@dataclass(frozen=True)
class Steps:
    """What a reward returns for a response whose steps it judges; as a number it is their sum.

    Args:
        scores: one a step, in any order.
        ends: for each step the index in ``completion_ids`` of its last token, from 0.
    """

    scores: Sequence[float]
    ends: Sequence[int]

    def __float__(self) -> float:
        return float(sum(self.scores))


def check_steps(results: list[Any], name: str, rollout: Rollout) -> list[Steps | None]:
    """What a reward said of steps, None for a row of which it said nothing; checked against the responses.

    Args:
        results: B values as the reward returned them, already known to be numbers.
        name: what the reward is called in errors.
        rollout: the responses judged.

    Raises:
        RewardError: not one end a score, or an end outside its response.
    """
    lengths, prompts = rollout.lengths.tolist(), list(rollout.prompts)
    found: list[Steps | None] = []
    for row, value in enumerate(results):
        found.append(value if isinstance(value, Steps) else None)
        if not isinstance(value, Steps):
            continue
        if len(value.scores) != len(value.ends):
            raise complaint(name, row, f"{len(value.scores)} step scores and {len(value.ends)} ends", prompts)
        wrong = [end for end in value.ends if not 0 <= end < lengths[row]]
        if wrong:
            problem = f"a step ends at token {wrong[0]} of a response that has tokens 0 to {lengths[row] - 1}"
            raise complaint(name, row, problem, prompts)
    return found


def padded_steps(found: list[tuple[float, list[Steps | None]]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted scores [B, S] and ends [B, S] of all steps of each response; −1 ends where there is no step.

    Args:
        found: for each reward its weight and what it said of each row.
        like: [B], gives dtype and device.
    """
    rows: list[list[tuple[float, int]]] = [[] for _ in like]
    for weight, said in found:
        for row, steps in zip(rows, said, strict=True):
            if steps is not None:
                row += [(weight * float(score), int(end)) for score, end in zip(steps.scores, steps.ends, strict=True)]
    width = max(1, *(len(row) for row in rows)) if rows else 1
    padded = [row + [(0.0, -1)] * (width - len(row)) for row in rows]
    scores = like.new_tensor([[score for score, _ in row] for row in padded])
    return scores, torch.tensor([[end for _, end in row] for row in padded], device=like.device)
