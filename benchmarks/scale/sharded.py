"""FSDP2 on two CPU processes against one process on the same global batch: two tables.

    python benchmarks/scale/sharded.py

First every case of tests/stages/sharded.py: how far the weights are apart after two rollouts (or batches) and how far
they went, what share of all numbers each process holds between steps, and how many collectives each made. Then what a
process needs to load a model of ``--millions`` parameters, at once and by parts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import lightning as L  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from pair import run_pair  # noqa: E402
from stages import sharded  # noqa: E402

from lit_rlhf.models import load_scalar, save_scalar, without_weights  # noqa: E402
from lit_rlhf.stages import SFT  # noqa: E402


def trajectories(folder: Path) -> None:
    """Print the table of cases."""
    tiny.tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "policy")
    tiny.tiny_tokenizer().save_pretrained(folder / "policy")
    save_scalar(load_scalar(str(folder / "policy"), seed=3), tiny.tiny_tokenizer(), str(folder / "reward"))
    run_pair(Path(sharded.__file__), folder, str(folder), str(folder), *sharded.CASES, *sharded.UNEVEN)
    print("| case | apart | moved | held by each | collectives |\n| --- | --- | --- | --- | --- |")
    for name in (*sharded.CASES, *sharded.UNEVEN):
        ranks = [torch.load(folder / f"{name}_{rank}.pt") for rank in range(2)]
        apart = "–"  # uneven rows are others than one process reads
        if name in sharded.CASES:
            _, _, alone = sharded.train(name, str(folder))
            apart = f"{max((one - two).abs().max() for one, two in zip(ranks[0][0], alone.weights, strict=True)):.1e}"
        moved = (ranks[0][0][-1] - ranks[0][0][0]).abs().max()
        held = " + ".join(f"{rank[2][-1]:.1%}" for rank in ranks)
        made = " = ".join(str(sum(rank[3].values())) for rank in ranks)
        print(f"| {name} | {apart} | {moved:.1e} | {held} | {made} |")


class Loaded(L.Callback):
    """Ends a fit when the networks stand where they belong."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        raise KeyboardInterrupt


def peak() -> float:
    """Largest memory of this process so far, in MB (Linux; getrusage would count the parent's, too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def load(folder: str, out: str, way: str) -> None:
    """As one of two processes: load a model and note the memory that took."""
    torch.set_num_threads(1)
    SFT(f"{folder}/policy")  # a small one first, for what libraries take
    before = peak()
    if way == "by parts":
        with without_weights():
            stage = SFT(f"{folder}/large")
    else:
        stage = SFT(f"{folder}/large")
    run = L.Trainer(
        accelerator="cpu", devices=2, strategy="fsdp2", callbacks=[Loaded()], logger=False, enable_checkpointing=False
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run.fit(stage, sharded.arena.loader([sharded.arena.examples(2)]))
    Path(out, f"{way}_{os.environ['LOCAL_RANK']}").write_text(str(peak() - before), encoding="utf-8")
    os._exit(0)


def loading(folder: Path, millions: int) -> None:
    """Print the table of loading."""
    width = 512
    layers = max(1, round((millions * 1e6 - 2 * 32_000 * width) / (4 * width**2 + 3 * width * 4 * width)))
    model = tiny.tiny_llama(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    size = sum(weight.numel() for weight in model.parameters()) * 4 / 2**20
    model.save_pretrained(folder / "large")
    tiny.tiny_tokenizer().save_pretrained(folder / "large")
    print("\n| loaded | memory of each process, MB | weights whole, MB |\n| --- | --- | --- |")
    for way in ("at once", "by parts"):
        run_pair(Path(__file__), folder, "--load", str(folder), str(folder), way)
        took = " / ".join(f"{float((folder / f'{way}_{rank}').read_text(encoding='utf-8')):.0f}" for rank in range(2))
        print(f"| {way} | {took} | {size:.0f} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=150)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trajectories(Path(folder))
        loading(Path(folder), args.millions)


if __name__ == "__main__":
    main()
