"""A learned reward model as adapters on the policy's own base weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.models import (
    evaluating,
    load_adapters,
    load_tokenizer,
    new_value_head,
    role,
    shared_trunk_scores,
    trunk_scores,
)
from lit_rlhf.rewards.learned import read_scores, refuse_other_vocabulary


class RewardAdapter(nn.Module):
    """Frozen reward model that is a few adapters and a head; its base is the policy's, which is held once for both.

    It scores prompt and response as the policy saw them, by their token ids. The policy must train adapters, too
    (``network.lora``), from the very base that the reward model was trained from.

    Args:
        folder: adapters and head of a reward model, as RewardModeling with ``network.lora`` writes them where
            ``export.merge`` is false, or peft for a sequence classifier with one label.
        normalize: take off the mean and divide by the standard deviation of its scores on held-out data, which the
            reward stage saved with it.
        batch_size: sequences that are read at once; bounds memory and changes no score.
        name: what it is logged as.

    Raises:
        ValueError: a batch size below 1.
    """

    head: nn.Linear

    def __init__(
        self, folder: str, normalize: bool = False, batch_size: int = 32, name: str = "reward_adapter"
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"RewardAdapter: batch_size is {batch_size}, expected 1 or more")
        self.folder, self.normalize, self.batch_size, self.name = folder, normalize, batch_size, name
        self.mean, self.std = 0.0, 1.0
        self.host: tuple[Any, str] | None = None  # the policy, of which this is no part, and the adapters' name in it

    def bind(self, tokenizer: Any) -> None:
        """Check that the policy's token ids mean the same to the reward model, where its tokenizer is in the folder.

        Args:
            tokenizer: the policy's.

        Raises:
            ValueError: a token of the policy has another id, or none, here.
        """
        if any(Path(self.folder).expanduser().glob("tokenizer*")):
            refuse_other_vocabulary(load_tokenizer(self.folder), tokenizer, f"RewardAdapter: {self.folder!r}")

    def attach(self, policy: Any) -> None:
        """Put the adapters on the policy's base, frozen, beside its own.

        Args:
            policy: a causal language model with adapters, not yet sharded.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a policy that moves its base or has another, a folder of something else, or one without mean
                and deviation though ``normalize`` asks for them.
        """
        adapters = getattr(policy, "peft_config", None)
        if adapters is None:
            raise ValueError(
                f"RewardAdapter: the policy trains all its weights, and the base of {self.folder!r} would move with "
                "them: set network.lora, or export the reward model with merge: true and take it as a RewardModel"
            )
        name = next(name for name in ("reward", *(f"reward_{i}" for i in range(2, 100))) if name not in adapters)
        weight, header = load_adapters(policy, self.folder, name, trained=False)
        self.head = new_value_head(policy, weight=weight).requires_grad_(False)
        self.host = policy, name
        if self.normalize:
            self.mean, self.std = self._moments(header)

    def score_rollout(self, rollout: Rollout) -> Tensor:
        """Scores [B] (float32) of the responses, each read at its last token.

        Raises:
            ValueError: no stage has given it its policy.
        """
        if self.host is None:
            raise ValueError("RewardAdapter has no policy to sit on: PPO and GRPO give it theirs; else use RewardModel")
        policy, name = self.host
        whole, over = partial(trunk_scores, policy, self.head), partial(shared_trunk_scores, policy, self.head)
        with evaluating(policy, self.head), role(policy, name):
            scores = read_scores(policy, rollout, self.batch_size, whole, over)
        return (scores - self.mean) / self.std

    def _moments(self, header: dict[str, str]) -> tuple[float, float]:
        mean, std = (float(header.get(f"reward_{key}", "nan")) for key in ("mean", "std"))
        if not std > 0:
            raise ValueError(
                f"RewardAdapter: normalize asks for reward_mean and reward_std (above 0) in the header of "
                f"{self.folder!r}/adapter_model.safetensors, found {mean} and {std}. The reward stage writes them "
                "after validation; else set normalize: false"
            )
        return mean, std
