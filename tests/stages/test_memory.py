"""Memory that runs out: said with sizes and with the knobs that lower it."""

from __future__ import annotations

import arena
import pytest
import torch

from lit_rlhf.stages import GRPO, PPO, SFT, Optim, RewardModeling, Updates
from lit_rlhf.stages.memory import OutOfMemory

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nIf reserved but …")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes")


def rl(stage, folder):
    more = {"group_size": 4} if stage is GRPO else {}
    return stage(folder, rewards=[arena.low_ids], sampling=arena.SHORT, updates=Updates(micro_batch_tokens=32), **more)


def fail(error):
    def raising(*_, **__):
        raise error

    return raising


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU])
@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_in_an_update(stage, error, model_folder):
    module = rl(stage, model_folder)
    parts, loss = [], module.loss
    # The last of several microbatches is one too many.
    module.loss = lambda part: parts.append(part) or (loss if module.updates.more else fail(error))(part)
    with pytest.raises(OutOfMemory, match="out of memory in the update: ") as caught:
        arena.fit(module, [arena.prompts(4)])
    lengths = (parts[-1].prompt_mask.sum(dim=1) + parts[-1].lengths).tolist()
    sizes = f"{len(lengths)} rows × {max(lengths)} tokens ({sum(lengths)} without padding), vocabulary 259"
    assert sizes in str(caught.value)
    assert "model.updates.micro_batch_tokens" in str(caught.value)
    assert str(caught.value).endswith(str(error).splitlines()[0])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("where", "phase", "knob"),
    [
        ("sampler", "rollout", "sampler.cache_gb"),
        ("rewards", "score", "batch_size of a RewardModel"),
        ("reference", "score", "micro_batch_tokens"),
    ],
)
def test_while_sampling_or_scoring(where, phase, knob, model_folder):
    module = rl(PPO, model_folder)
    if where == "sampler":
        module.sampler = fail(ON_GPU)
    elif where == "rewards":
        module.rewards.judge = fail(ON_GPU)
    else:
        module.reference.token_logprobs = fail(ON_GPU)
    with pytest.raises(OutOfMemory, match=f"^out of memory in the {phase}. To lower it: .*{knob}"):
        arena.fit(module, [arena.prompts(4)])


@pytest.mark.parametrize("stage", [SFT, RewardModeling])
@pytest.mark.parametrize("backward", [False, True])
def test_in_a_batch(stage, backward, model_folder):
    module = stage(model_folder, optim=Optim(lr=1e-3))
    batch = arena.examples(4) if stage is SFT else arena.pairs(4)
    if backward:
        next(module.parameters()).register_hook(fail(ON_CPU))
    elif stage is SFT:
        module.read = fail(ON_CPU)
    else:
        module.compare = fail(ON_CPU)
    rows, longest = batch.mask.shape
    with pytest.raises(OutOfMemory) as caught:
        arena.fit(module, [batch])
    sizes = f"out of memory in the batch: {rows} rows × {longest} tokens ({int(batch.mask.sum())} without padding)"
    assert sizes in str(caught.value)
    assert "data.batch_size" in str(caught.value)


@pytest.mark.parametrize("stage", [SFT, PPO])
def test_other_errors_pass_as_they_are(stage, model_folder):
    error = RuntimeError("shapes do not match")
    module = SFT(model_folder) if stage is SFT else rl(PPO, model_folder)
    setattr(module, "read" if stage is SFT else "loss", fail(error))
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        arena.fit(module, [arena.examples(4) if stage is SFT else arena.prompts(4)])
