"""Decoding with fixed shapes: every step does the same work on the same memory, so that it can be a CUDA graph."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts
from lit_rlhf.models.fixed import fixed_cache, read_at, storage
from lit_rlhf.rollout.draw import draw, entropy_of, is_one_of
from lit_rlhf.rollout.prefill import read_prompts
from lit_rlhf.rollout.replay import Replay, without_weight_cache
from lit_rlhf.rollout.sampling import Sampling

_LEAST = 8  # rows: with fewer, a step is no faster
_COLUMNS = 64  # room goes up in such steps, so that the next batch's longest prompt fits the buffers of this one


def sizes_of(rows: int) -> list[int]:
    """Give the batch sizes at which ``rows`` rows are decoded: multiples of 8, from the first on about half each time.

    A graph holds for one size only, and rows that ended leave when those that remain fit the next.

    >>> sizes_of(100)
    [104, 56, 32, 16, 8]
    """
    sizes = [-(-rows // _LEAST) * _LEAST]
    while sizes[-1] > _LEAST:
        sizes.append(-(-(sizes[-1] // 2) // _LEAST) * _LEAST)
    return sizes


class StaticDecode:
    """Buffers for batches of up to so many rows, columns and new tokens, and the steps recorded over them.

    All that a step reads and writes stands in tensors that stay where they are: which column is written, which step it
    is, who has ended. Nothing comes back to Python but, at a look, how many rows are still there.

    Args:
        policy: the model; it is not kept alive.
        rows: most rows of a batch.
        columns: most tokens of a row, prompt and response together.
        steps: most new tokens.
        entropy: keep the entropies too.
    """

    def __init__(self, policy: Any, rows: int, columns: int, steps: int, entropy: bool) -> None:
        device = policy.device
        self.policy, self.autocast = weakref.ref(policy), _autocast(device)
        self.sizes, self.columns = sizes_of(rows), -(-columns // _COLUMNS) * _COLUMNS
        rows = self.sizes[0]
        self.column, self.step = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.token, self.position, self.place = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seen = torch.zeros(rows, self.columns, dtype=torch.bool, device=device)
        self.random = torch.zeros(rows, steps, 2, device=device)
        # One row more than there are: rows that only fill up the batch write there.
        self.drawn = {"ids": torch.zeros(rows + 1, steps, dtype=torch.long, device=device)}
        for name in ("sampler_logprobs", "sampler_entropy")[: 1 + entropy]:
            self.drawn[name] = torch.zeros(rows + 1, steps, device=device)
        self.stops: dict[tuple[int, ...], Tensor] = {}
        self.cache = fixed_cache(policy, self.columns, self.column)
        self.replay, self.made_for = Replay(device), storage(policy)

    def fits(self, policy: Any, rows: int, columns: int, steps: int) -> bool:
        """Say whether a batch can be decoded in these buffers."""
        return (
            self.ended.device == policy.device
            and self.policy() is policy
            and self.autocast == _autocast(self.ended.device)
            and rows <= self.sizes[0]
            and columns <= self.columns
            and steps <= self.random.shape[1]
        )

    def __call__(
        self,
        policy: Any,
        prompts: Prompts,
        sampling: Sampling,
        stops: tuple[int, ...],
        random: Tensor,
        *,
        prefill_tokens: int,
        look_every: int,
    ) -> dict[str, Tensor]:
        """Draw until all rows have ended or are as long as they may be.

        Args:
            policy: the model these buffers were made for.
            prompts: [B, P], left-padded, on its device.
            sampling: settings.
            stops: ids that end a response.
            random: [B, max_new_tokens, 2].
            prefill_tokens: prompt tokens read in one forward pass.
            look_every: steps between looks at who has ended.

        Returns:
            Of each token drawn, [B, T]; what stands after a stop id is of no use.
        """
        if self.made_for != storage(policy):
            self.replay.forget()
            self.made_for = storage(policy)
        stop = self.stops.setdefault(stops, torch.tensor(stops, dtype=torch.long, device=random.device))
        size = min(size for size in self.sizes if size >= len(prompts))
        logits = self._begin(policy, prompts, random, size, prefill_tokens)
        self._draw(size, logits, sampling, stop, early=sampling.min_new_tokens > 0)
        done = 1
        while done < sampling.max_new_tokens:
            if done % look_every == 0:
                live = size - int(self.ended[:size].sum())
                if live == 0:
                    break
                next_size = min(other for other in self.sizes if other >= live)
                if next_size < size:
                    size = self._leave(size, next_size)
            early = done < sampling.min_new_tokens
            self.replay(
                (size, early, stops, _settings(sampling)),
                lambda size=size, early=early: self._advance(policy, size, sampling, stop, early),  # type: ignore[misc]
            )
            done += 1
        return {name: field[: len(prompts), :done].clone() for name, field in self.drawn.items()}

    def _begin(self, policy: Any, prompts: Prompts, random: Tensor, size: int, prefill_tokens: int) -> Tensor:
        """Read the prompts; rows that fill up the batch are copies of the last one which have ended."""
        count, width = prompts.ids.shape
        rows = torch.arange(size, device=prompts.ids.device)
        of = rows.clamp(max=count - 1)
        self.cache.restart(size)
        logits, _ = read_prompts(policy, self.cache, prompts.ids[of], prompts.mask[of], prefill_tokens)
        self.column.fill_(width)
        self.step.zero_()
        self.position[:size] = prompts.mask.sum(dim=1)[of]
        self.seen[:size] = False
        self.seen[:size, :width] = prompts.mask[of]
        self.random[:size, : random.shape[1]] = random[of]
        self.place[:size] = rows.masked_fill(rows >= count, self.sizes[0])
        self.ended[:size] = rows >= count
        return logits

    def _advance(self, policy: Any, size: int, sampling: Sampling, stop: Tensor, early: bool) -> None:
        """Read the last token drawn and draw the next: the step that is recorded."""
        self.seen[:size].index_fill_(1, self.column, True)
        with without_weight_cache(self.column.device):
            logits = read_at(policy, self.cache, self.token[:size, None], self.seen[:size], self.position[:size, None])
        self.position[:size].add_(1)
        self.column.add_(1)
        self._draw(size, logits, sampling, stop, early)

    def _draw(self, size: int, logits: Tensor, sampling: Sampling, stop: Tensor, early: bool) -> None:
        """Draw a token a row, write down what belongs to it, move to the next step."""
        uniform = self.random[:size].index_select(1, self.step).squeeze(1)
        token, logprob = draw(logits, uniform, sampling, stop if early else None)
        where = self.place[:size], self.step.expand(size)
        self.drawn["ids"].index_put_(where, token)
        self.drawn["sampler_logprobs"].index_put_(where, logprob)
        if "sampler_entropy" in self.drawn:
            self.drawn["sampler_entropy"].index_put_(where, entropy_of(logits, sampling))
        self.token[:size].copy_(token)
        self.ended[:size].logical_or_(is_one_of(token, stop))
        self.step.add_(1)

    def _leave(self, size: int, next_size: int) -> int:
        """Let so many ended rows leave that ``next_size`` rows remain; rows from the end take their places."""
        ended = self.ended[:size]
        now = self.cache.drop_rows(ended & (ended.cumsum(dim=0) <= size - next_size))
        for buffer in (self.token, self.position, self.place, self.ended, self.seen, self.random):
            buffer[:next_size] = buffer[now]
        return next_size


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _settings(sampling: Sampling) -> tuple[float, ...]:
    """What of the settings a step holds."""
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
