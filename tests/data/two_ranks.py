"""Run by test_loader.py: two processes train on one file, and each writes down what it read.

The libraries are loaded once and the processes forked off, as loading them is what takes the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_loader import Recorder

from lit_rlhf.data import DataError, PromptData


def fit(data: PromptData, folder: str, ckpt: str | None = None) -> Recorder:
    """Train on two processes; without ``ckpt`` every step is saved in ``folder``."""
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        callbacks=[] if ckpt else [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)],
        enable_checkpointing=ckpt is None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module


def run_rank(rank: int, source: str, val: str, folder: str) -> None:
    """What one process does."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    whole = fit(PromptData(source, val=val, batch_size=3), folder)
    resumed = fit(PromptData(source, val=val, batch_size=3), folder, ckpt=f"{folder}/step=2.ckpt")
    error, large = "", PromptData(source, val_fraction=0, batch_size=12)
    large.trainer = resumed.trainer
    large.setup()
    try:
        large.train_dataloader()
    except DataError as caught:
        error = str(caught)
    (Path(folder) / f"rank{rank}.json").write_text(
        json.dumps({"seen": whole.seen, "held_out": whole.held_out, "resumed": resumed.seen, "error": error})
    )


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, *sys.argv[1:])) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
