"""Strategies that a stage cannot serve are refused with what to use; a stage without weights trains like any other."""

from __future__ import annotations

from types import SimpleNamespace

import arena
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import without_weights
from lit_rlhf.rewards import RewardModel
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Optim
from lit_rlhf.stages.spread import networks, refuse_strategy, spread
from lit_rlhf.strategies import FSDP2Strategy


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_serve_a_stage_are_refused(kind):
    with pytest.raises(MisconfigurationException, match=r"Use trainer\.strategy: fsdp2"):
        refuse_strategy(object.__new__(kind))


def test_half_precision_gradients_are_refused_where_weights_are_sharded(model_folder):
    stage, strategy = SFT(model_folder), FSDP2Strategy()
    stage._trainer = SimpleNamespace(strategy=strategy, precision="16-mixed")
    with pytest.raises(MisconfigurationException, match="use bf16-mixed"):
        spread(stage)


def test_every_network_of_a_stage_is_found(sharded_folders):
    folder = str(sharded_folders / "policy")
    stage = PPO(folder, [RewardModel(str(sharded_folders / "reward"))])
    held = {id(weight) for network in networks(stage) for weight in network.parameters()}
    assert held == {id(weight) for weight in stage.parameters()}
    assert len(networks(stage)) == 4


def test_training_without_weights_is_training(model_folder):
    def run(deferred: bool) -> torch.Tensor:
        def make() -> GRPO:
            return GRPO(
                model_folder,
                [arena.low_ids],
                group_size=2,
                kl=KL(0.1),
                optim=Optim(lr=1e-3),
                sampling=arena.SHORT,
                ema=0.5,
            )

        if deferred:
            with without_weights():
                stage = make()
            assert all(weight.is_meta for weight in stage.parameters())
        else:
            stage = make()
        arena.fit(stage, [arena.prompts(4)] * 2)
        return torch.cat([arena.weights(stage), *(b.flatten() for n, b in stage.named_buffers() if "average" in n)])

    assert torch.equal(run(True), run(False))
