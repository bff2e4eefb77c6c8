"""Prompts to be continued, with whatever columns the rewards need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lit_rlhf.batch import Prompts
from lit_rlhf.data import chat, columns, sources
from lit_rlhf.data.loader import SeekableData

RESERVED = ("prompts", "completions", "completion_ids")  # what every reward is called with beside the columns


class PromptData(SeekableData):
    """Serve batches of Prompts, padded on the left; the other columns of a row reach the rewards as they are.

    Args:
        train: rows to learn from: a file (jsonl, json, csv, also .gz; parquet), a folder of such files, a folder that
            ``datasets`` saved, or a hub id, its configuration after a colon (``openai/gsm8k:main``).
        val: rows to validate on; None takes ``val_split`` or ``val_fraction`` of ``train``.
        split: which split of ``train``, where it has several.
        val_split: which split to validate on, of ``val`` or else of ``train``.
        val_fraction: share of the training rows held out when neither ``val`` nor ``val_split`` is given; 0 = none.
        split_by: column whose equal values never stand on both sides (a user, a prompt).
        limit: train on the first rows only, so many.
        val_limit: validate on the first rows only, so many.
        prompt_column: column with prompts, text or messages.
        prompt_words: take only so many words of a text prompt, from its start; rows with no more words are dropped.
        prompt_template: text with ``{column}`` fields that makes the prompt in place of ``prompt_column``.
        chat: make a text prompt the user's message of a conversation.
        system_prompt: system message put before every prompt without one; makes text prompts chats.
        chat_template: Jinja text, a file that holds it, or "dialogue" (plain Human/Assistant turns); it becomes the
            tokenizer's own. None keeps the tokenizer's.
        max_prompt_length: longest prompt in tokens.
        too_long: what to do with longer ones: stop with an error, keep their end (and BOS), or drop them.
        max_dropped: largest share of rows that may be dropped before that is an error.
        batch_size: prompts a process reads for one batch.
        val_batch_size: the same in validation; None takes ``batch_size``.
        seed: fixes the order and what is held out.
        num_workers: processes that prepare batches.
        tokenizer: hub id or folder of the tokenizer; None takes that of the module the Trainer runs.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        split_by: str | None = None,
        limit: int | None = None,
        val_limit: int | None = None,
        prompt_column: str = "prompt",
        prompt_words: int | None = None,
        prompt_template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_prompt_length: int = 512,
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

    def encode(self, rows: sources.Rows) -> PromptRows:
        """Check, render and tokenise the rows."""
        knobs = self.knobs
        make = columns.PromptMaker(knobs.prompt_column, knobs.prompt_template, knobs.chat, knobs.system_prompt)
        if knobs.prompt_words is not None and knobs.prompt_template is not None:
            raise sources.DataError("prompt_words and prompt_template exclude each other: leave one out")
        sources.check_columns(rows, make.columns())
        taken = [column for column in rows.columns if column in RESERVED]
        if taken:
            raise sources.DataError(f'{rows.source}: rewards get "{taken[0]}" from the sampler; rename that column')

        def encode_row(row: dict[str, Any]) -> tuple[chat.Prompt, np.ndarray[Any, Any]]:
            prompt = make(row) if knobs.prompt_words is None else make.dress(self._opening(row))
            return prompt, self._fit(chat.encode_prompt(self.tokenizer, prompt))

        records, kept, dropped = sources.encode_rows(rows, encode_row, max_dropped=knobs.max_dropped)
        self.dropped += dropped
        whole = knobs.prompt_template is None and knobs.prompt_words is None  # the prompt IS its column
        others = [column for column in rows.columns if not (whole and column == knobs.prompt_column)]
        return PromptRows(records, rows.pick(kept), others)

    @staticmethod
    def collate(rows: list[Any], *, pad: int) -> Prompts:
        """Make a batch, padded on the left."""
        lengths = torch.tensor([len(ids) for _, ids, _ in rows])
        width = int(lengths.max())
        values = torch.full((len(rows), width), pad, dtype=torch.long)
        for i, (_, ids, _) in enumerate(rows):
            values[i, width - len(ids) :] = torch.from_numpy(ids)
        return Prompts(
            ids=values,
            mask=torch.arange(width) >= (width - lengths)[:, None],
            prompts=tuple(prompt for prompt, _, _ in rows),
            columns={column: tuple(others[column] for _, _, others in rows) for column in rows[0][2]},
        )

    def _opening(self, row: dict[str, Any]) -> str:
        """The first words of a text, with the white space between them as it is."""
        words = self.knobs.prompt_words
        found = re.match(rf"\s*(?:\S+\s+){{{words - 1}}}\S+(?=\s+\S)", columns.text_of(row, self.knobs.prompt_column))
        if found is None:
            raise sources.Dropped(f"of no more than prompt_words={words} words")
        return found.group()

    def _fit(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Apply max_prompt_length."""
        longest, how = self.knobs.max_prompt_length, self.knobs.too_long
        if not ids:
            raise sources.DataError("the prompt has no tokens, so there is nothing to continue")
        if len(ids) > longest:
            sources.refuse_long(len(ids), longest, how, knob="max_prompt_length", instead="truncate_left")
            self.truncated += 1
            ids = chat.keep_end(self.tokenizer, ids, longest)
        return np.asarray(ids, dtype=np.int32)


@dataclass(frozen=True)
class PromptRows(Sequence[Any]):
    """Encoded prompts beside the rows they come from."""

    records: list[tuple[chat.Prompt, np.ndarray[Any, Any]]]
    rows: sources.Rows
    columns: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: Any) -> Any:
        """(prompt, token ids, the other columns) of row ``i``."""
        row = self.rows[i]
        return (*self.records[i], {column: row.get(column) for column in self.columns})
