"""A learned reward model as one of the rewards: it reads token ids, never text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models import (
    Network,
    can_share,
    evaluating,
    is_sharded,
    load_scalar,
    load_tokenizer,
    most_over_ranks,
    sequence_scores,
)
from lit_rlhf.models.heads import shared_scores
from lit_rlhf.models.lengths import padded_tokens
from lit_rlhf.models.prefix import Shared, number_rows, shared_beginnings


class RewardModel(nn.Module):
    """Frozen reward model: a sequence-classification folder with one output, as the reward stage writes it.

    It scores prompt and response as the policy saw them, by their token ids, so it must share the policy's vocabulary.
    It stays in evaluation mode whatever the module that holds it does.

    Args:
        model: hub id or folder of the reward model; its tokenizer must be there, too.
        normalize: take off the mean and divide by the standard deviation of its scores on held-out data, which the
            reward stage saved in its ``config.json`` (``reward_mean``, ``reward_std``).
        dtype: precision of its weights; scores are float32.
        batch_size: sequences that are read at once; bounds memory and changes no score.
        trust_remote_code: run Python code that comes with the model.
        name: what it is logged as.

    Raises:
        ValueError: a folder without a trained head (a causal language model), or without mean and deviation though
            ``normalize`` asks for them.
    """

    def __init__(
        self,
        model: str,
        normalize: bool = False,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 32,
        trust_remote_code: bool = False,
        name: str = "reward_model",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"RewardModel: batch_size is {batch_size}, expected 1 or more")
        self.source, self.batch_size, self.name, self.trust_remote_code = model, batch_size, name, trust_remote_code
        self.model = load_scalar(model, Network(dtype=dtype, trust_remote_code=trust_remote_code))
        if self.model.head_is_new:
            raise ValueError(
                f"RewardModel: {model!r} has no trained scalar head, it is a language model: train a reward model from "
                "it (lit-rlhf fit with the RewardModeling stage) and name the folder which that writes"
            )
        self.mean, self.std = self._moments() if normalize else (0.0, 1.0)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> RewardModel:
        """Stay in evaluation mode: dropout would make the reward random."""
        return super().train(False)

    def bind(self, tokenizer: Any) -> None:
        """Check that the policy's token ids mean the same to the reward model.

        Args:
            tokenizer: the policy's.

        Raises:
            ValueError: a token of the policy has another id, or none, here.
        """
        own = load_tokenizer(self.source, trust_remote_code=self.trust_remote_code)
        refuse_other_vocabulary(own, tokenizer, f"RewardModel: {self.source!r}")

    def score_rollout(self, rollout: Rollout) -> Tensor:
        """Scores [B] (float32) of the responses, each read at its last token."""
        whole, over = partial(sequence_scores, self.model), partial(shared_scores, self.model)
        with evaluating(self.model):
            scores = read_scores(self.model, rollout, self.batch_size, whole, over)
        return (scores - self.mean) / self.std

    def _moments(self) -> tuple[float, float]:
        mean, std = (getattr(self.model.config, f"reward_{key}", None) for key in ("mean", "std"))
        if mean is None or std is None or not std > 0:
            raise ValueError(
                f"RewardModel: normalize asks for reward_mean and reward_std (above 0) in {self.source!r}/config.json, "
                f"found {mean} and {std}. The reward stage writes them after validation; else set normalize: false"
            )
        return float(mean), float(std)


def refuse_other_vocabulary(own: Any, tokenizer: Any, whose: str) -> None:
    """Refuse a policy whose token ids mean something else to a reward model.

    Args:
        own: the reward model's tokenizer.
        tokenizer: the policy's.
        whose: the reward model, for the error.

    Raises:
        ValueError: a token of the policy has another id, or none, there.
    """
    known, policy = own.get_vocab(), tokenizer.get_vocab()
    strange = sorted((i, token) for token, i in policy.items() if known.get(token) != i)
    if strange:
        i, token = strange[0]
        raise ValueError(
            f"{whose} has another vocabulary than the policy: {len(strange)} of the policy's {len(policy)} tokens "
            f"differ, first {token!r}, id {i} in the policy and {known.get(token, 'unknown')} in the reward model. It "
            "scores token ids: train it from a model of the policy's family"
        )


def read_scores(
    network: Any,
    rollout: Rollout,
    batch_size: int,
    whole: Callable[[Tensor, Tensor], Tensor],
    over: Callable[[Shared], Tensor],
) -> Tensor:
    """Scores [B] (float32) of the responses, each read at its last token, in batches that cost least.

    Args:
        network: what reads them.
        rollout: prompts and responses.
        batch_size: sequences that are read at once.
        whole: scores of rows (ids, mask).
        over: scores of rows whose beginnings are read once.
    """
    scores = torch.empty(len(rollout), device=rollout.mask.device)
    for rows, shared in _passes(network, rollout, batch_size):
        part = rollout.select(rows).trim()
        found = whole(part.input_ids, part.input_mask) if shared is None else over(shared)
        scores[rows.to(scores.device)] = found.float()
    return scores


def _passes(network: Any, rollout: Rollout, batch_size: int) -> list[tuple[Tensor, Shared | None]]:
    """Row numbers of each batch: like lengths together, or answers to a prompt where reading it once is cheaper."""
    lengths = rollout.input_mask.sum(dim=1).cpu()
    plain = lengths.argsort(stable=True).split(batch_size)
    which = number_rows(rollout.prompt_ids, rollout.prompt_mask)
    if len(which.unique()) < len(which) and can_share(network):
        by_prompt = which.argsort(stable=True).split(batch_size)
        shared = [_shared(rollout.select(rows), which[rows]) for rows in by_prompt]
        whole = padded_tokens(plain, lengths) + shared[0].overhead * len(plain)
        if sum(one.cost for one in shared) < whole:
            return list(zip(by_prompt, shared, strict=True))
    # Sharded weights are gathered once a pass, so all processes make as many: one with fewer rows repeats a pass.
    most = most_over_ranks([len(plain)], rollout.mask.device)[0] if is_sharded(network) else len(plain)
    return [(rows, None) for rows in [*plain, *plain[-1:] * (most - len(plain))]]


def _shared(part: Rollout, which: Tensor) -> Shared:
    return shared_beginnings(part.input_ids, part.input_mask, which.unique(return_inverse=True)[1])
