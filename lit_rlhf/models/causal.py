"""Causal language models: load, save, and the log-probabilities of what they said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from lit_rlhf.batch import Rollout
from lit_rlhf.models.adapters import inject_adapters, merged_state, save_adapters
from lit_rlhf.models.hub import quiet
from lit_rlhf.models.logprobs import Chosen
from lit_rlhf.models.network import (
    Lora,
    Network,
    load_config,
    load_weights,
)
from lit_rlhf.models.output import chosen_after, chosen_tokens
from lit_rlhf.models.places import find_tokens, of_responses, states_over_prompts
from lit_rlhf.models.prefix import shared_prompts
from lit_rlhf.models.sharing import can_share
from lit_rlhf.models.switches import has_adapters
from lit_rlhf.models.tokens import load_tokenizer, stop_ids
from lit_rlhf.ranges import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Lora",
    "Network",
    "load_causal",
    "load_tokenizer",
    "next_token_logprobs",
    "save_folder",
    "stop_ids",
    "token_logprobs",
    "write_folder",
]


def load_causal(name: str, network: Network | None = None, *, seed: int = 0) -> PreTrainedModel:
    """Load a causal language model, ready to train: in train mode, all weights trainable or, with LoRA, its adapters.

    Args:
        name: folder or hub id of anything that ``AutoModelForCausalLM`` loads.
        network: how to hold it; None = the defaults.
        seed: for the adapters' random half.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ValueError: no safetensors, or weights are missing in the files.
    """
    from transformers import AutoModelForCausalLM

    network = network or Network()
    config = load_config(name, network)
    model, missing = load_weights(AutoModelForCausalLM, name, config, network, seed)
    if missing:
        raise ValueError(
            f"{name} lacks weights of a causal language model: {', '.join(sorted(missing)[:3])}"
            f"{' …' if len(missing) > 3 else ''}. Is it a reward model or of another kind ({config.architectures})?"
        )
    if network.lora is not None:
        inject_adapters(model, network.lora, task="CAUSAL_LM", seed=seed)
    return model


def _read(model: Any, ids: Tensor, mask: Tensor, asked: Tensor, **ask: Any) -> tuple[tuple[Tensor, Tensor], Chosen]:
    """Places of the tokens that ``asked`` [B, L] names, and what the model says of them."""
    moved, (row, column), before = find_tokens(ids, mask, asked)
    return (row, column), chosen_tokens(model, moved, before, ids[row, column], **ask)


def response_tokens(
    model: Any, rollout: Rollout, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
) -> tuple[tuple[Tensor, Tensor], Chosen]:
    """(row, column) of each response token in the rollout's mask, and what the model says of it.

    Args:
        model: a causal language model.
        rollout: prompts and responses.
        temperature: divides the logits; more than 0.
        entropy: also the entropies.
        hidden: also the states that the head reads.
    """
    if temperature <= 0:
        raise SettingError(f"temperature is {temperature}: greedy sampling has no log-probabilities; use more than 0")
    ask: Any = {"temperature": temperature, "entropy": entropy}
    shared = shared_prompts(rollout)
    if shared is not None and can_share(model):
        place, states = states_over_prompts(model, rollout, shared)
        chosen = chosen_after(model, states, rollout.response_ids[place], **ask)
        return place, chosen._replace(hidden=states)
    (row, column), found = _read(model, *of_responses(rollout), hidden=hidden, **ask)
    return (row, column - rollout.prompt_ids.shape[1]), found


@overload
def token_logprobs(
    model: Any, rollout: Rollout, *, temperature: float = 1.0, entropy: Literal[False] = False
) -> Tensor: ...
@overload
def token_logprobs(
    model: Any, rollout: Rollout, *, temperature: float = 1.0, entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    model: Any, rollout: Rollout, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log π(response token | all before it) at the sampling temperature, in float32.

    ``logprobs[b, t] = log softmax(logits / temperature)[response_ids[b, t]]``; 0 where the mask is False. Padding on
    either side and other rows of the batch change nothing. The head runs at response positions only, and the logits of
    all of them are not kept at once where they are many. A prompt that several rows answer is read once where that is
    cheaper and the model allows it (`can_share`).

    Args:
        model: a causal language model.
        rollout: prompts and responses; only ids and masks are read.
        temperature: that of the sampler (Huang et al. 2023: divide the logits everywhere); more than 0.
        entropy: also give the entropy of each distribution, in nats.

    Returns:
        logprobs [B, T], or (logprobs [B, T], entropy [B, T]).
    """
    place, found = response_tokens(model, rollout, temperature=temperature, entropy=entropy)
    nothing = found.logprobs.new_zeros(rollout.mask.shape)
    logprobs = nothing.index_put(place, found.logprobs)
    return (logprobs, nothing.index_put(place, found.entropy)) if entropy else logprobs


def next_token_logprobs(model: Any, ids: Tensor, mask: Tensor, learned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each token given those before it, and whether it was the model's first choice.

    Column t is about token t + 1 of the row. Entries whose token is padding, has nothing before it or is not to be
    learned are 0 and False; the model's head does not run for them.

    Args:
        model: a causal language model.
        ids: [B, L] token ids.
        mask: [B, L] bool, True = a real token, padding on either side.
        learned: [B, L] bool, True = a token that is asked for; None = all.

    Returns:
        (logprobs [B, L - 1] float32, correct [B, L - 1] bool).
    """
    asked = mask if learned is None else learned
    (row, column), found = _read(model, ids, mask, asked, correct=True)
    place, shape = (row, column - 1), (ids.shape[0], ids.shape[1] - 1)
    logprobs = found.logprobs.new_zeros(shape).index_put(place, found.logprobs)
    return logprobs, found.correct.new_zeros(shape).index_put(place, found.correct)


def write_folder(model: Any, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write a standard Hugging Face folder (safetensors, adapters merged); every process of a sharded run must call.

    Args:
        model: a transformers model, possibly with adapters, possibly sharded.
        tokenizer: written beside it; None leaves it out.
        folder: made if missing.

    Raises:
        NotADirectoryError: a file stands there.
    """
    if Path(folder).exists() and not Path(folder).is_dir():  # transformers would merely log it and write nothing
        raise NotADirectoryError(f"{folder} is a file: name a folder to export to")
    write = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state = merged_state(model, keep=write)
    if not write:
        return
    with quiet():
        model.save_pretrained(str(folder), state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def save_folder(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    merge: bool = True,
    about: dict[str, str] | None = None,
) -> None:
    """Write a model as a Hugging Face folder.

    Args:
        model: the model, which stays as it is.
        tokenizer: written beside it; None leaves it out.
        folder: made if missing.
        merge: add LoRA adapters to the weights, so that transformers alone loads the folder. False writes the
            adapters alone, for ``peft.PeftModel.from_pretrained(base, folder)``. Without adapters it makes no
            difference.
        about: kept with adapters that are written alone.
    """
    if merge or not has_adapters(model):
        write_folder(model, tokenizer, folder)
        return
    write = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if write:
        Path(folder).mkdir(parents=True, exist_ok=True)
    save_adapters(model, folder, write=write, about=about)
    if write and tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
