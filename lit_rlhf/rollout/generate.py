"""The plain sampler: transformers' ``generate`` with nothing left to chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models.roles import evaluating
from lit_rlhf.models.sharding import gathered
from lit_rlhf.rollout.edges import finish, prepare, warn_if_filtered
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
        # One NaN makes all of a row's log-probabilities NaN. It is refused in the end; drawing from it would fail
        # without saying of which row, and on a GPU take the process down.
        scores = scores.masked_fill(self.last[:, :1].isnan(), 0.0)
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


def _own_seed(prompts: Prompts, seed: int) -> int:
    """A seed of this process's own: its first row's number tells it from the others that were given the same seed."""
    first = 0 if prompts.rows is None else int(prompts.rows[0])
    return (seed + first * 0x9E3779B97F4A7C15) % 2**63


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
        if not self._warned:
            self._warned = sampling.filtered
            warn_if_filtered(sampling)
        prompts, stops = prepare(policy, tokenizer, prompts, sampling)
        record = _Record(sampling, stops, prompts.ids.shape[1])
        seed = _own_seed(prompts, seed)
        with evaluating(policy), gathered(policy), _plain_settings(policy), _seeded(policy.device, seed):
            drawn = self._generate(policy, tokenizer, prompts, sampling, stops, record)
        record.note(drawn)
        response = drawn[:, prompts.ids.shape[1] :]
        return finish(tokenizer, prompts, response, stops, torch.cat(record.noted, dim=1))

    @staticmethod
    def _generate(
        policy: Any, tokenizer: Any, prompts: Prompts, sampling: Sampling, stops: tuple[int, ...], record: _Record
    ) -> Tensor:
        from transformers import GenerationConfig, LogitsProcessorList

        random = {} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.min_p and not sampling.greedy:
            random["min_p"] = sampling.min_p
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
