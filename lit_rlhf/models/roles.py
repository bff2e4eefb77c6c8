"""What a network is for in a run: the reference, frozen networks, evaluation mode, and what a checkpoint keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models.causal import token_logprobs
from lit_rlhf.models.network import Dtype
from lit_rlhf.models.sharding import reshard
from lit_rlhf.models.switches import CRITIC, POLICY, adapter_of, adapters_off, has_adapters

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(model: ModuleT) -> ModuleT:
    """Make a model's weights untrainable and set it to evaluation mode; returns the model."""
    return model.requires_grad_(False).eval()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and afterwards each of their modules back to the mode it was in, come what may.

    In evaluation mode dropout is off and gradient checkpointing sleeps. On leaving, sharded models give back the
    weights that a forward pass left gathered.
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for model in models:
            reshard(model)


class Reference(nn.Module):
    """The policy as it was at the start, which a KL term holds the policy to.

    With LoRA it is the policy itself with its adapters off, at no cost in memory; else a frozen copy. Make it a
    submodule of the stage (the copy then moves with it) and keep ``frozen`` out of checkpoints.

    Args:
        policy: the policy, before any update.
        dtype: number format of the copy; None = the policy's.
    """

    frozen: nn.Module | None

    def __init__(self, policy: nn.Module, *, dtype: Dtype | None = None) -> None:
        super().__init__()
        self.frozen = None
        if not has_adapters(policy):
            self.frozen = freeze(copy.deepcopy(policy))
            if dtype is not None:
                # Parameters only: rotary frequencies in bfloat16 would put far positions in wrong places.
                for parameter in self.frozen.parameters():
                    parameter.data = parameter.data.to(getattr(torch, dtype))

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """Make the policy as it is now the reference.

        Args:
            policy: without adapters.

        Raises:
            ValueError: the reference is the policy with its adapters off, which has no weights of its own to move.
        """
        if self.frozen is None:
            raise ValueError("a policy with adapters is its own reference, which cannot move: export it and start anew")
        for own, weight in zip(self.frozen.parameters(), policy.parameters(), strict=True):
            own.copy_(weight)

    @contextmanager
    def network(self, policy: nn.Module) -> Iterator[Any]:
        """Give the reference network, in evaluation mode, for as long as the context lasts.

        Args:
            policy: the policy, whose adapters are off inside where it has any.
        """
        if self.frozen is not None:
            with evaluating(self.frozen):
                yield self.frozen
        else:
            with evaluating(policy), adapters_off(policy):
                yield policy

    @torch.no_grad()
    def token_logprobs(self, policy: nn.Module, rollout: Rollout, *, temperature: float = 1.0) -> Tensor:
        """Compute the reference's log-probabilities of the response tokens, without gradient.

        Args:
            policy: the policy.
            rollout: prompts and responses.
            temperature: that of the sampler.

        Returns:
            [B, T], 0 where the mask is False.
        """
        with self.network(policy) as reference:
            return token_logprobs(reference, rollout, temperature=temperature)


def _leave_out(module: nn.Module, is_left_out: Callable[[str], bool]) -> None:
    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for key in [key for key in state if key.startswith(prefix) and is_left_out(key[len(prefix) :])]:
            del state[key]

    place = [""]  # the module's name within what is being loaded, which only the hook before tells

    def remember(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        place[0] = prefix

    def excuse(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [
            key
            for key in incompatible.missing_keys
            if not (key.startswith(place[0]) and is_left_out(key[len(place[0]) :]))
        ]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(remember)
    module.register_load_state_dict_post_hook(excuse)


def forget_in_checkpoints(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Leave frozen networks out of a stage's state dict; a strict load does not miss them.

    Args:
        module: the stage.
        prefixes: names of what is left out, for instance ``["reference.frozen", "rewards"]``.
    """
    dotted = tuple(prefix.rstrip(".") + "." for prefix in prefixes)
    _leave_out(module, lambda key: key.startswith(dotted))


def keep_adapters_only(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Keep only adapters and scalar heads of the named networks in a stage's state dict.

    Names decide, not ``requires_grad``, so that what is saved never depends on the moment: adapters of the policy and
    the critic are kept, those of rewards are not. Networks without adapters are kept whole.

    Args:
        module: the stage.
        prefixes: names of networks, for instance ``["policy", "critic"]``.
    """
    dotted = tuple(p.rstrip(".") + "." for p in prefixes if has_adapters(module.get_submodule(p.rstrip("."))))

    def is_base(key: str) -> bool:
        own = next((key[len(prefix) :] for prefix in dotted if key.startswith(prefix)), None)
        return own is not None and adapter_of(own) not in (POLICY, CRITIC) and not own.startswith("score.")

    _leave_out(module, is_base)
