"""Which models may read what rows begin with once: those that are seen to give the same then."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.models.cache import accepted, sliding_layers
from lit_rlhf.models.output import after_head
from lit_rlhf.models.prefix import Shared, read_shared
from lit_rlhf.models.sharding import is_sharded

_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"})
_BY_LENGTH = {"dynamic", "longrope"}  # rotary embeddings that depend on how long a batch is
_SHARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_share(model: Any) -> bool:
    """Whether a model may read what several rows begin with once (`read_shared`); else every row is read whole.

    Not where weights are sharded (processes must make as many passes), not under gradient checkpointing (which keeps
    no cache; neither in scoring, so that scoring and updates read alike), and not where the model keeps other state
    than keys and values, takes no positions, or gives something else: it is tried once a model.

    Args:
        model: a causal language model or one with a scalar head.
    """
    if isinstance(model, DistributedDataParallel) or is_sharded(model):
        return False
    parameters = list(model.parameters())
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return False
    is_trained = any(parameter.requires_grad for parameter in parameters)
    if is_trained and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    if model not in _SHARES:
        _SHARES[model] = _is_known(model) and _is_same(model)
    return _SHARES[model]


def _is_known(model: Any) -> bool:
    """Whether the model is built as `read_shared` needs it."""
    if not hasattr(model, "config") or not accepted(model.__class__) >= _INPUTS or sliding_layers(model) is None:
        return False
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = {one.get("rope_type") for one in [rope, *rope.values()] if isinstance(one, dict)}
    if not kinds <= {"full_attention", "sliding_attention"} or ropes & _BY_LENGTH:
        return False
    if config._attn_implementation not in ("sdpa", "eager"):  # others were not tried over such a cache
        return False
    return model.get_output_embeddings() is None or after_head(model) is not None


@torch.no_grad()
def _is_same(model: Any) -> bool:
    """Run four short rows with two beginnings both ways, and compare the last hidden states."""
    base, device = model.base_model, next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 7, 6, 5], [7, 5, 3, 1, 2, 4, 6], [7, 5, 6, 4, 3, 2, 1]])
    prefix, rest = torch.tensor([4, 2]), torch.tensor([3, 3, 4, 5])
    shared = Shared(ids.to(device), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]), prefix, rest)

    def run(positions: Tensor, **inputs: Any) -> Tensor:
        return base(**inputs).last_hidden_state.flatten(0, 1).index_select(0, positions)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        whole = base(input_ids=shared.ids, use_cache=False).last_hidden_state
        said, place = read_shared(run, model, shared)
    except Exception:  # what breaks here may well run as it is, and if not, will say so itself
        return False
    finally:
        for module, training in modes:
            module.training = training
    expected, found = [], []
    for row in range(4):
        start, length = int(prefix[shared.which[row]]) - 1, int(rest[row]) + 1
        expected.append(whole[row, start : start + length])
        found.append(said[place[row, :length]])
    one, other = torch.cat(expected).float(), torch.cat(found).float()
    tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.05
    return bool((one - other).norm() <= tolerance * one.norm())
