"""What becomes of the score of a response that never ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MissingEOS:
    """Punish responses that the length limit cut off, after all rewards were combined.

    ``replace`` with a score of −1 is what "The N+ Implementation Details of RLHF with PPO" does (Huang et al. 2024,
    arXiv 2403.17031): a reward model's opinion of an unfinished text means little. ``subtract`` keeps the order among
    the unfinished ones.

    Args:
        penalty: size of the punishment, in units of the score; not negative.
        how: ``replace`` the score by −penalty, or ``subtract`` the penalty from it.

    Raises:
        ValueError: a negative penalty or another ``how``.
    """

    penalty: float = 1.0
    how: Literal["replace", "subtract"] = "replace"

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"MissingEOS: penalty is {self.penalty}, expected a number of 0 or more (it is taken off)")
        if self.how not in ("replace", "subtract"):
            raise ValueError(f"MissingEOS: how is {self.how!r}, expected 'replace' or 'subtract'")

    def apply(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores [B] with the punishment where ``ended`` [B] (True = the response ends with a stop token) is False."""
        punished = torch.full_like(scores, -self.penalty) if self.how == "replace" else scores - self.penalty
        return torch.where(ended, scores, punished)
