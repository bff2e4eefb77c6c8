"""A stream of pretraining text beside the prompts, for the gradient mix of PPO-ptx (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lit_rlhf.batch import Examples
from lit_rlhf.data import chat, columns, sources
from lit_rlhf.data.mixture import Mixture, unstack
from lit_rlhf.data.sft import pad_right


class PretrainingStream:
    """Gives every training batch the next texts of an endless stream, a function of the seed and how far it was read.

    Each pass over the texts is in a new order. Row ``i`` of a batch of rank ``r`` is row ``i · world + r`` of the
    stream's next block, so what a step reads does not depend on the number of processes.
    """

    def __init__(self, pieces: Sequence[np.ndarray[Any, Any]], mixture: Mixture, *, batch_size: int, seed: int) -> None:
        """Stream ``pieces`` of token ids, ``batch_size`` a process and batch."""
        self.pieces, self.mixture, self.batch_size, self.seed = pieces, mixture, batch_size, seed
        self._pass, self._order = -1, list[int]()

    def rows(self, start: int, rank: int, world: int) -> list[int]:
        """Numbers of the pieces that a rank reads from the place ``start`` of the stream on."""
        return [self._piece(start + i * world + rank) for i in range(self.batch_size)]

    def batch(self, start: int, rank: int, world: int, *, pad: int) -> Examples:
        """The pieces of `rows`, padded on the right; every token is learned but the first, which follows nothing."""
        ids, mask = pad_right([self.pieces[i] for i in self.rows(start, rank, world)], pad)
        return Examples(ids=ids, mask=mask, loss_mask=mask & (torch.arange(mask.shape[1]) > 0))

    def _piece(self, place: int) -> int:
        number, at = divmod(place, len(self.mixture))
        if number != self._pass:
            self._pass, self._order = number, self.mixture.order(self.seed, number)
        return self._order[at]


def pieces_of(rows: sources.Rows, tokenizer: Any, *, column: str, longest: int) -> list[list[np.ndarray[Any, Any]]]:
    """Tokenise the texts of every source and cut them.

    Each text ends with EOS. One of more than ``longest`` tokens is cut into equal pieces, as few as it takes, so that
    all of it is read and no piece is a stump.

    Returns:
        Token ids of the pieces of each source.
    """
    found = []
    for part in unstack(rows):
        sources.check_columns(part, [column])

        def encode_row(row: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
            ids, _ = chat.encode_example(tokenizer, text=columns.text_of(row, column))
            return np.array_split(np.asarray(ids, dtype=np.int32), -(-len(ids) // longest))

        texts, _, _ = sources.encode_rows(part, encode_row, max_dropped=0)
        found.append([piece for text in texts for piece in text])
    return found
