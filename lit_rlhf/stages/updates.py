"""The plan of a rollout's updates: which rows every microbatch of every optimizer step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.batch import Examples, Rollout
from lit_rlhf.models.lengths import pass_tokens
from lit_rlhf.models.prefix import number_rows
from lit_rlhf.stages.minibatch import Minibatch
from lit_rlhf.stages.settings import Updates

TermT = TypeVar("TermT")

_FORWARD_ONLY = 4  # without a backward pass activations are not kept: so many times as many tokens fit a pass


class Plan:
    """The plan of K epochs × M minibatches × microbatches over one rollout, and where it stands."""

    def __init__(self, settings: Updates) -> None:
        self.settings, self.turns = settings, 1
        self.most_tokens = settings.micro_batch_tokens
        self.clear()

    def bound(self, tokens: int) -> None:
        """Let no microbatch to come read more tokens than these."""
        self.most_tokens = min(tokens, self.most_tokens or tokens)

    @property
    def empty(self) -> bool:
        """True until a rollout has been filled in."""
        return self.rollout is None

    @property
    def count(self) -> int:
        """Optimizer steps a rollout."""
        return self.settings.epochs * self.settings.minibatches

    @property
    def more(self) -> bool:
        """Whether the current optimizer step has backward passes left."""
        return self.passes < len(self.steps[self.step]) * self.turns

    @property
    def at_last(self) -> bool:
        """Whether the next backward pass is the last of its optimizer step; true while there is no plan."""
        return not self.steps or self.passes == len(self.steps[self.step]) * self.turns - 1

    @property
    def idle(self) -> bool:
        """Whether nothing at all counts in the current optimizer step, on any rank."""
        tokens, _, of_texts = self.counts[self.step]
        return not tokens + of_texts

    def clear(self) -> None:
        """Forget the rollout, its plan and its metrics."""
        self.rollout: Rollout | None = None
        self.steps: list[list[Tensor]] = []
        self.minibatches: list[Minibatch] = []  # one a step
        self.wide: list[Tensor] = []
        self.step = self.passes = 0
        self.metrics: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self.pretraining: Examples | None = None
        self.counts: list[list[float]] = []  # of each step: response tokens, responses, pretraining tokens

    def refuse_remainder(self, rows: int) -> None:
        """Refuse a rollout that cannot be divided.

        Raises:
            MisconfigurationException: the rows do not divide into the minibatches.
        """
        if rows % self.settings.minibatches:
            raise MisconfigurationException(
                f"a rollout of {rows} sequences does not divide into minibatches={self.settings.minibatches}: change "
                f"model.updates.minibatches or data.batch_size (sequences = prompts × samples a prompt)."
            )

    def draw_up(
        self, rollout: Rollout, seed: int, max_over_ranks: Callable[[Tensor], Tensor], shares: bool = False
    ) -> None:
        """Decide which rows every microbatch of every optimizer step takes.

        The first epoch takes the rows in the order in which they were sampled, and the scoring pass reads its very
        microbatches (:meth:`parts`), so that the log-probs of the first minibatch are those of that pass to the last
        bit. Later epochs take a fresh permutation each. Within a minibatch rows of like length go together, or the
        answers to a prompt, whichever is cheaper to read.

        Args:
            rollout: prompts and responses.
            seed: of the permutations; the same on every rank.
            max_over_ranks: elementwise maximum over the processes. All make the same number of passes, since sharded
                weights are gathered once a pass.
            shares: whether a prompt is read once for the answers to it that a microbatch holds.
        """
        rows, device = len(rollout), rollout.mask.device
        prefix, rest = torch.stack([rollout.prompt_mask.sum(dim=1), rollout.lengths]).cpu()
        which = number_rows(rollout.prompt_ids, rollout.prompt_mask) if shares else torch.arange(rows)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.arange(rows)]
        orders += [torch.randperm(rows, generator=generator) for _ in range(1, self.settings.epochs)]
        minibatches = [part for order in orders for part in order.split(rows // self.settings.minibatches)]
        most = self.most_tokens
        budgets = [most] * len(minibatches) + [None if most is None else _FORWARD_ONLY * most]
        tasks = [
            Minibatch(whole, which[whole], prefix[whole], rest[whole], budget, pass_tokens(device))
            for whole, budget in zip([*minibatches, orders[0]], budgets, strict=True)
        ]
        *self.steps, self.wide = _cut(tasks, max_over_ranks, device)
        self.minibatches = tasks[:-1]

    @property
    def largest(self) -> int:
        """Tokens, padding included, of the current step's largest microbatch that could be cut; 0 if none could."""
        whole = self.minibatches[self.step]
        lengths = torch.zeros(int(whole.rows.max()) + 1, dtype=torch.long)
        lengths[whole.rows] = whole.prefix + whole.rest
        return max((len(rows) * int(lengths[rows].max()) for rows in self.steps[self.step] if len(rows) > 1), default=0)

    def recut(self, most_tokens: int, max_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Begin the current step anew, it and those after it in microbatches of fewer tokens.

        Args:
            most_tokens: that a microbatch may read, padding included.
            max_over_ranks: as in `draw_up`.
        """
        assert self.rollout is not None
        self.bound(most_tokens)
        rest = [dataclasses.replace(one, budget=self.most_tokens) for one in self.minibatches[self.step :]]
        self.steps[self.step :] = _cut(rest, max_over_ranks, self.rollout.mask.device)
        self.metrics = [found for found in self.metrics if found[0] != self.step]
        self.passes = 0

    def parts(self, like_updates: bool) -> list[Tensor]:
        """Row numbers of each forward pass over the whole rollout: the first epoch's microbatches, or wider ones."""
        if like_updates:
            return [rows for step in self.steps[: self.settings.minibatches] for rows in step]
        return self.wide

    def fill(
        self,
        rollout: Rollout,
        mean_over_ranks: Callable[[Tensor], Tensor],
        pretraining: Examples | None = None,
    ) -> None:
        """Take a finished rollout.

        Args:
            rollout: with advantages (and whatever else the loss reads).
            mean_over_ranks: averages a tensor over the processes; a step's token count must be the same on all of them
                so that averaged gradients are those of one token-weighted mean.
            pretraining: texts that are learned beside it, each once an epoch, shared out over the epoch's steps.
        """
        lengths, counts = rollout.lengths.double(), []
        self.rollout, self.pretraining, self.step, self.passes = rollout, pretraining, 0, 0
        for step, parts in enumerate(self.steps):
            own = lengths[torch.cat(parts).to(lengths.device)]
            texts = self._texts(step)
            of_texts = own.new_zeros(()) if texts is None else texts.loss_mask[:, 1:].sum().double()
            counts.append(torch.stack([own.sum(), (own > 0).sum().double(), of_texts]))
        self.counts = mean_over_ranks(torch.stack(counts)).tolist()

    def _texts(self, step: int, place: int = 0, of: int = 1) -> Examples | None:
        """Pretraining texts of a step, or of the microbatch at ``place`` among its ``of``."""
        if self.pretraining is None:
            return None
        rows = torch.arange(len(self.pretraining))[step % self.settings.minibatches :: self.settings.minibatches]
        own = rows[place::of]
        if len(own):
            return self.pretraining.select(own)
        nothing = self.pretraining.select(rows[:1])  # every pass must reach the loss: one text that counts nowhere
        return nothing.with_(loss_mask=torch.zeros_like(nothing.loss_mask))

    def next(self) -> Rollout:
        """The next microbatch, with the size of the optimizer step it belongs to; once a turn."""
        assert self.rollout is not None
        step, place = self.steps[self.step], self.passes // self.turns
        part = self.rollout.select(step[place]).trim()
        self.passes += 1
        tokens, rows, of_texts = self.counts[self.step]
        return part.with_(
            step_tokens=max(tokens, 1.0),
            step_rows=max(rows, 1.0),
            pretraining=self._texts(self.step, place, len(step)),
            pretraining_tokens=max(of_texts, 1.0),
        )

    def whose_turn(self, *terms: TermT) -> tuple[TermT, ...]:
        """Those of a loss's terms, one a network, that the pass just begun computes."""
        return terms if self.turns == 1 else (terms[(self.passes - 1) % self.turns],)

    def record(self, metrics: dict[str, Tensor], part: Rollout) -> None:
        """Keep a microbatch's metrics, weighted by its tokens; what several turns name alike adds up."""
        kept = {key: value.detach().float() for key, value in metrics.items()}
        if (self.passes - 1) % self.turns:
            _, _, before = self.metrics[-1]
            before |= {key: value + before[key] if key in before else value for key, value in kept.items()}
        else:
            self.metrics.append((self.step, part.mask.sum().float(), kept))

    def mean_metrics(self, step: int | None = None) -> dict[str, Tensor]:
        """Token-weighted means over all microbatches so far, or over those of one optimizer step."""
        chosen = [(weight, metrics) for s, weight, metrics in self.metrics if step in (None, s)]
        weights = torch.stack([weight for weight, _ in chosen])
        total = weights.sum().clamp(min=1.0)
        return {key: (weights * torch.stack([found[key] for _, found in chosen])).sum() / total for key in chosen[0][1]}


def _cut(
    wholes: list[Minibatch], max_over_ranks: Callable[[Tensor], Tensor], device: torch.device
) -> list[list[Tensor]]:
    """Row numbers of the microbatches of each, as many of them on all ranks."""
    cuts = [whole.cut() for whole in wholes]
    counts = max_over_ranks(torch.tensor([len(parts) for parts in cuts], device=device)).tolist()
    return [
        whole.cut_into(count) if count > len(parts) else parts
        for whole, parts, count in zip(wholes, cuts, counts, strict=True)
    ]
