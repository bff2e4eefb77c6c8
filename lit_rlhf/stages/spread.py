"""Networks placed as the strategy asks: left whole, or sharded over the processes, each as a root of its own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import fill, shard, unsharded_trainables
from lit_rlhf.rewards import RewardAdapter, RewardModel
from lit_rlhf.strategies import FSDP2Strategy


def spread(stage: Any) -> None:
    """Shard a stage's networks where the strategy has a mesh, then read the weights that are not read yet.

    A stage takes it as its ``configure_model``, which Lightning calls before each fit, validation, test and prediction.

    Args:
        stage: PPO, GRPO, SFT or RewardModeling; in no Trainer it is left whole.

    Raises:
        MisconfigurationException: a strategy or precision under which a stage would train something else.
    """
    mesh, device, low = _places(stage._trainer) if stage._trainer is not None else (None, torch.device("cpu"), None)
    for network in networks(stage):
        shard(network, mesh, low_precision=low)
    for module in stage.modules():  # a reward of the user's may hold a network too, which stays whole
        fill(module, device)
    if getattr(stage, "average", None) is not None:
        stage.average.follow(stage.policy)
    if mesh is not None and (outside := unsharded_trainables(stage)):
        raise MisconfigurationException(
            f"{', '.join(outside[:3])}: trained, but in no network that is sharded, so no process would learn of the "
            "others' gradients"
        )


def _places(trainer: Trainer) -> tuple[Any, torch.device, torch.dtype | None]:
    """The mesh to shard over, where weights stand that are read now, and what they are gathered in."""
    strategy, precision = trainer.strategy, str(trainer.precision)
    refuse_strategy(strategy)
    if not isinstance(strategy, FSDP2Strategy):
        return None, torch.device("cpu"), None
    if precision == "16-mixed":
        raise MisconfigurationException(
            "precision=16-mixed is not supported where weights are sharded: use bf16-mixed or 32-true"
        )
    low = torch.bfloat16 if precision == "bf16-mixed" else None
    return strategy.device_mesh["data_parallel"], strategy.root_device, low


def networks(stage: Any) -> list[Any]:
    """The networks of a stage: what it trains, its reference, its reward models or their heads."""
    reference = getattr(stage, "reference", None)
    own = [getattr(stage, name, None) for name in ("policy", "critic", "reward")]
    judges = [one.model for one in stage.modules() if isinstance(one, RewardModel)]
    judges += [one.head for one in stage.modules() if isinstance(one, RewardAdapter)]
    found = [*own, None if reference is None else reference.frozen, *judges]
    return [network for network in found if network is not None]


def refuse_strategy(strategy: Any) -> None:
    """Refuse strategies that take hooks from the stages which they need.

    Raises:
        MisconfigurationException: FSDP1, DeepSpeed, or Lightning's own way to FSDP2.
    """
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise MisconfigurationException(
            "trainer.strategy: ModelParallelStrategy shards over nodes and writes checkpoints that only it can read, a "
            "pickle among them. Use trainer.strategy: fsdp2"
        )
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "trainer.strategy: fsdp (FSDP1) sees the gradients of a network as one flat piece: policy and critic could "
            "not be clipped by their own norms, and frozen networks not be left out of checkpoints. Use "
            "trainer.strategy: fsdp2"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            "trainer.strategy: deepspeed makes one optimizer step a training_step inside its own engine; a rollout "
            "here is learned from in several. Use trainer.strategy: fsdp2"
        )
