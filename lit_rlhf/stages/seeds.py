"""Random seeds as a pure function of where a run stands, so that no random state is stored and a resume is exact."""

from __future__ import annotations

import hashlib

STREAMS = ("sampling", "shuffling", "dropout", "noise", "validation", "initialisation")


def seed_for(seed: int, stream: str, *counters: int) -> int:
    """Derive an independent 63-bit seed from the run's seed, a named stream and any counters (rollout, rank).

    Args:
        seed: the run's seed.
        stream: one of ``STREAMS``; two streams never share a seed.
        counters: whatever tells this draw from the others, e.g. rollout index and rank.

    >>> seed_for(0, "sampling", 3, 1) == seed_for(0, "sampling", 3, 1) != seed_for(0, "sampling", 1, 3)
    True
    """
    if stream not in STREAMS:
        raise ValueError(f"no random stream {stream!r}; streams: {', '.join(STREAMS)}")
    digest = hashlib.blake2b(repr((seed, stream, *counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
