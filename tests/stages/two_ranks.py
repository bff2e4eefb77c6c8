"""Run by test_two_ranks.py in two processes: train a stage under DDP and leave its weights for comparison.

usage: two_ranks.py STAGE MODEL_FOLDER OUT DEVICES
"""

from __future__ import annotations

import sys
from pathlib import Path

import arena
import torch

from lit_rlhf.models.lengths import PASS_TOKENS
from lit_rlhf.stages import GRPO, PPO, SFT, Optim, Updates


class OnceInfinite(SFT):
    """Its first loss on rank 1 is infinite, and no gradient is."""

    def read(self, batch, noise=None):
        logprobs, correct, learned = super().read(batch, noise)
        infinite = float("-inf") if self.global_rank == 1 and self.global_step == 0 else 0.0
        return logprobs + infinite, correct, learned


def build(name: str, folder: str):
    """The stage, and one batch for each rank."""
    if name == "sft":
        whole = arena.examples(8)
        parts = [whole.select(torch.arange(start, 8, 2)) for start in (0, 1)]
        return SFT(folder, optim=Optim(lr=1e-3)), whole, parts
    if name == "sft_skip":
        return OnceInfinite(folder, optim=Optim(lr=1e-3, nonfinite="skip")), None, [arena.examples(4)] * 2
    if name == "grpo_shared":  # a pass costs next to nothing, so that prompts are shared
        PASS_TOKENS["cpu"] = 1
    if name in ("grpo_whole", "grpo_shared"):  # every second prompt, as RankSampler shares them out
        whole, knobs = arena.prompts(8), {"sampling": arena.SHORT, "group_size": 2, "optim": Optim(lr=1e-3)}
        updates = Updates(epochs=2, micro_batch_tokens=40)
        parts = [whole.select(torch.arange(start, 8, 2)) for start in (0, 1)]
        return GRPO(folder, rewards=[arena.low_ids], updates=updates, **knobs), whole, parts
    knobs = {"rewards": [arena.low_ids], "sampling": arena.SHORT}
    loop = {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 12}
    if name == "ppo":
        stage = PPO(folder, **knobs, updates=Updates(**loop, target_kl=0.5))
    else:
        stage = GRPO(folder, **knobs, updates=Updates(**loop), group_size=2)
    return stage, arena.prompts(8), [arena.prompts(4, seed=0), arena.prompts(4, seed=1)]


def main(name: str, folder: str, out: str, devices: str) -> None:
    torch.set_num_threads(1)
    stage, whole, parts = build(name, folder)
    log = arena.Log()
    strategy = "ddp" if devices == "2" else "auto"
    run = arena.trainer(strategy=strategy, devices=int(devices), callbacks=[log], use_distributed_sampler=False)
    batch = parts[run.global_rank] if devices == "2" else whole
    run.fit(stage, arena.loader([batch, batch]))
    torch.save((arena.weights(stage), log.rows[-1]), Path(out) / f"{name}_{devices}_{run.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
