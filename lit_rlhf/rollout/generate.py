"""The plain sampler: transformers' ``generate`` with nothing left to chance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models.causal import stop_ids
from lit_rlhf.models.roles import evaluating
from lit_rlhf.models.sharding import gathered
from lit_rlhf.rollout.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Record:
    """Logits processor that notes the log-probability of each drawn token, then bans stop tokens while it is early.

    It runs before every other, so it sees the policy's own distribution. A token is known one call after its logits;
    one step's log-probabilities are held, never all of them.
    """

    def __init__(self, sampling: Sampling, stops: tuple[int, ...], prompt_length: int) -> None:
        self.sampling, self.stops, self.prompt_length = sampling, list(stops), prompt_length
        self.noted: list[Tensor] = []
        self.last: Tensor | None = None

    def note(self, ids: Tensor) -> None:
        """Note the last column of ``ids`` [B, …], which was drawn from the last distribution seen."""
        if self.last is not None:
            self.noted.append(self.last.gather(1, ids[:, -1:]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids)
        self.last = (scores.float() / (self.sampling.temperature or 1.0)).log_softmax(dim=-1)
        if self.stops and input_ids.shape[1] - self.prompt_length < self.sampling.min_new_tokens:
            scores = scores.clone()
            scores[:, self.stops] = -torch.inf
        return scores


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random streams of the CPU and of ``device``; put both back where they were afterwards.

    ``torch.random.fork_rng`` would do for CUDA, but not for Apple's mps.
    """
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    with torch.accelerator.device_index(device.index if accelerator else None):
        before = torch.get_rng_state(), accelerator.get_rng_state() if accelerator else None
        torch.random.default_generator.manual_seed(seed)
        if accelerator:
            accelerator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            if accelerator:
                accelerator.set_rng_state(before[1])


@contextmanager
def _plain_settings(policy: Any) -> Iterator[None]:
    """Hide the model's own generation config: ``generate`` fills from it whatever a caller leaves open."""
    from transformers import GenerationConfig

    own = policy.generation_config
    policy.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.generation_config = own


def _check_length(policy: Any, prompts: Prompts, sampling: Sampling) -> None:
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = int(prompts.mask.sum(dim=1).max())
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} make "
            f"{longest + sampling.max_new_tokens}, but the model has {limit} positions: lower sampling.max_new_tokens "
            "or the data's max_prompt_length"
        )


class GenerateSampler:
    """Sampler over transformers' ``generate``: any model it loads, any device, no server.

    The policy's own generation config counts for its stop ids and nothing else. Greedy responses (temperature 0) get
    their log-probabilities at temperature 1.
    """

    def __init__(self) -> None:
        self._warned = False

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
            policy: a causal language model; its modes are the same afterwards, also after an error.
            tokenizer: gives the padding id and the text of the responses.
            prompts: [B, P], left-padded; moved to the policy's device.
            sampling: settings.
            seed: of this call; the global random state is untouched.

        Returns:
            Rollout with ``sampler_logprobs`` [B, T], on the policy's device; T is the longest response's length.
        """
        if sampling.filtered and not self._warned:
            self._warned = True
            warnings.warn(
                f"sampling is filtered (top_k={sampling.top_k}, top_p={sampling.top_p}, "
                f"min_new_tokens={sampling.min_new_tokens}): responses are not drawn from the policy that is trained, "
                "so probability ratios and KL are biased",
                stacklevel=2,
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; lit_rlhf.models.load_tokenizer gives it one")
        prompts = prompts.to(policy.device)
        _check_length(policy, prompts, sampling)
        stops = stop_ids(policy, tokenizer) if sampling.stop_ids is None else tuple(sampling.stop_ids)
        record = _Record(sampling, stops, prompts.ids.shape[1])
        with evaluating(policy), gathered(policy), _plain_settings(policy), _seeded(policy.device, seed):
            drawn = self._generate(policy, tokenizer, prompts, sampling, stops, record)
        return _to_rollout(prompts, drawn, record, stops, tokenizer)

    @staticmethod
    def _generate(
        policy: Any, tokenizer: Any, prompts: Prompts, sampling: Sampling, stops: tuple[int, ...], record: _Record
    ) -> Tensor:
        from transformers import GenerationConfig, LogitsProcessorList

        random = {} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}
        settings = GenerationConfig(
            do_sample=not sampling.greedy,
            top_k=None if sampling.greedy else sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **random,
        )
        return policy.generate(
            input_ids=prompts.ids.masked_fill(~prompts.mask, 0),
            attention_mask=prompts.mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([record]),
            synced_gpus=False,  # the weights are gathered, so processes need not keep step
        )


def _to_rollout(prompts: Prompts, drawn: Tensor, record: _Record, stops: tuple[int, ...], tokenizer: Any) -> Rollout:
    """Cut each response after its first stop id; only lengths decide, since padding may be a stop id itself."""
    record.note(drawn)
    response = drawn[:, prompts.ids.shape[1] :]
    is_stop = torch.isin(response, torch.tensor(stops, dtype=response.dtype, device=response.device))
    ended = is_stop.any(dim=1)
    length = torch.where(ended, is_stop.int().argmax(dim=1) + 1, response.shape[1])
    mask = torch.arange(response.shape[1], device=response.device) < length[:, None]
    response = response.masked_fill(~mask, tokenizer.pad_token_id)
    texts = _continuations(tokenizer, prompts, [row[:n] for row, n in zip(response, length.tolist(), strict=True)])
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=response,
        mask=mask,
        ended=ended,
        prompts=prompts.prompts,
        completions=tuple(texts),
        columns=prompts.columns,
        sampler_logprobs=torch.cat(record.noted, dim=1).masked_fill(~mask, 0.0),
    )


def _continuations(tokenizer: Any, prompts: Prompts, responses: list[Tensor]) -> list[str]:
    """Text of each response as it goes on from its prompt.

    Decoded alone, a response loses the blank it begins with under many tokenizers, and prompt + completion would run
    two words into one.
    """
    heads = [ids[mask] for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    before = tokenizer.batch_decode(heads, skip_special_tokens=True)
    joined = [torch.cat([head, response]) for head, response in zip(heads, responses, strict=True)]
    whole = tokenizer.batch_decode(joined, skip_special_tokens=True)
    alone = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        text[len(head) :] if text.startswith(head) else response
        for head, text, response in zip(before, whole, alone, strict=True)
    ]
