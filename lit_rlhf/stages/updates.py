"""The plan of a rollout's updates: which rows every microbatch of every optimizer step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.batch import Rollout


@dataclass
class Updates:
    """How many updates a rollout is good for.

    Args:
        epochs: passes over each rollout.
        minibatches: optimizer steps a pass.
        micro_batch_size: sequences a forward pass; bounds memory and changes no result. A whole minibatch if null.
        target_kl: stop a rollout's updates once a minibatch's approximate KL to the old policy passes this.
    """

    epochs: int = 1
    minibatches: int = 1
    micro_batch_size: int | None = None
    target_kl: float | None = None


class Plan:
    """The plan of K epochs × M minibatches × microbatches over one rollout, and where it stands."""

    def __init__(self, settings: Updates) -> None:
        self.epochs, self.minibatches, self.micro_batch_size = (
            settings.epochs,
            settings.minibatches,
            settings.micro_batch_size,
        )
        self.steps: list[list[Tensor]] = []
        self.clear()

    @property
    def empty(self) -> bool:
        """True until a rollout has been filled in."""
        return self.rollout is None

    def clear(self) -> None:
        """Forget the rollout and its metrics."""
        self.rollout: Rollout | None = None
        self.step = self.micro = 0
        self.metrics: list[tuple[int, float, dict[str, Tensor]]] = []

    def plan(self, rows: int, seed: int) -> None:
        """Decide which rows every microbatch of every optimizer step takes.

        The first epoch walks the rows as they were sampled and is cut exactly as the scoring pass is
        (:meth:`parts`), so that the log-probs of its first minibatch are those of the scoring pass to the last bit and
        the first ratio is exactly 1. Later epochs walk a fresh permutation each.

        Args:
            rows: sequences of the rollout.
            seed: of the permutations.

        Raises:
            MisconfigurationException: the rows do not divide into the minibatches.
        """
        if rows % self.minibatches:
            raise MisconfigurationException(
                f"a rollout of {rows} sequences does not divide into minibatches={self.minibatches}: change "
                f"model.updates.minibatches or data.batch_size (sequences = prompts × samples a prompt)."
            )
        generator = torch.Generator().manual_seed(seed)
        size = rows // self.minibatches
        self.steps = []
        for epoch in range(self.epochs):
            order = torch.arange(rows) if epoch == 0 else torch.randperm(rows, generator=generator)
            self.steps += [list(minibatch.split(self.micro_batch_size or size)) for minibatch in order.split(size)]

    def parts(self, rollout: Rollout) -> Iterator[Rollout]:
        """The rollout in the first epoch's microbatches, in order: what the scoring pass walks."""
        for rows in (rows for step in self.steps[: self.minibatches] for rows in step):
            yield rollout.select(rows).trim()

    def fill(self, rollout: Rollout, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take a finished rollout.

        Args:
            rollout: with advantages (and whatever else the loss reads).
            mean_over_ranks: averages a tensor over the processes; a step's token count must be the same on all of them
                so that averaged gradients are those of one token-weighted mean.
        """
        lengths = rollout.lengths.double()
        tokens = torch.stack([lengths[torch.cat(step).to(lengths.device)].sum() for step in self.steps])
        self.step_tokens = mean_over_ranks(tokens).tolist()
        self.rollout, self.step, self.micro = rollout, 0, 0

    def next(self) -> Rollout:
        """The next microbatch, with the size of the optimizer step it belongs to."""
        assert self.rollout is not None
        step = self.steps[self.step]
        part = self.rollout.select(step[self.micro]).trim()
        self.micro += 1
        return part.with_(
            step_tokens=max(self.step_tokens[self.step], 1.0), step_rows=float(sum(len(rows) for rows in step))
        )

    def record(self, metrics: dict[str, Tensor], part: Rollout) -> None:
        """Keep a microbatch's metrics, weighted by its tokens."""
        kept = {key: value.detach().float() for key, value in metrics.items()}
        self.metrics.append((self.step, float(part.mask.sum()), kept))

    def mean_metrics(self, step: int | None = None) -> dict[str, Tensor]:
        """Token-weighted means over all microbatches so far, or over those of one optimizer step."""
        chosen = [(weight, metrics) for s, weight, metrics in self.metrics if step in (None, s)]
        total = max(sum(weight for weight, _ in chosen), 1.0)
        return {key: torch.stack([w * metrics[key] for w, metrics in chosen]).sum() / total for key in chosen[0][1]}
