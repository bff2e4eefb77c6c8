"""Every constructor argument of every stage changes something, and the lists below leave none out.

What changes the weights of PPO and GRPO is tested beside them (``KNOBS`` there); here stands the rest.
"""

from __future__ import annotations

import inspect

import arena
import pytest
import tiny
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.models import Network
from lit_rlhf.rollout import GenerateSampler, Sampling
from lit_rlhf.stages import GRPO, PPO, SFT, Optim, RewardModeling

IN_THEIR_OWN_TESTS = {
    "PPO": {
        *("model", "rewards", "critic", "network", "frozen_dtype", "reward_weights", "missing_eos", "shaping"),
        *("whiten_rewards", "sampling", "optim", "updates", "kl", "clip", "correction", "gamma", "lam", "value"),
        *("entropy", "ptx_coef", "ema", "seed"),
    },
    "GRPO": {
        *("model", "rewards", "network", "frozen_dtype", "reward_weights", "missing_eos", "sampling", "optim"),
        *("group_size", "groups", "advantages", "truncated", "updates", "kl", "clip", "correction", "aggregation"),
        *("entropy", "refresh_reference", "ema", "seed"),
    },
    "SFT": {"model", "packing", "neftune_alpha", "rewards"},
    "RewardModeling": {"model", "loss", "margin", "label_smoothing", "center", "normalize"},
}
HERE = {
    "PPO": {"tokenizer", "sampler"},
    "GRPO": {"tokenizer", "sampler"},
    "SFT": {"tokenizer", "network", "optim", "sampling", "sample_prompts", "seed"},
    "RewardModeling": {"tokenizer", "network", "optim", "seed"},
}


@pytest.mark.parametrize("stage", [PPO, GRPO, SFT, RewardModeling])
def test_no_argument_is_forgotten(stage):
    declared = set(inspect.signature(stage).parameters)
    assert declared == IN_THEIR_OWN_TESTS[stage.__name__] | HERE[stage.__name__]


class Counted(GenerateSampler):
    """The sampler, counting its calls."""

    calls = 0

    def __call__(self, *arguments, **settings):
        self.calls += 1
        return super().__call__(*arguments, **settings)


@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_the_sampler_given_is_the_one_that_samples(stage, model_folder):
    sampler = Counted()
    arena.fit(stage(model_folder, rewards=[arena.low_ids], sampler=sampler, sampling=arena.SHORT), [arena.prompts(4)])
    assert sampler.calls == 1


@pytest.mark.parametrize("stage", [PPO, GRPO, SFT, RewardModeling])
def test_the_tokenizer_given_is_the_one_used(stage, model_folder, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "another one"
    tokenizer.save_pretrained(tmp_path)
    more = {"rewards": [arena.low_ids]} if stage in (PPO, GRPO) else {}
    assert stage(model_folder, tokenizer=str(tmp_path), **more).tokenizer.chat_template == "another one"


def sft(folder: str, **knobs) -> tuple[torch.Tensor, list]:
    stage = SFT(folder, **{"optim": Optim(lr=1e-3), "sampling": Sampling(max_new_tokens=6), **knobs})
    arena.fit(stage, [arena.examples(8)] * 2, [arena.examples(8, seed=1)])
    return arena.weights(stage), [sample["completion"] for sample in stage.samples]


def test_sft_knobs_move_weights_or_samples(model_folder):
    weights, samples = sft(model_folder)
    assert not torch.equal(weights, sft(model_folder, network=Network(dropout=0.3))[0])
    assert not torch.equal(weights, sft(model_folder, optim=Optim(lr=1e-3, weight_decay=1.0))[0])
    assert len(sft(model_folder, sample_prompts=2)[1]) == 4 < len(samples)
    assert samples[4:] != sft(model_folder, seed=1)[1][4:]
    assert samples[:4] == sft(model_folder, seed=1)[1][:4]  # greedy knows no seed
    assert samples != sft(model_folder, sampling=Sampling(max_new_tokens=3))[1]


def test_reward_knobs_move_weights(model_folder):
    def trained(**knobs) -> torch.Tensor:
        stage = RewardModeling(model_folder, **{"optim": Optim(lr=1e-3), **knobs})
        arena.fit(stage, [arena.pairs(4)] * 2)
        return arena.weights(stage)

    plain = trained()
    assert torch.equal(plain, trained())
    changes = [{"network": Network(dropout=0.3)}, {"optim": Optim(lr=2e-3)}, {"seed": 1}]
    assert not [change for change in changes if torch.equal(plain, trained(**change))]


OPTIM = {
    "lr": 2e-3,
    "betas": (0.5, 0.9),
    "eps": 1e-2,
    "weight_decay": 1.0,
    "schedule": "linear",
    "warmup_steps": 2,
}


def test_every_optimizer_setting_moves_the_weights(model_folder):
    plain, _ = sft(model_folder)
    assert not [
        key
        for key, value in OPTIM.items()
        if torch.equal(plain, sft(model_folder, optim=Optim(**{"lr": 1e-3, key: value}))[0])
    ]
    linear, to_nothing = (Optim(lr=1e-3, schedule="linear", final_fraction=fraction) for fraction in (0.5, 0.0))
    assert not torch.equal(sft(model_folder, optim=linear)[0], sft(model_folder, optim=to_nothing)[0])
    in_test_finite = {"nonfinite", "most_skips"}
    assert {*OPTIM, "final_fraction"} | in_test_finite == set(inspect.signature(Optim).parameters)


@pytest.mark.parametrize("stage", [SFT, RewardModeling])
def test_half_precision_weights_are_refused(stage, model_folder):
    batch = arena.examples(4) if stage is SFT else arena.pairs(4)
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        arena.fit(stage(model_folder), [batch], precision="bf16-true")


def test_a_falling_schedule_without_an_end_is_refused(model_folder):
    stage = SFT(model_folder, optim=Optim(schedule="cosine"))
    with pytest.raises(ValueError, match="max_steps"):
        arena.fit(stage, [arena.examples(4)] * 3, max_epochs=-1)


@pytest.mark.parametrize("stage", [SFT, RewardModeling])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_under_bf16_mixed(stage, algorithm, model_folder):
    """Lightning's own clipping refuses the fused optimizer there."""
    batch, log = arena.examples(4) if stage is SFT else arena.pairs(4), arena.Log()
    module, name = stage(model_folder, optim=Optim(lr=1e-3)), "policy" if stage is SFT else "reward"
    largest = []

    def look(*_):
        largest.append(max(p.grad.abs().max().item() for p in module.parameters() if p.grad is not None))

    settings = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    optimizers = module.configure_optimizers

    def configure():
        made = optimizers()
        made["optimizer"].register_step_post_hook(look)
        return made

    module.configure_optimizers = configure
    arena.fit(module, [batch], callbacks=[log], **settings)
    assert 0 < largest[0] <= 1.001e-3
    assert (f"{name}/grad_norm" in log.rows[0]) == (algorithm == "norm")
