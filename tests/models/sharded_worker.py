"""Run by test_sharding: the same work in one process and in two, results written to files."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lit_rlhf.batch import Prompts
from lit_rlhf.models import (
    Lora,
    Network,
    evaluating,
    load_causal,
    load_scalar,
    response_values,
    save_folder,
    shard,
    token_logprobs,
    unsharded_trainables,
)
from lit_rlhf.rollout import GenerateSampler, Sampling


def held(*models: nn.Module) -> int:
    """Numbers that this process holds."""
    parameters = [p for model in models for p in model.parameters()]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of a model, whole and in one row."""
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads])


def work(folder: str, out: Path, lora: bool, mesh: DeviceMesh | None, rank: int) -> dict[str, object]:
    """Sample, score, differentiate and save with a policy and a critic."""
    network = Network(lora=Lora(r=2) if lora else None)
    policy, critic = (shard(load(folder, network), mesh) for load in (load_causal, load_scalar))
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    prompts, sampler, tokenizer = Prompts(ids, ids != 0, ("a", "b")), GenerateSampler(), tiny.tiny_tokenizer()
    # Every process takes a different number of steps here, which only gathered weights allow.
    sampler(policy, tokenizer, prompts, Sampling(max_new_tokens=3 + 4 * rank), seed=rank)
    rollout = sampler(policy, tokenizer, prompts, Sampling(max_new_tokens=8), seed=5)
    held_after_sampling = held(policy, critic)
    with torch.no_grad(), evaluating(policy, critic):
        response_values(critic, rollout)
        token_logprobs(policy, rollout)
    held_after_scoring = held(policy, critic)
    logprobs, values = token_logprobs(policy, rollout), response_values(critic, rollout)
    (logprobs.sum() + values.sum()).backward()
    save_folder(policy, None, out)
    if dist.is_initialized():
        dist.barrier()
    saved = load_file(out / "model.safetensors")
    stage = nn.ModuleDict({"policy": policy, "critic": critic, "outside": nn.Linear(2, 1, bias=False)})
    return {
        "shards": [name for name, module in policy.named_modules() if isinstance(module, FSDPModule)],
        "unsharded": unsharded_trainables(stage),
        "held": [held_after_sampling, held_after_scoring],
        "responses": rollout.response_ids,
        "logprobs": logprobs.detach(),
        "values": values.detach(),
        "policy gradient": gradients(policy),
        "critic gradient": gradients(critic),
        "saved": torch.cat([saved[key].flatten() for key in sorted(saved)]),
    }


def process(rank: int, folder: str, out: Path) -> None:
    """Be one of two processes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    mesh = init_device_mesh("cpu", (2,))
    found = {kind: work(folder, out / f"two_{kind}", kind == "lora", mesh, rank) for kind in ("whole", "lora")}
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    other = os.fork()  # everything is imported once, and no thread runs yet
    process(1 if other == 0 else 0, folder, out)
    if other == 0:
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
