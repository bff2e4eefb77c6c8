"""Comparisons between responses to a prompt: pairs, or several responses in order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch

from lit_rlhf.batch import Pairs
from lit_rlhf.data import chat, columns, sources
from lit_rlhf.data.loader import SeekableData
from lit_rlhf.data.mixture import Sources
from lit_rlhf.data.readable import readable
from lit_rlhf.data.sft import pad_right


class PreferenceData(SeekableData):
    """Serve batches of Pairs from rows of ``prompt``, ``chosen`` and ``rejected``, of the last two alone, or of ranks.

    Without a prompt the prompt is what ``chosen`` and ``rejected`` begin with alike. A row with ``responses`` instead
    holds several responses, best first; ``ranks`` beside them says which are tied (equal numbers; lower is better). A
    column ``margin`` says by how much ``chosen`` should lead. Rows whose responses are all alike or tied are dropped.

    Args:
        train: rows to learn from: a file (jsonl, json, csv, also .gz; parquet), a folder of such files, a folder that
            ``datasets`` saved, or a hub id, its configuration after a colon (``openai/gsm8k:main``). Or a list of such
            sources, each a path or ``{path, weight, split}``: an epoch reads a source ``weight`` times (1 by default).
        val: rows to validate on, from one source or a list; None takes ``val_split`` or ``val_fraction`` of ``train``.
        split: which split of ``train``, where it has several.
        val_split: which split to validate on, of ``val`` or else of ``train``.
        val_fraction: share of the training rows held out when neither ``val`` nor ``val_split`` is given; 0 = none.
        split_by: column whose equal values never stand on both sides (a user, a prompt).
        limit: train on the first rows only, so many of each source.
        val_limit: validate on the first rows only, so many of each source.
        prompt_column: column with prompts, text or messages.
        chosen_column: column with the preferred response, text or messages.
        rejected_column: column with the other response.
        prompt_template: text with ``{column}`` fields that makes the prompt in place of ``prompt_column``.
        chat: make a text prompt the user's message of a conversation.
        system_prompt: system message put before every prompt without one; makes text prompts chats.
        chat_template: Jinja text, a file that holds it, or "dialogue" (plain Human/Assistant turns); it becomes the
            tokenizer's own. None keeps the tokenizer's.
        max_length: longest prompt with response in tokens.
        too_long: what to do with rows that hold a longer one: stop with an error, cut the start of the prompt (a
            response stays whole, BOS in its place), or drop the row.
        max_dropped: largest share of a source's rows that may be dropped before that is an error.
        batch_size: prompts a process reads for one batch.
        val_batch_size: the same in validation; None takes ``batch_size``.
        seed: fixes the order and what is held out.
        num_workers: processes that prepare batches.
        tokenizer: hub id or folder of the tokenizer; None takes that of the module the Trainer runs.
    """

    def __init__(
        self,
        train: Sources,
        val: Sources | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        split_by: str | None = None,
        limit: int | None = None,
        val_limit: int | None = None,
        prompt_column: str = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        prompt_template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_length: int = 1024,
        too_long: Literal["error", "truncate_left", "drop"] = "error",
        max_dropped: float = 0.1,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, seed=seed, num_workers=num_workers)
        self.save_hyperparameters(logger=False)

    on_before_batch_transfer = readable

    def encode(self, rows: sources.Rows) -> list[Ranked]:
        """Check, render and tokenise the rows."""
        knobs = self.knobs
        make = columns.PromptMaker(knobs.prompt_column, knobs.prompt_template, knobs.chat, knobs.system_prompt)
        pair = (knobs.chosen_column, knobs.rejected_column)
        kinds = {
            "pair": [*make.columns(), *pair],
            "ranked": [*make.columns(), "responses"],
            **({"pair without prompt": pair} if knobs.prompt_template is None else {}),
        }
        kind = columns.first_kind(kinds, rows.columns, rows.source)
        ranked, margins = "ranks" in rows.columns, "margin" in rows.columns
        if kind == "ranked" and margins:
            raise sources.DataError(f'{rows.source}: "margin" belongs to chosen and rejected, not to ranked responses')

        def encode_row(row: dict[str, Any]) -> Ranked:
            if kind == "ranked":
                prompt, (responses, ranks) = make(row), responses_of(row, ranked)
            elif kind == "pair":
                prompt, ranks = make(row), [0.0, 1.0]
                responses = [columns.completion_of(row, column, empty=True) for column in pair]
            else:
                opening, *responses = common_prompt(*(columns.completion_of(row, column) for column in pair))
                prompt, ranks = make.dress(opening), [0.0, 1.0]
            margin = columns.number_of(row, "margin") if margins else None
            return self._rank([chat.encode_completion(self.tokenizer, prompt, r) for r in responses], ranks, margin)

        records, _, dropped = sources.encode_rows(rows, encode_row, max_dropped=knobs.max_dropped)
        self.dropped += dropped
        return records

    def combine(self, parts: list[list[Ranked]]) -> list[Ranked]:
        """All sources' rows; a margin must stand in all of them or in none."""
        if len({part[0].margin is None for part in parts}) > 1:
            raise sources.DataError('train or val: some sources have a column "margin" and others none; give it to all')
        return [row for part in parts for row in part]

    @staticmethod
    def collate(rows: list[Ranked], *, pad: int) -> Pairs:
        """Make a batch: each response one row, padded on the right, and the comparisons by row number."""
        better, worse, groups, margins, lengths, first = [], [], [], [], list[int](), 0
        for group, row in enumerate(rows):
            for i, j in row.better:
                better.append(first + i)
                worse.append(first + j)
                groups.append(group)
                margins.append(row.margin)
            lengths += row.lengths
            first += len(row.sequences)
        ids, mask = pad_right([sequence for row in rows for sequence in row.sequences], pad)
        return Pairs(
            ids=ids,
            mask=mask,
            better=torch.tensor(better),
            worse=torch.tensor(worse),
            groups=torch.tensor(groups),
            margin=None if margins[0] is None else torch.tensor(margins),
            lengths=torch.tensor(lengths),
        )

    def _rank(self, encoded: list[tuple[list[int], list[int]]], ranks: list[float], margin: float | None) -> Ranked:
        """Compare every two responses that differ in rank and in text, and apply max_length."""
        order = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
        better = [(i, j) for i, j in order if ranks[i] != ranks[j] and encoded[i] != encoded[j]]
        if not better:
            raise sources.Dropped("with nothing to compare (responses equal or tied)")
        longest, how = self.knobs.max_length, self.knobs.too_long
        sequences = []
        for head, tail in encoded:
            if len(head) + len(tail) > longest:
                sources.refuse_long(len(head) + len(tail), longest, how, knob="max_length", instead="truncate_left")
                if len(tail) >= longest:
                    raise sources.Dropped(f"with a response that alone fills max_length={longest}")
                self.truncated += 1
                head = chat.keep_end(self.tokenizer, head, longest - len(tail))
            sequences.append(np.asarray(head + tail, dtype=np.int32))
        return Ranked(sequences, [len(tail) for _, tail in encoded], better, margin)


