"""Prompts to be continued, with whatever columns the rewards need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.batch import Prompts
from lit_rlhf.data import chat, columns, sources
from lit_rlhf.data.loader import SeekableData, SeekableLoader, rank_of
from lit_rlhf.data.mixture import Mixture, Sources, sources_of, stack
from lit_rlhf.data.pretraining import PretrainingStream, pieces_of
from lit_rlhf.data.readable import readable

RESERVED = ("prompts", "completions", "completion_ids")  # what every reward is called with beside the columns


class PromptData(SeekableData):
    """Serve batches of Prompts, padded on the left; the other columns of a row reach the rewards as they are.

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
        prompt_words: take only so many words of a text prompt, from its start; rows with no more words are dropped.
        prompt_template: text with ``{column}`` fields that makes the prompt in place of ``prompt_column``.
        chat: make a text prompt the user's message of a conversation.
        system_prompt: system message put before every prompt without one; makes text prompts chats.
        chat_template: Jinja text, a file that holds it, or "dialogue" (plain Human/Assistant turns); it becomes the
            tokenizer's own. None keeps the tokenizer's.
        max_prompt_length: longest prompt in tokens.
        too_long: what to do with longer ones: stop with an error, keep their end (and BOS), or drop them.
        pretraining: texts of which every training batch gets some, for a stage that mixes their gradient in (PPO-ptx):
            a source or a list, as ``train``; they come round again in a new order, as long as the run lasts.
        pretraining_column: column with those texts.
        pretraining_batch_size: how many of them a process reads for one batch (Ouyang et al. 2022: 8 a prompt).
        pretraining_length: longest of them in tokens; longer ones are cut into equal pieces, all of which are read.
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
        prompt_words: int | None = None,
        prompt_template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_prompt_length: int = 512,
        too_long: Literal["error", "truncate_left", "drop"] = "error",
        pretraining: Sources | None = None,
        pretraining_column: str = "text",
        pretraining_batch_size: int = 8,
        pretraining_length: int = 512,
        max_dropped: float = 0.1,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, seed=seed, num_workers=num_workers)
        self.save_hyperparameters(logger=False)
        self._stream: PretrainingStream | None = None

    on_before_batch_transfer = readable

    def encode_beside(self) -> None:
        """Tokenise the pretraining texts."""
        knobs = self.knobs
        if knobs.pretraining is None:
            return
        if knobs.pretraining_length < 2:
            raise sources.DataError(f"pretraining_length must be at least 2, got {knobs.pretraining_length}")
        rows = sources.load_sources(knobs.pretraining, knobs.split, knob="pretraining")
        column, longest = knobs.pretraining_column, knobs.pretraining_length
        parts = pieces_of(rows, self.tokenizer, column=column, longest=longest)
        named = sources_of(knobs.pretraining, "pretraining")
        mixture = Mixture.of([len(part) for part in parts], [source.weight for source in named])
        pieces, batch_size = [piece for part in parts for piece in part], knobs.pretraining_batch_size
        self._stream = PretrainingStream(pieces, mixture, batch_size=batch_size, seed=knobs.seed)
        rank_zero_info(f"PromptData: {len(rows)} pretraining texts in {len(pieces)} pieces of up to {longest} tokens")

    def train_dataloader(self) -> SeekableLoader:
        """Shuffled batches, always full, each with the next pretraining rows where these are asked for."""
        loader, stream, place = super().train_dataloader(), self._stream, self.position
        (rank, world), pad = rank_of(self.trainer), chat.padding_id(self.tokenizer)
        if stream is None:
            return loader

        def gain(prompts: Prompts) -> Prompts:
            start, place.pretraining = place.pretraining, place.pretraining + stream.batch_size * world
            return prompts.with_(pretraining=stream.batch(start, rank, world, pad=pad))

        loader.gain = gain
        return loader

    def combine(self, parts: list[PromptRows]) -> PromptRows:
        """All sources' rows; a column that a source lacks is None in its rows."""
        records = [record for part in parts for record in part.records]
        names = list(dict.fromkeys(column for part in parts for column in part.columns))
        return PromptRows(records, stack([part.rows for part in parts]), names)

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
