"""One scalar per token: reward models and critics.

Both are transformers' own sequence-classification models with one label, so a saved folder is a standard one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models.adapters import inject_adapters
from lit_rlhf.models.causal import save_folder
from lit_rlhf.models.deferred import set_weight
from lit_rlhf.models.network import Network, load_config, load_weights, to_left_edge
from lit_rlhf.models.prefix import Shared, read_shared, shared_prompts
from lit_rlhf.models.sharing import can_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def first_weight(head: nn.Linear, seed: int) -> Tensor:
    """Draw a head's weight from N(0, 1/(d + 1)), variance-wise (Stiennon et al. 2020, appendix B.1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5


def load_scalar(name: str, network: Network | None = None, *, seed: int = 0) -> PreTrainedModel:
    """Load a model with one scalar output per token, ready to train; with LoRA, adapters and head are trainable.

    A reward-model folder keeps its head. A causal language model gets a new one, without bias: weights from
    N(0, 1/(d + 1)), variance-wise (Stiennon et al. 2020). ``model.head_is_new`` says which it was.

    Args:
        name: folder or hub id of a reward model or a causal language model.
        network: how to hold it; None = the defaults.
        seed: for a new head and the adapters' random half.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ValueError: a classifier with another number of labels, a kind without a linear ``score`` head, or missing
            weights.
    """
    from transformers import AutoModelForSequenceClassification

    network = network or Network()
    config = load_config(name, network)
    is_classifier = any("SequenceClassification" in kind for kind in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"{name} is a classifier with {config.num_labels} labels; a reward model has 1")
    config.num_labels = 1
    model, missing = load_weights(AutoModelForSequenceClassification, name, config, network, seed)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{name} ({type(model).__name__}) has no linear head named score: only decoders do")
    model.head_is_new = "score.weight" in missing
    if missing - {"score.weight"} or (is_classifier and missing):
        raise ValueError(f"{name} lacks weights: {', '.join(sorted(missing)[:3])}")
    if model.head_is_new:
        set_weight(model, "score.weight", first_weight(head, seed))
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:  # transformers' own pooling wants one; ours reads the mask
        eos = text_config.eos_token_id
        text_config.pad_token_id = eos[0] if isinstance(eos, list) else eos if eos is not None else 0
    if network.lora is not None:
        inject_adapters(model, network.lora, task="SEQ_CLS", seed=seed)
        model.score.requires_grad_(True)
    return model


@contextmanager
def _score_every_position(model: Any) -> Iterator[None]:
    """Have the model's forward give the head's output at every position, instead of at one it picks by padding id.

    The outer forward must run (it gathers the weights of a sharded model) and the scores must leave through its output
    (there the sharded backward hooks in), hence two hooks, ours before any other.
    """
    kept: list[Tensor] = []

    def keep(head: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    def hand_over(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = kept.pop()
        return output

    handles = [model.score.register_forward_hook(keep), model.register_forward_hook(hand_over, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _raw_scores(model: Any, ids: Tensor) -> Tensor:
    """Scores [B, W] in float32 at every token of rows that start at the left edge."""
    with _score_every_position(model):
        return model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()


def _scores_at(model: Any, positions: Tensor, **inputs: Any) -> Tensor:
    """Scores [N] in float32 at some places of the flattened inputs."""
    with _score_every_position(model):
        return model(**inputs).logits.flatten().index_select(0, positions).float()


def token_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the scalar at every token, in float32; 0 where the mask is False.

    Args:
        model: from `load_scalar`.
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token, padding on either side.

    Returns:
        [B, L].
    """
    moved, columns = to_left_edge(ids, mask)
    scores = _raw_scores(model, moved)
    return torch.where(mask, scores.gather(1, columns.clamp(max=moved.shape[1] - 1)), 0.0)


def sequence_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the scalar at the last real token of each row: a reward model's score.

    The token is found by the mask, so a padding id that equals the end token does no harm, and neither the padding's
    side nor the rest of the batch matters. A row without tokens scores 0.

    Args:
        model: from `load_scalar`.
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token.

    Returns:
        [B].
    """
    moved, _ = to_left_edge(ids, mask)
    length = mask.sum(dim=1)
    scores = _raw_scores(model, moved).gather(1, (length - 1).clamp(min=0)[:, None])
    return torch.where(length > 0, scores.squeeze(1), 0.0)


def shared_scores(model: Any, shared: Shared, run: Callable[..., Tensor] | None = None) -> Tensor:
    """Compute the scalar at the last token of rows whose beginnings are read once; `sequence_scores` of the same, [B].

    Args:
        model: from `load_scalar`, one that `can_share`.
        shared: the rows; their last tokens are their own.
        run: ``run(positions, **inputs)`` gives the scalar at places [N] of the flattened inputs; the model's if null.
    """
    scores, place = read_shared(run or partial(_scores_at, model), model, shared)
    rest = shared.rest.to(place.device)
    return torch.where(rest > 0, scores[place.gather(1, rest[:, None]).squeeze(1)], 0.0)


def response_values(model: Any, rollout: Rollout) -> Tensor:
    """Compute the value of the state before each response token; 0 where the mask is False.

    ``values[b, t]`` reads the prompt and the response up to, not including, token t. A prompt that several rows answer
    is read once where that is cheaper and the model allows it (`can_share`).

    Args:
        model: the critic, from `load_scalar`.
        rollout: prompts and responses; only ids and masks are read.

    Returns:
        [B, T].
    """
    shared = shared_prompts(rollout)
    if shared is not None and can_share(model):
        scores, place = read_shared(partial(_scores_at, model), model, shared)
        number = (rollout.mask.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(rollout.mask, scores[place.gather(1, number)], 0.0)
    moved, columns = to_left_edge(rollout.input_ids, rollout.input_mask, but_last=True)
    before = columns[:, rollout.prompt_ids.shape[1] :] - 1
    values = _raw_scores(model, moved).gather(1, before.clamp(min=0))
    return torch.where(rollout.mask & (before >= 0), values, 0.0)


def save_scalar(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    mean: float | None = None,
    std: float | None = None,
    merge: bool = True,
) -> None:
    """Write a reward model or critic as a folder that ``AutoModelForSequenceClassification`` loads.

    Args:
        model: from `load_scalar`; stays as it is but for its config.
        tokenizer: written beside it, and the source of the config's padding id; None leaves both.
        folder: made if missing.
        mean: mean of the scores on held-out responses, kept in config.json as ``reward_mean``; None = not measured.
        std: their standard deviation, ``reward_std``.
        merge: add adapters to the weights. False writes adapters and head alone, for ``peft.PeftModel`` and
            ``RewardAdapter``, mean and deviation in the file's header. Without adapters it makes no difference.

    Warns:
        UserWarning: padding and end share an id. Then transformers' own pooling cannot see a final end token and
            scores the token before it; `sequence_scores` is not affected.
    """
    moments = {"reward_mean": mean, "reward_std": std}
    for key, value in moments.items():
        if value is not None:
            setattr(model.config, key, float(value))
        elif hasattr(model.config, key):
            delattr(model.config, key)
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            warnings.warn(
                f"{folder}: padding and end of text share id {tokenizer.pad_token_id}, so transformers' own pooling "
                "will score the token before the end; lit_rlhf reads the mask and is not affected",
                stacklevel=2,
            )
    about = {key: repr(float(value)) for key, value in moments.items() if value is not None}
    save_folder(model, tokenizer, folder, merge=merge, about=about)
