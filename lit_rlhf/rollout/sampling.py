"""How responses are sampled, and what a sampler is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.ranges import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response, its end token included.
        min_new_tokens: no end token among so many first tokens.
        temperature: logits are divided by it, here and wherever log-probabilities are recomputed; 0 = always the
            likeliest token.
        top_k: sample among the k likeliest tokens only; 0 = all.
        top_p: sample among the fewest tokens that hold this much probability; 1 = all.
        min_p: sample among tokens at least this fraction as likely as the likeliest; 0 = all.
        stop_ids: token ids that end a response; None = those of the model's generation config and the tokenizer.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        problems = {
            f"max_new_tokens is {self.max_new_tokens}; it must be at least 1": self.max_new_tokens < 1,
            f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens": not (
                0 <= self.min_new_tokens <= self.max_new_tokens
            ),
            f"temperature is {self.temperature}; it must be 0 (greedy) or more": not 0 <= self.temperature < math.inf,
            f"top_k is {self.top_k}; it must be 0 (all tokens) or more": self.top_k < 0,
            f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)": not 0 < self.top_p <= 1,
            f"min_p is {self.min_p}; it must be from 0 (all tokens) to 1": not 0 <= self.min_p <= 1,
        }
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(f"sampling.{problem}")
        for i, token in enumerate(self.stop_ids or ()):
            check_number(f"sampling.stop_ids[{i}]", token, least=0, whole=True)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether tokens that the policy gives a probability are never drawn.

        Then responses do not come from the policy whose log-probabilities are trained, and probability ratios and KL
        estimates are biased.
        """
        cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return not self.greedy and (cut or self.min_new_tokens > 0)


class Sampler(Protocol):
    """What makes responses: policy, prompts and settings in, rollout out.

    ``sampler_logprobs`` of the rollout are those of the sampler's own arithmetic, at ``sampling.temperature`` and
    before any filter. The same seed and row numbers (``prompts.rows``) give the same responses; processes
    of one run are given the same seed and other rows. Nothing of the policy (modes, weights, settings) and of
    the global random state is changed.
    """

    def __call__(
        self,
        policy: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        sampling: Sampling,
        *,
        seed: int,
    ) -> Rollout:
        """Sample one response for each prompt."""
        ...
