"""The sampler over the model's own forward: prompts are read once, ended rows leave, log-probs are kept as drawn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models.cache import cache_bytes, new_cache, read_on
from lit_rlhf.models.fixed import cast_once, why_not_fixed
from lit_rlhf.models.roles import evaluating
from lit_rlhf.models.sharding import gathered
from lit_rlhf.models.switches import merged
from lit_rlhf.rollout.draw import draw, entropy_of, is_one_of, uniforms
from lit_rlhf.rollout.edges import finish, prepare, warn_if_filtered
from lit_rlhf.rollout.generate import GenerateSampler
from lit_rlhf.rollout.prefill import read_prompts
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.static import StaticDecode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAVE_AT = 0.05  # ended rows leave once they are this share: leaving copies the cache, staying computes for nothing
_LOOK_EVERY = 8  # on a GPU, steps between looks at who has ended: a look waits for all queued work


class DecodeSampler:
    """Sampler with a decode loop of its own, over the forward pass of any transformers decoder.

    Each distinct prompt is read once, however many responses it gets; keys and values stand in buffers allocated once;
    rows that have ended leave the batch; tokens come from the row's own random stream, so that the same seed gives the
    same responses however rows are batched or spread over processes. A model whose state is more than keys and values
    is left to transformers' ``generate``, and a warning says so once.

    Args:
        entropy: also keep the entropy of each token's distribution, as ``sampler_entropy``.
        cache_gb: memory for keys and values, in 2³⁰ bytes; a larger batch is sampled in parts. No limit if null.
        prefill_tokens: prompt tokens read in one forward pass.
        cuda_graphs: decode with fixed shapes and replay the step as a CUDA graph. Keys and values (``cache_gb`` bounds
            them), merged adapters and weights cast for autocast then keep their memory between rollouts. Without CUDA
            the same fixed shapes run uncaptured. Off until measured on your GPU with ``benchmarks/speed/gpu.py``.
    """

    def __init__(
        self,
        entropy: bool = False,
        cache_gb: float | None = None,
        prefill_tokens: int = 16_384,
        cuda_graphs: bool = False,
    ) -> None:
        self.entropy, self.cache_gb, self.prefill_tokens, self.cuda_graphs = (
            entropy,
            cache_gb,
            prefill_tokens,
            cuda_graphs,
        )
        self._warned = self._warned_of_shapes = False
        self._plain: GenerateSampler | None = None
        self._static: StaticDecode | None = None
        self._kept: dict[str, Tensor] = {}  # weights as decoding needs them, merged or cast

    @torch.no_grad()
    def __call__(
        self,
        policy: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        sampling: Sampling,
        *,
        seed: int,
    ) -> Rollout:
        """Sample one response for each prompt.

        Args:
            policy: a causal language model; its modes and weights are the same afterwards, also after an error.
            tokenizer: gives the padding id and the text of the responses.
            prompts: [B, P], left-padded; moved to the policy's device.
            sampling: settings.
            seed: of this call; with a row's number (``prompts.rows``) it decides what the row draws.

        Returns:
            Rollout with ``sampler_logprobs`` [B, T], on the policy's device; T is the longest response's length.
        """
        if new_cache(policy, 1) is None:
            return self._generate(policy, tokenizer, prompts, sampling, seed)
        if not self._warned:
            self._warned = sampling.filtered
            warn_if_filtered(sampling)
        prompts, stops = prepare(policy, tokenizer, prompts, sampling)
        numbers = torch.arange(len(prompts)) if prompts.rows is None else prompts.rows
        random = uniforms(seed, numbers.to(policy.device), sampling.max_new_tokens)
        with evaluating(policy):
            is_static = self.cuda_graphs and self._has_fixed_shapes(policy)
        decode, kept = (self._decode_static, self._kept) if is_static else (self._decode, None)
        with evaluating(policy), gathered(policy), merged(policy, kept), cast_once(policy, kept):
            parts = [
                decode(policy, prompts.select(rows), sampling, stops, random[rows.to(policy.device)])
                for rows in torch.arange(len(prompts)).split(self._rows_at_once(policy, prompts, sampling))
            ]
        width = max(part["ids"].shape[1] for part in parts)
        whole = {
            name: torch.cat([F.pad(part[name], (0, width - part[name].shape[1])) for part in parts])
            for name in parts[0]
        }
        return finish(tokenizer, prompts, whole.pop("ids"), stops, **whole)

    def _generate(self, policy: Any, tokenizer: Any, prompts: Prompts, sampling: Sampling, seed: int) -> Rollout:
        if self._plain is None:
            self._plain = GenerateSampler()
            warnings.warn(
                f"{type(policy).__name__} keeps more state than keys and values: it is sampled by transformers' "
                "generate, which is slower",
                stacklevel=3,
            )
        return self._plain(policy, tokenizer, prompts, sampling, seed=seed)

    def _has_fixed_shapes(self, policy: Any) -> bool:
        reason = why_not_fixed(policy)
        if reason is not None and not self._warned_of_shapes:
            self._warned_of_shapes = True
            warnings.warn(f"cuda_graphs does nothing for {type(policy).__name__}: {reason}", stacklevel=3)
        return reason is None

    def _rows_at_once(self, policy: Any, prompts: Prompts, sampling: Sampling) -> int:
        if self.cache_gb is None:
            return len(prompts)
        row = cache_bytes(policy) * (prompts.ids.shape[1] + sampling.max_new_tokens)
        return max(1, int(self.cache_gb * 2**30 / row))

    def _decode(
        self, policy: Any, prompts: Prompts, sampling: Sampling, stops: tuple[int, ...], random: Tensor
    ) -> dict[str, Tensor]:
        """Draw until all rows have ended or are as long as they may be; what stands after a stop id is of no use."""
        width, device = prompts.ids.shape[1], prompts.ids.device
        cache: Any = new_cache(policy, width + sampling.max_new_tokens)
        logits, padded = read_prompts(policy, cache, prompts.ids, prompts.mask, self.prefill_tokens)
        drawn = _Drawn(len(prompts), sampling.max_new_tokens, device, self.entropy)
        rows = torch.arange(len(prompts), device=device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        position, stop = prompts.mask.sum(dim=1), torch.tensor(stops, dtype=torch.long, device=device)
        mask = F.pad(prompts.mask, (0, sampling.max_new_tokens), value=True) if padded else None
        look_every = _look_every(device)
        for step in range(sampling.max_new_tokens):
            token, logprob = draw(logits, random[:, step], sampling, stop if step < sampling.min_new_tokens else None)
            drawn.note(step, rows, token, logprob, logits, sampling)
            ended = ended | is_one_of(token, stop)
            if step + 1 == sampling.max_new_tokens:
                break
            if (step + 1) % look_every == 0:
                live = len(rows) - int(ended.sum())
                if live == 0:
                    break
                if live <= (1 - _LEAVE_AT) * len(rows):
                    stay = cache.drop_rows(ended)
                    rows, ended, position, token, random = (x[stay] for x in (rows, ended, position, token, random))
                    mask = None if mask is None else mask[stay]
            seen = None if mask is None else mask[:, : width + step + 1]
            logits = read_on(policy, cache, token[:, None], seen, position[:, None])
            position = position + 1
        return drawn.columns(step + 1)

    def _decode_static(
        self, policy: Any, prompts: Prompts, sampling: Sampling, stops: tuple[int, ...], random: Tensor
    ) -> dict[str, Tensor]:
        """The same with fixed shapes, in the buffers of the last rollout where they are large enough."""
        rows, columns = len(prompts), prompts.ids.shape[1] + sampling.max_new_tokens
        if self._static is None or not self._static.fits(policy, rows, columns, sampling.max_new_tokens):
            self._static = None  # its memory goes first
            self._static = StaticDecode(policy, rows, columns, sampling.max_new_tokens, self.entropy)
        return self._static(
            policy,
            prompts,
            sampling,
            stops,
            random,
            prefill_tokens=self.prefill_tokens,
            look_every=_look_every(policy.device),
        )


def _look_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else _LOOK_EVERY


class _Drawn:
    """What has been drawn so far, [B, T] each, at the rows' original places."""

    def __init__(self, rows: int, steps: int, device: torch.device, entropy: bool) -> None:
        self.fields = {"ids": torch.zeros(rows, steps, dtype=torch.long, device=device)}
        for name in ("sampler_logprobs", "sampler_entropy")[: 1 + entropy]:
            self.fields[name] = torch.zeros(rows, steps, device=device)

    def note(self, step: int, rows: Tensor, token: Tensor, logprob: Tensor, logits: Tensor, sampling: Sampling) -> None:
        """Write one step's column for the rows that are still there."""
        self.fields["ids"][rows, step] = token
        self.fields["sampler_logprobs"][rows, step] = logprob
        if "sampler_entropy" in self.fields:
            self.fields["sampler_entropy"][rows, step] = entropy_of(logits, sampling)

    def columns(self, count: int) -> dict[str, Tensor]:
        """The first ``count`` columns of every field."""
        return {name: field[:, :count] for name, field in self.fields.items()}
