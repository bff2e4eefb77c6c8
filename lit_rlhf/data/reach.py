"""What the network of a run can read: so many positions, so many different tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_rlhf.data.files import DataError


@dataclass(frozen=True)
class Reach:
    """The limits of a network; None = not known.

    Args:
        positions: tokens of the longest sequence.
        vocabulary: rows of its embedding.
        response: of the positions, those that a sampled response may take.
    """

    positions: int | None = None
    vocabulary: int | None = None
    response: int = 0

    @classmethod
    def of(cls, trainer: Any) -> Reach:
        """That of the network which a Trainer trains; without one nothing is known."""
        stage = getattr(trainer, "lightning_module", None)
        network: Any = getattr(stage, "policy", None) or getattr(stage, "reward", None)
        config = getattr(network, "config", None)
        if network is None or config is None:
            return cls()
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        vocabulary = network.get_input_embeddings().num_embeddings
        return cls(positions, vocabulary, getattr(getattr(stage, "sampling", None), "max_new_tokens", 0))

    def bound(self, longest: int, knob: str, sampled: bool = False) -> tuple[int, str]:
        """The longest row that is allowed, and what bounds it.

        Args:
            longest: as configured.
            knob: where.
            sampled: whether a response must fit behind it.
        """
        if self.positions is None:
            return longest, knob
        room, name = self.positions, "the model's positions"
        if sampled:
            room -= self.response
            name = f"what the model's {self.positions} positions leave beside sampling.max_new_tokens={self.response}"
        if room < 1:
            raise DataError(
                f"sampling.max_new_tokens={self.response}, but the model has {self.positions} positions: no prompt "
                "fits beside so long a response; lower it"
            )
        return (room, name) if room < longest else (longest, knob)

    def check(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The ids of a row, all of which the network knows.

        Raises:
            DataError: the tokenizer has tokens that the network has not.
        """
        if self.vocabulary is not None and len(ids) and int(ids.max()) >= self.vocabulary:
            raise DataError(
                f"token id {int(ids.max())} is beyond the model's vocabulary of {self.vocabulary}: the tokenizer is "
                "another model's, or has gained tokens. Name the model's own as tokenizer, or enlarge the model "
                "(resize_token_embeddings) and save it"
            )
        return ids
