"""Strategies that a stage cannot serve are refused with what to use; a stage without weights trains like any other."""

from __future__ import annotations

from types import SimpleNamespace

import arena
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import Network, is_sharded, load_causal, without_weights
from lit_rlhf.rewards import RewardModel
from lit_rlhf.stages import GRPO, KL, PPO, SFT, Optim
from lit_rlhf.stages.spread import networks, spread
from lit_rlhf.strategies import FSDP2Strategy


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_serve_a_stage_are_refused(kind, model_folder):
    stage = SFT(model_folder)
    stage._trainer = SimpleNamespace(strategy=object.__new__(kind), precision="32-true")
    with pytest.raises(MisconfigurationException, match=r"Use trainer\.strategy: fsdp2"):
        spread(stage)


def on(stage, mesh, precision):
    """Put a stage into a Trainer under FSDP2, as far as it asks about it."""
    strategy = FSDP2Strategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1), "data_parallel": mesh}
    strategy.parallel_devices = [torch.device("cpu")] * 3
    stage._trainer = SimpleNamespace(strategy=strategy, precision=precision)
    return stage


@pytest.mark.parametrize(("precision", "low"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_weights_are_gathered_in_the_precision_asked_for(precision, low, model_folder, mesh_of_three):
    with without_weights():
        stage = on(SFT(model_folder), mesh_of_three, precision)
    spread(stage)
    assert is_sharded(stage.policy)
    assert not any(weight.is_meta for weight in stage.parameters())
    assert stage.policy._get_fsdp_state()._mp_policy.param_dtype == low


def test_a_trained_weight_outside_every_shard_is_refused(model_folder, mesh_of_three):
    stage = on(SFT(model_folder), mesh_of_three, "32-true")
    stage.more = torch.nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match=r"more.weight, more.bias: trained, but in no network"):
        spread(stage)


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


def test_a_network_of_the_users_own_gets_its_weights_too(model_folder):
    with without_weights():
        stage = SFT(model_folder)
        stage.other = torch.nn.ModuleList([load_causal(model_folder, Network(dtype="bfloat16"))])
    spread(stage)
    assert torch.equal(stage.other[0].lm_head.weight, stage.policy.lm_head.weight.bfloat16())
    spread(stage)  # before every validation


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
