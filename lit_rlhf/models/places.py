"""Which tokens of a batch are asked for, and the states that predict them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.models.network import to_left_edge
from lit_rlhf.models.output import head_inputs
from lit_rlhf.models.prefix import Shared, read_shared, shared_prompts
from lit_rlhf.models.sharing import can_share


def find_tokens(ids: Tensor, mask: Tensor, asked: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Find the tokens that are asked for and have one before them.

    Args:
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token, padding on either side.
        asked: [B, L] bool, True = a token that is asked for.

    Returns:
        The rows from the left edge; (row, column) of each such token; where the rows, flattened, have the one before.
    """
    moved, columns = to_left_edge(ids, mask, but_last=True)
    row, column = (asked & mask & (columns > 0)).nonzero(as_tuple=True)
    # The longest row's last token went nowhere; what predicts it is the last that was read.
    return moved, (row, column), row * moved.shape[1] + columns[row, column] - 1


def states_over_prompts(model: Any, rollout: Rollout, shared: Shared) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, column) of each response token, and the state that predicts it, each distinct prompt read once."""
    hidden, place = read_shared(partial(head_inputs, model), model, shared)
    row, column = rollout.mask.nonzero(as_tuple=True)
    number = (rollout.mask.cumsum(dim=1) - 1)[row, column]
    return (row, column), hidden.index_select(0, place[row, number])


def of_responses(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and which tokens are those of responses, [B, P + T] each."""
    return rollout.input_ids, rollout.input_mask, torch.cat([torch.zeros_like(rollout.prompt_mask), rollout.mask], 1)


def response_states(model: Any, rollout: Rollout) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, column) of each response token, and what the model's head would read before it, [N, d].

    Args:
        model: a causal language model.
        rollout: prompts and responses.
    """
    shared = shared_prompts(rollout)
    if shared is not None and can_share(model):
        return states_over_prompts(model, rollout, shared)
    moved, (row, column), before = find_tokens(*of_responses(rollout))
    states = head_inputs(model, before, input_ids=moved, use_cache=False)
    return (row, column - rollout.prompt_ids.shape[1]), states
