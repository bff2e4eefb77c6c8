"""What policy, critic, reward and reference take of memory: as four networks, and as roles on one set of base weights.

    python benchmarks/scale/memory.py
    python benchmarks/scale/memory.py --hidden 2048 --layers 24 --vocabulary 128000 --ways one

A Llama of random weights is written to a temporary folder, and each row of the table is a run of its own: two PPO
rollouts with their updates, in one process or in two. Bytes of weights, gradients and optimizer state are counted,
tensor by tensor, where each process holds them; the peak is measured over the second rollout and its update (Linux:
resident size, from which the size before any network was made is taken off; CUDA: what was allocated at most).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lit_rlhf.batch import Prompts  # noqa: E402
from lit_rlhf.models import Lora, Network, freeze, load_causal, load_scalar, save_scalar, without_weights  # noqa: E402
from lit_rlhf.rewards import RewardAdapter, RewardModel  # noqa: E402
from lit_rlhf.rollout import Sampling  # noqa: E402
from lit_rlhf.stages import PPO, Optim, Updates, Value  # noqa: E402

NETWORKS = {
    "full": "four networks, all weights trained",
    "lora": "four networks, LoRA on policy and critic",
    "off": "three networks, LoRA, reference = adapters off",
    "roles": "one base, four roles",
}
WAYS = {"one": "one process", "ddp": "DDP × 2", "fsdp2": "FSDP2 × 2"}
MEGA = 2**20
# Freed blocks go back to the system at once; what glibc would keep of them counts as resident, too.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}


def save_models(shape: argparse.Namespace, folder: Path) -> int:
    """Write the policy, a reward model as a whole and another as adapters; returns the policy's number of weights."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, shape.vocabulary)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.hidden // 64, 1),
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    save_scalar(load_scalar(str(folder / "policy")), tokenizer, folder / "reward")
    adapted = load_scalar(str(folder / "policy"), Network(lora=Lora(r=shape.rank)))
    save_scalar(adapted, tokenizer, folder / "adapters", merge=False)
    return sum(weight.numel() for weight in policy.parameters())


def build(kind: str, folder: Path, shape: argparse.Namespace) -> PPO:
    """The stage with its four roles."""
    policy, network = str(folder / "policy"), Network(lora=None if kind == "full" else Lora(r=shape.rank))
    reward = RewardAdapter(str(folder / "adapters")) if kind == "roles" else RewardModel(str(folder / "reward"))
    stage = PPO(
        policy,
        [reward],
        network=network,
        value=Value(adapter=kind == "roles"),
        sampling=Sampling(max_new_tokens=shape.tokens),
        updates=Updates(epochs=1, micro_batch_tokens=4 * shape.tokens),
        optim=Optim(lr=1e-6),
    )
    if kind == "lora":
        assert stage.reference is not None
        stage.reference.frozen = freeze(load_causal(policy))
    return stage


def held(tensors: Iterable[Any]) -> int:
    """Bytes that this process holds of some tensors."""
    own = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def resident(which: str) -> int:
    """Resident size of this process in bytes, now (VmRSS) or at most since it was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


class Count(L.Callback):
    """Counts and measures the second rollout and its update."""

    def __init__(self, before: int) -> None:
        self.before, self.found = before, dict[str, int]()

    def on_train_batch_start(self, trainer: L.Trainer, stage: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure."""
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def on_before_optimizer_step(self, trainer: L.Trainer, stage: L.LightningModule, optimizer: Any) -> None:
        """Count the gradients while there are some."""
        self.found["gradients"] = held(p.grad for p in stage.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_: Any) -> None:
        """Count the rest; read what was the peak."""
        on_gpu, states = stage.device.type == "cuda", trainer.optimizers[0].state.values()
        self.found["weights"] = held([*stage.parameters(), *stage.buffers()])
        self.found["optimizer state"] = held(v for own in states for v in own.values() if torch.is_tensor(v))
        self.found["peak"] = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - self.before


def work(kind: str, way: str, folder: Path, shape: argparse.Namespace) -> dict[str, int]:
    """Make two rollouts and learn from them."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    count = Count(resident("VmRSS") if Path("/proc/self/status").exists() else 0)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, shape.vocabulary, (shape.rows, shape.tokens), generator=generator)
    batch = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ("",) * shape.rows, {})
    with without_weights() if way == "fsdp2" else contextlib.nullcontext():
        stage = build(kind, folder, shape)
    trainer = L.Trainer(
        strategy="auto" if way == "one" else way,
        devices=1 if way == "one" else 2,
        callbacks=[count],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, DataLoader([batch, batch], batch_size=None))  # type: ignore[arg-type]
    return count.found


def measured(kind: str, way: str, folder: Path, arguments: list[str]) -> dict[str, int]:
    """What the first of a row's processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, *arguments, "--work", kind, way, str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **MALLOC, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(1 if way == "one" else 2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{kind}, {way}: a process failed; to see why: LOCAL_RANK=0 {' '.join(command)}")
    found: dict[str, int] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 640), ("layers", 10), ("vocabulary", 16_384), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, default=4, help="prompts of a process")
    parser.add_argument("--tokens", type=int, default=16, help="of a prompt, and of a response")
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        kind, way, folder = given.work
        print(json.dumps(work(kind, way, Path(folder), given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        count = save_models(given, Path(folder))
        print(f"Llama of {count / 1e6:.1f}M weights in float32, LoRA r {given.rank}; MiB of one process\n")
        columns = ("weights", "gradients", "optimizer state", "peak")
        print(f"| roles | processes | {' | '.join(columns)} |\n| --- | --- |{' ---: |' * len(columns)}")
        for way in given.ways:
            for kind, name in NETWORKS.items():
                found = measured(kind, way, Path(folder), sys.argv[1:])
                sizes = " | ".join(f"{found[column] / MEGA:,.1f}" for column in columns)
                print(f"| {name} | {WAYS[way]} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
