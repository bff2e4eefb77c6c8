"""What flows through lit_rlhf: one frozen record a kind, which only ever gains fields.

Legend, used everywhere: ``B`` sequences, ``G`` sequences a group (one prompt), ``P`` prompt length, ``T`` response
length, ``L`` length of a whole sequence. **mask True = counts.** Everything per token is aligned to the response:
``logprobs[b, t] = log π(response_ids[b, t] | all that precedes it)`` and ``values[b, t]`` is the value of the state
*before* that token. The token that ends a response is part of it and counts; what stands after it does not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

RecordT = TypeVar("RecordT", bound="Prompts | Examples | Pairs | Rollout")
_LATER: Any = None  # a field that the record has not gained yet


def _to(record: RecordT, device: torch.device | str, non_blocking: bool = False) -> RecordT:
    """Copy of the record with every tensor on ``device`` (Lightning calls this to move a batch)."""
    moved: dict[str, Any] = {
        f.name: value.to(device, non_blocking=non_blocking)
        for f in dataclasses.fields(record)
        if isinstance(value := getattr(record, f.name), (Tensor, Examples))
    }
    return dataclasses.replace(record, **moved)


def _with(record: RecordT, **gained: Any) -> RecordT:
    """Copy of the record with the named fields set: records gain fields, nobody mutates them."""
    return dataclasses.replace(record, **gained)


def _select(record: RecordT, rows: Tensor) -> RecordT:
    """The record of the given rows (``rows`` [N], integer), in that order; scalars stay as they are."""
    order = rows.tolist()

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        if isinstance(value, tuple):
            return tuple(value[i] for i in order)
        if isinstance(value, dict):
            return {key: pick(column) for key, column in value.items()}
        return value

    return dataclasses.replace(record, **{f.name: pick(getattr(record, f.name)) for f in dataclasses.fields(record)})


@dataclass(frozen=True)
class Prompts:
    """Prompts to be continued, padded on the left.

    Worked example (P = 4, pad 0)::

        ids      [[0, 1, 7, 8], [1, 7, 8, 9]]
        mask     [[F, T, T, T], [T, T, T, T]]
        prompts  ("a b", "a b c")          columns  {"answer": ("3", "4")}
    """

    ids: Tensor  # [B, P] long, left-padded
    mask: Tensor  # [B, P] bool, True = a real token
    prompts: tuple[Any, ...]  # B prompts as the dataset holds them: text, or a list of messages
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # every other column; reaches the rewards
    rows: Tensor | None = None  # [B] long, number of each row in the batch of all processes; None = 0 … B − 1
    counts: Tensor | None = None  # [B] bool, False = a row that comes again, so that all processes have as many
    pretraining: Examples | None = None  # texts that come with the batch, for PPO-ptx: rows of their own, any number

    to = _to
    with_ = _with
    select = _select

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def counted(self) -> Tensor:
        """Numbers of the rows that count, [n] long."""
        return torch.arange(len(self)) if self.counts is None else self.counts.cpu().nonzero().flatten()

    def repeat(self, group_size: int) -> Prompts:
        """Each prompt ``group_size`` times, copies side by side ([B·G] rows), each with a number of its own."""
        copies = self.select(torch.arange(len(self)).repeat_interleave(group_size))
        if self.rows is None:
            return copies
        return copies.with_(rows=(self.rows[:, None] * group_size + torch.arange(group_size)).flatten())


@dataclass(frozen=True)
class Examples:
    """Token sequences to imitate, padded on the right; only tokens under ``loss_mask`` are learned."""

    ids: Tensor  # [B, L] long
    mask: Tensor  # [B, L] bool, True = a real token
    loss_mask: Tensor  # [B, L] bool, True = this token's negative log-likelihood counts

    to = _to
    with_ = _with
    select = _select

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class Pairs:
    """Responses and the comparisons between them: each response stands once, however many comparisons name it.

    A batch of plain pairs has ``N = 2·M`` rows. A prompt with K ranked responses gives K rows and C(K, 2) comparisons
    (less its ties), so every response is read once (Ouyang et al. 2022, §3.5).
    """

    ids: Tensor  # [N, L] long, prompt + response, right-padded
    mask: Tensor  # [N, L] bool, True = a real token
    better: Tensor  # [M] long, row of the preferred response
    worse: Tensor  # [M] long, row of the other one
    groups: Tensor  # [M] long, number of the prompt within this batch, 0 … number of prompts - 1
    margin: Tensor | None = None  # [M] float, by how much the preferred one should lead
    lengths: Tensor | None = (
        None  # [N] long, tokens of each response without its prompt; None = the row is all response
    )
    counts: Tensor | None = None  # [N] bool, False = of a prompt that comes again, so that all processes have as many

    to = _to
    with_ = _with

    @property
    def best(self) -> Tensor:
        """The responses to which no comparison prefers another one, [N] bool; of a prompt's tied best all of them."""
        return torch.ones_like(self.mask[:, 0]).index_fill(0, self.worse, False)

    def __len__(self) -> int:
        """Number of prompts."""
        return int(self.groups.max()) + 1 if self.groups.numel() else 0


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from a policy, and all that is learned about them on the way to a loss.

    Worked example (P = 2, T = 3, end of text 9; the second response was cut off by the length limit)::

        response_ids  [[5, 9, 0], [5, 6, 7]]
        mask          [[T, T, F], [T, T, T]]        ended  [T, F]
    """

    prompt_ids: Tensor  # [B, P] long, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] long, right-padded
    mask: Tensor  # [B, T] bool, True = a token of the response (the ending token included)
    ended: Tensor  # [B] bool, True = the response ends with a stop token, False = cut off
    prompts: tuple[Any, ...]  # B prompts as the dataset holds them
    completions: tuple[str, ...]  # B responses as text, for the rewards and for people; never tokenised again
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    sampler_logprobs: Tensor | None = None  # [B, T] as the sampler reported them
    sampler_entropy: Tensor | None = None  # [B, T] in nats, where the sampler was asked for it
    old_logprobs: Tensor = _LATER  # [B, T] of the policy that is being improved, by the trainer
    ref_logprobs: Tensor | None = None  # [B, T] of the reference, where there is one
    values: Tensor = _LATER  # [B, T] of the critic, before any update
    scores: Tensor = _LATER  # [B] from the judges
    parts: dict[str, Tensor] | None = None  # by reward, [B] before weighting, NaN where it does not apply
    outcomes: Tensor | None = None  # [B] what of the scores judges the whole response, where a reward judges steps
    step_scores: Tensor | None = None  # [B, S] of a response's steps, weighted, where a reward judges steps
    step_ends: Tensor | None = None  # [B, S] long, place of each step's last token in the response, -1 = no step
    weights: Tensor | None = None  # [B, T] importance weights, where the sampler was not the policy
    rewards: Tensor = _LATER  # [B, T] per token, KL term included
    advantages: Tensor = _LATER  # [B, T]
    returns: Tensor = _LATER  # [B, T]
    step_tokens: float = _LATER  # response tokens of the whole optimizer step, mean over ranks
    step_rows: float = _LATER  # responses of the whole optimizer step that have any, mean over ranks
    pretraining: Examples | None = None  # texts whose likelihood this microbatch also learns (PPO-ptx)
    pretraining_tokens: float = _LATER  # tokens of them in the whole optimizer step, mean over ranks

    to = _to
    with_ = _with
    select = _select

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def input_ids(self) -> Tensor:
        """Prompt and response joined, [B, P + T]."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def input_mask(self) -> Tensor:
        """Real tokens of prompt and response, [B, P + T]."""
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [B] long."""
        return self.mask.sum(dim=1)

    def trim(self) -> Rollout:
        """Without the columns that no row uses: padding left of every prompt and right of every response."""
        prompt = int(self.prompt_mask.sum(dim=1).max()) if len(self) else 0
        response = max(int(self.lengths.max()), 1) if len(self) else 0
        cut = self.prompt_ids.shape[1] - prompt
        per_token = {
            f.name: value[:, :response]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
            and value.dim() == 2
            and not f.name.startswith(("prompt_", "step_"))
        }
        return self.with_(prompt_ids=self.prompt_ids[:, cut:], prompt_mask=self.prompt_mask[:, cut:], **per_token)

    def join(self, other: Rollout) -> Rollout:
        """Rows of this rollout and of another one that knows as much, [B + B'] of them, padded to the wider."""
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Tensor):
                nothing = -1 if f.name == "step_ends" else 0
                joined[f.name] = _stacked(mine, theirs, left=f.name.startswith("prompt_"), nothing=nothing)
            elif isinstance(mine, tuple):
                joined[f.name] = mine + theirs
            elif isinstance(mine, dict):
                joined[f.name] = {key: _appended(column, theirs[key]) for key, column in mine.items()}
        return self.with_(**joined)


def _appended(mine: Any, theirs: Any) -> Any:
    return _stacked(mine, theirs) if isinstance(mine, Tensor) else mine + theirs


def _stacked(mine: Tensor, theirs: Tensor, left: bool = False, nothing: int = 0) -> Tensor:
    """Rows of both; the columns that one lacks hold ``nothing``."""
    if mine.dim() > 1 and mine.shape[1] != theirs.shape[1]:
        width = max(mine.shape[1], theirs.shape[1])
        mine, theirs = (
            torch.nn.functional.pad(x, (width - x.shape[1], 0) if left else (0, width - x.shape[1]), value=nothing)
            for x in (mine, theirs)
        )
    return torch.cat([mine, theirs])
