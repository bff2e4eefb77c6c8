"""What every sampler does before the first token and after the last: check, warn, cut, give back the text."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models.causal import stop_ids
from lit_rlhf.ranges import SettingError
from lit_rlhf.rollout.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, sampling: Sampling
) -> tuple[Prompts, tuple[int, ...]]:
    """Refuse what cannot be sampled; give the prompts on the policy's device and the ids that end a response.

    Raises:
        ValueError: no pad token.
        SettingError: prompt and response would not fit the model's positions.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; lit_rlhf.models.load_tokenizer gives it one")
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = int(prompts.mask.sum(dim=1).max())
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise SettingError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} make "
            f"{longest + sampling.max_new_tokens}, but the model has {limit} positions: lower sampling.max_new_tokens "
            "or the data's max_prompt_length"
        )
    stops = stop_ids(policy, tokenizer) if sampling.stop_ids is None else tuple(sampling.stop_ids)
    return prompts.to(policy.device), stops


def warn_if_filtered(sampling: Sampling) -> None:
    """Say that filtered sampling biases ratios and KL; a sampler asks once."""
    if sampling.filtered:
        warnings.warn(
            f"sampling is filtered (top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p}, "
            f"min_new_tokens={sampling.min_new_tokens}): responses are not drawn from the policy that is trained, "
            "so probability ratios and KL are biased",
            stacklevel=3,
        )


def finish(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    response: Tensor,
    stops: tuple[int, ...],
    sampler_logprobs: Tensor,
    sampler_entropy: Tensor | None = None,
) -> Rollout:
    """Make the record: cut each response after its first stop id.

    Only lengths decide what counts, since padding may be a stop id itself.

    Args:
        tokenizer: gives the padding id and the text.
        prompts: [B, P].
        response: [B, T] ids as drawn, anything after a stop id.
        stops: ids that end a response.
        sampler_logprobs: [B, T] of the tokens as drawn; set to 0 outside the responses.
        sampler_entropy: the same of the distributions' entropy.

    Raises:
        FloatingPointError: a log-probability is not finite, as where the policy's logits were not.
    """
    is_stop = torch.isin(response, torch.tensor(stops, dtype=response.dtype, device=response.device))
    ended = is_stop.any(dim=1)
    length = torch.where(ended, is_stop.int().argmax(dim=1) + 1, response.shape[1])
    longest = int(length.max()) if len(response) else 0
    mask = torch.arange(longest, device=response.device) < length[:, None]
    _refuse_nonfinite(prompts, sampler_logprobs[:, :longest].isfinite() | ~mask)
    response = response[:, :longest].masked_fill(~mask, tokenizer.pad_token_id)
    texts = _continuations(tokenizer, prompts, response, length.tolist())
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=response,
        mask=mask,
        ended=ended,
        prompts=prompts.prompts,
        completions=tuple(texts),
        columns=prompts.columns,
        sampler_logprobs=sampler_logprobs[:, :longest].masked_fill(~mask, 0.0),
        sampler_entropy=None if sampler_entropy is None else sampler_entropy[:, :longest].masked_fill(~mask, 0.0),
    )


def _refuse_nonfinite(prompts: Prompts, sound: Tensor) -> None:
    """Looked at once, when all is drawn: a look at every step would make a GPU wait for each."""
    wrong = (~sound.all(dim=1)).nonzero().flatten().tolist()
    if wrong:
        steps = sound.int().argmin(dim=1).tolist()  # of each row the first that is not
        shown = [
            f"row {row} from token {steps[row]} ({' '.join(str(prompts.prompts[row]).split())[:40]!r})"
            for row in wrong[:4]
        ]
        raise FloatingPointError(
            f"the policy's logits are not finite (NaN or infinite) for {len(wrong)} of {len(sound)} prompts: "
            f"{', '.join(shown)}. Its weights are damaged, or overflow in this precision: go back to an earlier "
            "checkpoint, lower optim.lr, set trainer.gradient_clip_val, or train in 32-true or bf16-mixed"
        )


def _continuations(tokenizer: Any, prompts: Prompts, response: Tensor, lengths: list[int]) -> list[str]:
    """Text of each response as it goes on from its prompt.

    Decoded alone, a response loses the blank it begins with under many tokenizers, and prompt + completion would run
    two words into one.
    """
    starts = (prompts.ids.shape[1] - prompts.mask.sum(dim=1)).tolist()
    heads = [row[start:] for row, start in zip(prompts.ids.tolist(), starts, strict=True)]
    tails = [row[:length] for row, length in zip(response.tolist(), lengths, strict=True)]
    before = tokenizer.batch_decode(heads, skip_special_tokens=True)
    whole = tokenizer.batch_decode([h + t for h, t in zip(heads, tails, strict=True)], skip_special_tokens=True)
    alone = tokenizer.batch_decode(tails, skip_special_tokens=True)
    return [
        text[len(head) :] if text.startswith(head) else tail
        for head, text, tail in zip(before, whole, alone, strict=True)
    ]
