"""A minibatch of a rollout, and how it is cut into microbatches that fit the memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_rlhf.models.groups import cut_groups
from lit_rlhf.models.lengths import cut_by_length, padded_tokens


@dataclass
class Minibatch:
    """Rows that are cut into microbatches, of like length or with the answers to a prompt together.

    Args:
        rows: [n] long, their numbers in the rollout.
        which: [n] long, number of each one's prompt.
        prefix: [n] long, tokens of the prompt.
        rest: [n] long, tokens of the response.
        budget: tokens that a microbatch may read, padding included; no bound if null.
        overhead: what one more pass costs, in tokens.
        in_groups: whether the answers to a prompt were left together.
    """

    rows: Tensor
    which: Tensor
    prefix: Tensor
    rest: Tensor
    budget: int | None
    overhead: int
    in_groups: bool = False

    def cut(self) -> list[Tensor]:
        """As reading them costs least."""
        lengths = self.prefix + self.rest
        parts = cut_by_length(lengths, most_tokens=self.budget, overhead=self.overhead)
        if len(self.which.unique()) < len(self.rows):
            groups, cost = self._groups()
            self.in_groups = cost < padded_tokens(parts, lengths) + self.overhead * len(parts)
            parts = groups if self.in_groups else parts
        return [self.rows[part] for part in parts]

    def cut_into(self, count: int) -> list[Tensor]:
        """In the same way, into more parts than that would be."""
        if self.in_groups:
            parts, _ = self._groups(count)
        else:  # not one part more than it must make
            lengths = self.prefix + self.rest
            parts = cut_by_length(lengths, most_tokens=self.budget, overhead=2**40, at_least=count)
        return [self.rows[part] for part in parts]

    def _groups(self, count: int | None = None) -> tuple[list[Tensor], int]:
        return cut_groups(
            self.which, self.prefix, self.rest, most_tokens=self.budget, overhead=self.overhead, count=count
        )
