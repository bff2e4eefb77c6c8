"""FSDP2 on two processes: the trajectory of one process on the same global batch, with half the weights in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pair import run_pair
from stages import sharded

TOLERANCE = 2e-7  # of a weight; one step of Adam moves it by 1e-3
ALIKE = (
    *("objective/scores", "objective/kl", "policy/grad_norm", "critic/grad_norm", "pretraining/loss"),
    *("loss", "token_accuracy", "tokens", "accuracy", "margin", "chosen_mean"),
)


@pytest.fixture(scope="module")
def on_two(sharded_folders, tmp_path_factory) -> dict[str, list]:
    """By case, weights, metrics and share of all numbers held after every step, of each rank."""
    out, names = tmp_path_factory.mktemp("sharded"), [*sharded.CASES, *sharded.LOW, *sharded.UNEVEN]
    run_pair(Path(sharded.__file__), out, str(sharded_folders), str(out), *names)
    return {name: [torch.load(out / f"{name}_{rank}.pt") for rank in range(2)] for name in names}


@pytest.mark.parametrize("name", sharded.CASES)
def test_sharded_training_is_that_of_one_process(name, sharded_folders, on_two):
    (first, metrics, held, _), (second, _, also_held, _) = on_two[name]
    _, _, alone = sharded.train(name, str(sharded_folders))
    assert torch.equal(first[-1], second[-1])
    assert (alone.weights[-1] - alone.weights[0]).abs().max() > 5e-4  # it does move
    for mine, whole in zip(first, alone.weights, strict=True):
        torch.testing.assert_close(mine, whole, atol=TOLERANCE, rtol=0)
    for key in ALIKE:
        if key in alone.rows[-1]:
            assert metrics[-1][key] == pytest.approx(alone.rows[-1][key], rel=1e-4, abs=1e-5), key
    # Between steps each process holds its part of every network, frozen ones too, and no more.
    for one, other in zip(held, also_held, strict=True):
        assert one + other == pytest.approx(1.0, abs=1e-6)
        assert 0.45 < one < 0.55


@pytest.mark.parametrize("name", sharded.LOW)
def test_bfloat16_is_for_computing_only(name, sharded_folders, on_two):
    """Weights stay float32; they move where they move in one process under autocast, but for rounding."""
    (first, metrics, *_), (second, *_) = on_two[name]
    _, _, alone = sharded.train(name, str(sharded_folders))
    assert torch.equal(first[-1], second[-1])
    assert first[-1].dtype == torch.float32
    moves = [weights[-1] - weights[0] for weights in (first, alone.weights)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9
    assert metrics[0].get("sampler/logprob_gap_max", 0.0) < 0.02


@pytest.mark.parametrize("name", sharded.UNEVEN)
def test_as_many_collectives_whatever_the_lengths(name, on_two):
    """One process has the long rows and wants more passes; with one more or less the other would wait forever."""
    (first, _, _, counts), (second, _, _, others) = on_two[name]
    assert counts == others
    assert counts["c10d::_allgather_base_"] > 8
    assert torch.equal(first[-1], second[-1])
