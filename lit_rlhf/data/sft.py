"""Examples to imitate: conversations, prompts with completions, or plain text."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.batch import Examples
from lit_rlhf.data import chat, columns, sources
from lit_rlhf.data.loader import SeekableData
from lit_rlhf.data.mixture import Sources
from lit_rlhf.data.readable import readable

Encoded = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]  # token ids, which of them are learned


class SFTData(SeekableData):
    """Serve batches of Examples from rows of ``messages``, of ``prompt`` and ``completion``, or of ``text``.

    The first of these three whose columns are all there is used. Prompt and completion are joined as they stand: a
    blank or line break between two texts must be part of one of them.

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
        messages_column: column with conversations.
        prompt_column: column with prompts, text or messages.
        completion_column: column with completions, text or messages.
        text_column: column with plain text, all of which is learned.
        prompt_template: text with ``{column}`` fields that makes the prompt in place of ``prompt_column``.
        chat: make a text prompt the user's message of a conversation.
        system_prompt: system message put before every prompt or conversation without one; makes text prompts chats.
        chat_template: Jinja text, a file that holds it, or "dialogue" (plain Human/Assistant turns); it becomes the
            tokenizer's own. None keeps the tokenizer's.
        learn: "completion" learns the last turn, "assistant" every assistant turn, "all" every token.
        max_length: longest example in tokens.
        too_long: what to do with longer ones: stop with an error, cut off their end, or drop them.
        max_dropped: largest share of a source's rows that may be dropped before that is an error.
        batch_size: examples a process reads for one batch.
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
        messages_column: str = "messages",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        text_column: str = "text",
        prompt_template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        learn: Literal["completion", "assistant", "all"] = "completion",
        max_length: int = 1024,
        too_long: Literal["error", "truncate", "drop"] = "error",
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

    def encode(self, rows: sources.Rows) -> list[Encoded]:
        """Check, render and tokenise the rows."""
        knobs = self.knobs
        make = columns.PromptMaker(knobs.prompt_column, knobs.prompt_template, knobs.chat, knobs.system_prompt)
        kinds = {
            "messages": [knobs.messages_column],
            "completion": [*make.columns(), knobs.completion_column],
            "text": [knobs.text_column],
        }
        kind = columns.first_kind(kinds, rows.columns, rows.source)

        def encode_row(row: dict[str, Any]) -> Encoded:
            example: dict[str, Any]
            if kind == "messages":
                example = {"messages": make.with_system(columns.messages_of(row, knobs.messages_column))}
            elif kind == "completion":
                example = {"prompt": make(row), "completion": columns.completion_of(row, knobs.completion_column)}
            else:
                example = {"text": columns.text_of(row, knobs.text_column)}
            return self._fit(*chat.encode_example(self.tokenizer, **example, learn=knobs.learn))

        records, _, dropped = sources.encode_rows(rows, encode_row, max_dropped=knobs.max_dropped)
        self.dropped += dropped
        return records

    @staticmethod
    def collate(examples: list[Encoded], *, pad: int) -> Examples:
        """Make a batch, padded on the right."""
        ids, mask = pad_right([ids for ids, _ in examples], pad)
        learned, _ = pad_right([learned for _, learned in examples], 0)
        return Examples(ids=ids, mask=mask, loss_mask=learned.bool())

    def _fit(self, ids: list[int], learned: list[bool]) -> Encoded:
        """Apply max_length."""
        longest, how = self.knobs.max_length, self.knobs.too_long
        if len(ids) > longest:
            sources.refuse_long(len(ids), longest, how, knob="max_length", instead="truncate")
            self.truncated += 1
            ids, learned = ids[:longest], learned[:longest]
            if not any(learned):
                raise sources.Dropped("with nothing to learn within max_length")
        return np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=bool)


def pad_right(rows: list[np.ndarray[Any, Any]], pad: int) -> tuple[Tensor, Tensor]:
    """Stack sequences: (values [B, L] long, mask [B, L] bool)."""
    lengths = torch.tensor([len(row) for row in rows])
    values = torch.full((len(rows), int(lengths.max())), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.from_numpy(row)
    return values, torch.arange(values.shape[1]) < lengths[:, None]
