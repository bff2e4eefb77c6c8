"""A price for length that rises towards the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to ``longest − cache`` tokens, then a straight line down to −1 at ``longest``, and −1 beyond.

    Source: Yu et al. 2025 (DAPO, arXiv 2503.14476) eq. 13, with L_max 20,480 and L_cache 4,096.

    Args:
        longest: L_max, tokens; a response of this length gets −1. Set it to ``sampling.max_new_tokens``.
        cache: L_cache, tokens over which the price rises.

    Raises:
        ValueError: not 0 < cache ≤ longest.
    """

    longest: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.longest:
            raise ValueError(f"SoftOverlong: cache is {self.cache}, expected 1 to longest={self.longest} tokens")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """The price of each response, from −1 to 0."""
        free = self.longest - self.cache
        return [-min(max((len(ids) - free) / self.cache, 0.0), 1.0) for ids in completion_ids]
