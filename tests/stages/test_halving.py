"""Microbatches that halve themselves where memory runs out: the step is made again and comes out the same."""

from __future__ import annotations

import arena
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.rollout import Sampling
from lit_rlhf.stages import GRPO, KL, PPO, Optim, Updates
from lit_rlhf.stages.memory import OutOfMemory

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
RAGGED = Sampling(max_new_tokens=8, stop_ids=tuple(range(3, 40)))
NOTICE = "out of memory in the update: .* rows .*made again with model.updates.micro_batch_tokens"


def build(stage, folder, most: int | None, halve: bool = True, **knobs):
    """Two epochs of two minibatches; the reference of GRPO is off, since the cut decides its last digits."""
    own = {"group_size": 4, "kl": KL(0.0)} if stage is GRPO else {}
    updates = Updates(epochs=2, minibatches=2, micro_batch_tokens=most, halve_on_oom=halve)
    adam = Optim(lr=1e-3, eps=1e-5)
    return stage(folder, [arena.low_ids], sampling=RAGGED, optim=adam, updates=updates, **own, **knobs)


def too_large(module, tokens: int, first: int = 0):
    """Have memory run out in every microbatch of more tokens than these, from the ``first`` one on."""
    loss, seen = module.loss, []

    def limited(part):
        size = len(part) * int((part.prompt_mask.sum(dim=1) + part.lengths).max())
        seen.append(size)
        if size > tokens and len(seen) > first:
            loss(part)  # all of the forward pass is there when it happens
            raise ON_GPU
        return loss(part)

    module.loss = limited
    return seen


def trained(module, batches: int = 2):
    log = arena.Log()
    arena.fit(module, [arena.prompts(8, seed=i) for i in range(batches)], callbacks=[log])
    return arena.weights(module), log.rows


def same(rows, others):
    clocks = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows] == [
        {k: v for k, v in row.items() if not k.startswith(clocks)} for row in others
    ]


@pytest.mark.parametrize("most", [400, None])
def test_the_run_is_that_of_the_smaller_microbatch_from_the_start(most, model_folder):
    module = build(GRPO, model_folder, most)
    too_large(module, 60)
    with pytest.warns(UserWarning, match=NOTICE):
        weights, rows = trained(module)
    limit = int(module.micro_batch_limit)
    assert 30 < limit <= 60
    others, other_rows = trained(build(GRPO, model_folder, limit, halve=False))
    assert torch.equal(weights, others)
    assert same(rows, other_rows)
    assert not torch.equal(weights, trained(build(GRPO, model_folder, most, halve=False))[0])  # rounding


@pytest.mark.parametrize("first", [0, 1, 5])
def test_in_the_midst_of_a_rollout_results_are_those_of_the_larger_one(first, model_folder):
    """PPO, whose reference and critic were read in the first cut: equal up to rounding."""
    module = build(PPO, model_folder, 100)
    seen = too_large(module, 50, first)
    with pytest.warns(UserWarning, match=NOTICE):
        weights, rows = trained(module)
    others, other_rows = trained(build(PPO, model_folder, 100, halve=False))
    torch.testing.assert_close(weights, others, atol=2e-6, rtol=0)
    assert rows[-1]["updates"] == other_rows[-1]["updates"] == 8
    assert rows[-1]["loss"] == pytest.approx(other_rows[-1]["loss"], abs=1e-5)
    assert max(seen[-4:]) <= 50


def test_in_the_backward_pass_nothing_of_the_attempt_is_left(model_folder):
    """Half of the gradients are there when it happens."""
    module, calls = build(GRPO, model_folder, 400), []

    def full(gradient):
        calls.append(1)
        if len(calls) == 1:
            raise ON_GPU

    module.policy.model.layers[0].mlp.up_proj.weight.register_hook(full)
    with pytest.warns(UserWarning, match=NOTICE):
        weights, _ = trained(module, batches=1)
    others, _ = trained(build(GRPO, model_folder, int(module.micro_batch_limit), halve=False), batches=1)
    assert torch.equal(weights, others)


def test_it_ends_where_a_microbatch_is_one_row(model_folder):
    module = build(GRPO, model_folder, 400)
    seen = too_large(module, 3)
    with pytest.warns(UserWarning, match=NOTICE), pytest.raises(OutOfMemory, match="update: 1 rows") as caught:
        trained(module)
    assert caught.value.__cause__ is ON_GPU
    assert len(seen) < 12


def test_off_by_default(model_folder):
    module = build(GRPO, model_folder, 400, halve=Updates().halve_on_oom)
    too_large(module, 60)
    with pytest.raises(OutOfMemory, match="halve_on_oom"):
        trained(module)


def test_a_resumed_run_keeps_the_bound(model_folder, tmp_path):
    module = build(GRPO, model_folder, 400)
    too_large(module, 60)
    with pytest.warns(UserWarning, match=NOTICE):
        run = arena.fit(module, [arena.prompts(8)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = build(GRPO, model_folder, 400)
    seen = too_large(again, 60)
    arena.fit(again, [arena.prompts(8)] * 2, ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=2)  # no warning, no error
    assert 0 < max(seen) <= 60
    older = {key: value for key, value in module.state_dict().items() if key != "micro_batch_limit"}
    build(GRPO, model_folder, 400).load_state_dict(older)


def test_where_weights_are_sharded_it_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr("lit_rlhf.stages.halving.is_sharded", lambda network: True)
    with pytest.raises(MisconfigurationException, match=r"halve_on_oom works on one process and under ddp"):
        trained(build(GRPO, model_folder, 400))
