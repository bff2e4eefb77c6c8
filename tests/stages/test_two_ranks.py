"""DDP on two processes: equal weights on both, and for SFT those of one process on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def train(name: str, folder: str, out: Path, devices: int) -> list:
    root = HERE.parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = [sys.executable, str(HERE / "two_ranks.py"), name, folder, str(out), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{name}_{devices}_{rank}.pt") for rank in range(devices)]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_ranks_agree_after_many_updates_on_different_rollouts(name, model_folder, tmp_path):
    (weights, metrics), (others, other_metrics) = train(name, model_folder, tmp_path, 2)
    assert torch.equal(weights, others)
    assert metrics == other_metrics
    assert metrics["episodes"] == 2 * 2 * 4 * (2 if name == "grpo" else 1)  # ranks × batches × prompts × samples


@pytest.mark.parametrize("name", ["sft", "grpo_whole", "grpo_shared"])
def test_two_ranks_are_one_process_on_the_same_global_batch(name, model_folder, tmp_path):
    """In RL the responses must be the same ones, too: a row's random stream goes by its number in the whole batch."""
    (one, metrics), (two, _) = train(name, model_folder, tmp_path, 2)
    ((alone, alone_metrics),) = train(name, model_folder, tmp_path, 1)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=0)
    if name != "sft":
        assert metrics["objective/scores"] == pytest.approx(alone_metrics["objective/scores"], abs=1e-6)


def test_ranks_leave_out_a_step_together(model_folder, tmp_path):
    """Rank 1 alone has an infinite loss, in the first of two steps; without rank 0's consent the weights would part."""
    (one, metrics), (two, other_metrics) = train("sft_skip", model_folder, tmp_path, 2)
    assert torch.equal(one, two)
    assert metrics["skipped_updates"] == other_metrics["skipped_updates"] == 1
