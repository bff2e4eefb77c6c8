"""What is done to scores before they are credited: running normalisation and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_rlhf.batch import Rollout


@dataclass
class Shaping:
    """How scores are brought to a known size.

    Args:
        running: take off the mean and divide by the standard deviation of all scores seen so far, this rollout's too.
        clip: largest absolute score, after that; unbounded if null.
    """

    running: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"shaping.clip is {self.clip}, expected a number above 0 (the largest absolute score)")


class ScoreShaping(nn.Module):
    """`Shaping` with its statistics, which stand in checkpoints.

    Args:
        settings: what to do.
    """

    moments: Tensor

    def __init__(self, settings: Shaping) -> None:
        super().__init__()
        self.settings = settings
        # Scores seen, their sum, and their squares' sum: these add up over processes and over time.
        self.register_buffer("moments", torch.zeros(3, dtype=torch.double))

    def forward(self, rollout: Rollout, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Shape the scores of a rollout, [B].

        Args:
            rollout: of this process.
            sum_over_ranks: adds a tensor up over the processes.

        Raises:
            MisconfigurationException: rewards judge steps, whose scores stand in these but are paid one by one.
        """
        scores = rollout.scores
        if rollout.step_scores is not None and (self.settings.running or self.settings.clip is not None):
            raise MisconfigurationException(
                "model.shaping brings the scores of whole responses to a known size, but a reward gives Steps, which "
                "are paid where they end: scale that reward itself, or leave out model.shaping."
            )
        if self.settings.running:
            here = scores.double()
            self.moments += sum_over_ranks(torch.stack([here.new_tensor(len(here)), here.sum(), here.square().sum()]))
            count, total, squares = self.moments
            mean = total / count
            spread = (squares / count - mean.square()).clamp(min=0).sqrt()
            scores = ((here - mean) / spread.clamp(min=1e-8)).to(scores.dtype) if spread > 0 else scores * 0.0
        return scores if self.settings.clip is None else scores.clamp(-self.settings.clip, self.settings.clip)


def step_rewards(rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of tokens that end a step [B, T], and what is left of the scores [B] for the whole response.

    Args:
        rollout: its ``step_scores`` are part of ``scores``; without them all is left.
        scores: [B].
    """
    of_steps = torch.zeros_like(rollout.old_logprobs)
    if rollout.step_scores is None or rollout.step_ends is None:
        return of_steps, scores
    counted = torch.where(rollout.step_ends >= 0, rollout.step_scores, 0.0)
    return of_steps.scatter_add(1, rollout.step_ends.clamp(min=0), counted), scores - counted.sum(dim=1)
