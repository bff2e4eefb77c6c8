"""The contenders of the algorithms' table: each one trains, and no two are the same run."""

from __future__ import annotations

import arena
import torch
from contenders import RECIPES

from lit_rlhf.stages import PPO


def test_every_contender_trains_and_is_another_run(model_folder):
    runs = {}
    for name, (kind, knobs, batch) in RECIPES.items():
        stage = kind(model_folder, rewards=[arena.low_ids], sampling=arena.SHORT, **knobs)
        prompts = batch if kind is PPO else stage.groups or batch
        assert prompts * stage.samples_per_prompt == 64
        texts = arena.examples(8) if knobs.get("ptx_coef") else None
        log = arena.Log()
        batches = [arena.prompts(batch, seed=i).with_(pretraining=texts) for i in range(2)]
        arena.fit(stage, batches, callbacks=[log], max_steps=60, max_epochs=1)
        assert log.rows[-1]["updates"] == 8  # four a rollout
        runs[name] = torch.cat([p.detach().flatten() for p in stage.policy.parameters()])
    assert not [(a, b) for a in runs for b in runs if a < b and torch.equal(runs[a], runs[b])]
