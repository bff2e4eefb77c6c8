"""DDP on two processes: equal weights on both, and those of one process on the same global batch."""

from __future__ import annotations

from pathlib import Path

import arena
import pytest
import torch
from pair import run_pair
from stages import two_ranks

SAME = {
    "sft": (),
    "ppo_roles": ("objective/scores", "value/loss", "critic/grad_norm", "policy/grad_norm"),
    "ppo_whole": ("objective/scores", "objective/kl_coef", "pretraining/loss"),
    "grpo_whole": ("objective/scores",),
    "grpo_batch": ("objective/scores",),
    "grpo_shared": ("objective/scores",),
}


@pytest.fixture(scope="module")
def on_two(model_folder, tmp_path_factory) -> dict[str, list]:
    """By stage, weights and metrics after every batch, of each rank; all from one pair of processes."""
    out = tmp_path_factory.mktemp("ranks")
    names = [*SAME, "ppo", "grpo", "grpo_groups", "grpo_full", "sft_skip"]
    arena.reward_on_adapters(model_folder, f"{model_folder}_judge")
    run_pair(Path(two_ranks.__file__), out, model_folder, str(out), *names)
    return {name: [torch.load(out / f"{name}_{rank}.pt") for rank in range(2)] for name in names}


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_ranks_agree_after_many_updates_on_different_rollouts(name, on_two):
    (weights, metrics), (others, other_metrics) = on_two[name]
    assert torch.equal(weights[-1], others[-1])
    assert metrics == other_metrics
    assert metrics[-1]["episodes"] == 2 * 2 * 4 * (2 if name == "grpo" else 1)  # ranks × batches × prompts × samples


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_are_one_process_on_the_same_global_batch(name, model_folder, on_two):
    """In RL the responses must be the same ones, too: a row's random stream goes by its number in the whole batch."""
    (one, metrics), (two, _) = on_two[name]
    alone = two_ranks.train(name, model_folder, devices=1)
    assert torch.equal(one[-1], two[-1])
    torch.testing.assert_close(one[-1], alone.weights[-1], atol=1e-5, rtol=0)
    for key in SAME[name]:
        assert metrics[-1][key] == pytest.approx(alone.rows[-1][key], abs=1e-6)


def test_ranks_replace_silent_groups_each_for_itself(model_folder, on_two):
    """One silent group on each: the run is that of one process. Two on one: all sample as many, none waits forever."""
    (one, metrics), (two, other_metrics) = on_two["grpo_groups"]
    alone = two_ranks.train("grpo_groups", model_folder, devices=1)
    torch.testing.assert_close(one[0], alone.weights[0], atol=1e-5, rtol=0)
    assert metrics[0]["objective/scores"] == pytest.approx(alone.rows[0]["objective/scores"], abs=1e-6)
    assert [row["groups/replaced"] for row in metrics] == [1, (2 + 0) / 2]
    assert [row["groups/unused_prompts"] for row in metrics] == [1, 0]
    assert [row["groups/zero_std_fraction"] for row in metrics] == [0, 0]
    assert torch.equal(one[1], two[1])
    assert metrics == other_metrics


def test_ranks_leave_out_a_step_together(on_two):
    """Rank 1 alone has an infinite loss, in the first of two steps; without rank 0's consent the weights would part."""
    (one, metrics), (two, other_metrics) = on_two["sft_skip"]
    assert torch.equal(one[-1], two[-1])
    assert metrics[-1]["skipped_updates"] == other_metrics[-1]["skipped_updates"] == 1


def test_ranks_halve_their_microbatches_together(model_folder, on_two):
    """Memory runs out on rank 1 alone, where rank 0 is about to average the gradients."""
    (one, metrics), (two, other_metrics) = on_two["grpo_full"]
    alone = two_ranks.train("grpo_full", model_folder, devices=1)
    assert torch.equal(one[-1], two[-1])
    torch.testing.assert_close(one[-1], alone.weights[-1], atol=1e-5, rtol=0)
    assert metrics == other_metrics
    assert metrics[-1]["updates"] == alone.rows[-1]["updates"] == 2 * 2