@dataclass(frozen=True)
class Ranked:
    """One prompt: its responses as token ids (prompt and response), and which is better than which."""

    sequences: list[np.ndarray[Any, Any]]
    lengths: list[int]  # tokens of each response alone
    better: list[tuple[int, int]]
    margin: float | None


def responses_of(row: dict[str, Any], ranked: bool) -> tuple[list[chat.Prompt], list[float]]:
    """The responses of a row and their ranks, lower is better."""
    values = row.get("responses")
    if not isinstance(values, (list, tuple)) or len(values) < 2:
        raise sources.DataError(f'column "responses": expected a list of two or more, got {str(values)[:60]!r}')
    named = {f"responses[{i}]": value for i, value in enumerate(values)}  # an error says which of them
    responses = [columns.completion_of(named, name, empty=True) for name in named]
    if not ranked:
        return responses, [float(i) for i in range(len(responses))]
    ranks = row.get("ranks")
    if not isinstance(ranks, (list, tuple)) or len(ranks) != len(responses):
        raise sources.DataError(f'column "ranks": expected {len(responses)} numbers, one a response, got {ranks!r}')
    places = {f"ranks[{i}]": rank for i, rank in enumerate(ranks)}
    return responses, [columns.number_of(places, name) for name in places]


def common_prompt(chosen: chat.Prompt, rejected: chat.Prompt) -> tuple[chat.Prompt, chat.Prompt, chat.Prompt]:
    """What two texts or conversations begin with alike, and what remains of each; text is parted before a blank."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - letters are meant
        if len(start) < max(len(chosen), len(rejected)):  # a word that merely begins alike belongs to the responses
            cut = max((i for i, letter in enumerate(start) if letter.isspace()), default=0)
            start = start[:cut]
        if not start.strip():
            raise sources.DataError("chosen and rejected have no common beginning, and there is no prompt column")
        return start, chosen[len(start) :], rejected[len(start) :]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise sources.DataError("chosen and rejected must both be text or both be messages")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen) - 1)
    same = min(same, len(chosen) - 1, len(rejected) - 1)
    if same == 0:
        raise sources.DataError("chosen and rejected begin with different messages, and there is no prompt column")
    return chosen[:same], chosen[same:], rejected[same:]
