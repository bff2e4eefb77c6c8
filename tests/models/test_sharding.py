"""Two processes that hold half a model each say what one process says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from lit_rlhf.checkpoint_parts import Pieces
from lit_rlhf.models import (
    Average,
    Lora,
    Network,
    fill,
    gathered,
    is_sharded,
    load_causal,
    shard,
    unsharded_trainables,
    without_weights,
)
from lit_rlhf.models.sharding import own_rows
from lit_rlhf.strategies import FSDP2Strategy, _cut

WORKER = Path(__file__).with_name("sharded_worker.py")


def test_without_a_mesh_nothing_is_sharded(model_folder):
    model = load_causal(model_folder)
    kind = type(model)
    assert type(shard(model, None)) is kind
    with gathered(model):
        assert type(model) is kind
    assert len(unsharded_trainables(model)) == len(list(model.parameters()))
    assert unsharded_trainables(model.requires_grad_(False)) == []


@pytest.mark.parametrize("lora", [None, Lora(r=1), Lora(r=5)])
def test_each_process_reads_its_rows_and_no_more(lora, model_folder, mesh_of_three):
    """Of every weight; of an adapter with one row the others have none."""
    network, rank = Network(lora=lora), torch.distributed.get_rank()
    wanted = dict(load_causal(model_folder, network, seed=2).named_parameters())
    with without_weights():
        later = load_causal(model_folder, network, seed=2)
    average = Average(later, 0.5)
    fill(shard(later, mesh_of_three), torch.device("cpu"))
    average.follow(later)
    for name, weight in later.named_parameters():
        parts = wanted[name].chunk(3)
        own, first = own_rows(weight)
        assert torch.equal(own, parts[rank] if rank < len(parts) else wanted[name][:0]), name
        assert first == sum(len(part) for part in parts[:rank])
        assert own.dtype == torch.float32
    for name, own in average.named_buffers():
        assert torch.equal(own.to_local(), later.get_parameter(name.replace("/", ".")).to_local())
    assert all(not buffer.is_meta for buffer in later.buffers())


def test_an_average_of_whole_weights_is_cut_like_them(model_folder, mesh_of_three):
    model = load_causal(model_folder)
    average, start = Average(model, 0.5), {name: weight.detach().clone() for name, weight in model.named_parameters()}
    shard(model, mesh_of_three)
    with torch.no_grad():
        for weight in model.parameters():
            weight.to_local().zero_()
    average.follow(model)
    average.follow(model)  # before each fit, validation, …
    average.update(model)
    for name, weight in start.items():
        own, first = own_rows(average.get_buffer(name.replace(".", "/")))
        assert torch.equal(own, weight[first : first + len(own)] / 2)
        assert own.untyped_storage().nbytes() == own.nbytes  # not the whole's


def test_low_precision_is_for_what_is_gathered(model_folder, mesh_of_three):
    """Weights are kept as they are, gathered in bfloat16, and gradients averaged in float32."""
    model = shard(load_causal(model_folder), mesh_of_three, low_precision=torch.bfloat16)
    assert is_sharded(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for module in (model, *model.model.layers):
        policy = module._get_fsdp_state()._mp_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_cut_to_the_rows_of_each_process(dtype, mesh_of_three):
    """From a whole tensor and from pieces of another number of processes; in the weight's own number format."""
    layer = shard(torch.nn.Linear(3, 7, dtype=dtype), mesh_of_three)
    value, rank = torch.arange(21.0).view(7, 3), torch.distributed.get_rank()
    for saved in (value, Pieces([(4, value[4:]), (0, value[:4])])):
        found = _cut(saved, layer.weight)
        assert (found.shape, found.dtype, found.stride()) == (layer.weight.shape, dtype, layer.weight.stride())
        assert torch.equal(found.to_local(), value.chunk(3)[rank].to(dtype))
    assert torch.equal(_cut(Pieces([(0, value)]), None), value)
    step = torch.tensor(3.0)
    assert torch.equal(_cut(step, layer.weight), step)
    assert _cut(step, layer.weight) is not step


def test_only_the_first_process_keeps_what_is_put_together(mesh_of_three):
    rank, layer = torch.distributed.get_rank(), shard(torch.nn.Linear(3, 7), mesh_of_three)
    strategy = SimpleNamespace(_save_distributed_checkpoint=False, is_global_zero=rank == 0)
    state = {"layer": layer.state_dict(), "step": torch.tensor(3.0), "lr": 0.5}
    found = FSDP2Strategy._collected(strategy, state)
    assert found["lr"] == 0.5
    assert [value.numel() for value in (*found["layer"].values(), found["step"])] == (
        [21, 7, 1] if rank == 0 else [0] * 3
    )


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
