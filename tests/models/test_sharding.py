"""Two processes that hold half a model each say what one process says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import tiny
import torch

from lit_rlhf.models import gathered, load_causal, shard, unsharded_trainables

WORKER = Path(__file__).with_name("sharded_worker.py")


def test_without_a_mesh_nothing_is_sharded(model_folder):
    model = load_causal(model_folder)
    kind = type(model)
    assert type(shard(model, None)) is kind
    with gathered(model):
        assert type(model) is kind
    assert len(unsharded_trainables(model)) == len(list(model.parameters()))
    assert unsharded_trainables(model.requires_grad_(False)) == []


def test_two_processes_equal_one(tmp_path):
    """Responses, log-probs, values, gradients and the saved folder; with all weights and with adapters."""
    folder = str(tmp_path / "model")
    tiny.tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tests = WORKER.parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, str(WORKER), folder, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for kind in ("whole", "lora"):
        one = worker.work(folder, tmp_path / f"one_{kind}", kind == "lora", None, rank=0)
        parts = [rank[kind]["held"] for rank in ranks]
        # Between uses each process holds its part and no more (odd shapes make parts a little unequal).
        assert parts[0][0] + parts[1][0] == parts[0][1] + parts[1][1] == one["held"][0]
        for rank in ranks:
            found = rank[kind]
            assert found["shards"] == ["", "model.layers.0", "model.layers.1"]
            assert found["unsharded"] == ["outside.weight"]
            assert torch.equal(found["responses"], one["responses"])
            for key in ("logprobs", "values", "policy gradient", "critic gradient", "saved"):
                error = (found[key] - one[key]).abs().max()
                assert error < 2e-5 * max(1.0, one[key].abs().max()), f"{kind}: {key} differ by {error}"
