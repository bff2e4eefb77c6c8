"""An exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_rlhf.models.sharding import placed_like
from lit_rlhf.models.switches import weights_of


class Average(nn.Module):
    """Moving average w̄ ← d·w̄ + (1 − d)·w of a policy's trainable weights, held as buffers, so in checkpoints.

    Ouyang et al. 2022 (InstructGPT, appendix C.4) evaluate the average of the policy's weights with d = 0.992.

    Args:
        network: whose weights are averaged, without those of a critic on its base; the average starts at them.
        decay: d, at least 0 and below 1.

    Raises:
        ValueError: another decay.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a moving average is {decay}, expected at least 0 and below 1")
        self.decay = decay
        for name, weight in self._weights(network):
            self.register_buffer(name.replace(".", "/"), weight.detach().clone())

    @staticmethod
    def _weights(network: nn.Module) -> list[tuple[str, Tensor]]:
        return list(weights_of(network).items())

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Lie where the network's weights lie, once a strategy has sharded or read them."""
        for name, weight in self._weights(network):
            key = name.replace(".", "/")
            own = self.get_buffer(key)
            if own.is_meta:
                self.register_buffer(key, weight.detach().clone())
            elif not hasattr(own, "full_tensor"):
                self.register_buffer(key, placed_like(own, weight))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's present weights."""
        for name, weight in self._weights(network):
            self.get_buffer(name.replace(".", "/")).lerp_(weight, 1 - self.decay)

    @contextmanager
    def standing_in(self, network: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the network for as long as the context lasts."""
        weights = self._weights(network)
        own = [weight.detach().clone() for _, weight in weights]
        with torch.no_grad():
            for name, weight in weights:
                weight.copy_(self.get_buffer(name.replace(".", "/")))
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, weight), before in zip(weights, own, strict=True):
                    weight.copy_(before)


@contextmanager
def averaged(network: nn.Module, average: Average | None) -> Iterator[None]:
    """Put a network's averaged weights, where there are any, in place of its own for as long as the context lasts."""
    if average is None:
        yield
    else:
        with average.standing_in(network):
            yield
