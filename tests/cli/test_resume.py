"""``--ckpt_path`` from the command line: what cannot be resumed from is refused in a line."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lit_rlhf.commands.resume import folders_of


class Trap:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_strangers_file_is_refused_in_one_line_and_not_run(refused, workspace: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "run")}, tmp_path / "x.ckpt")
    fit = ("fit", "--config", "sft.yaml", "--config", "tiny.yaml", "--model.model", "base", "--data.train", "sft.jsonl")
    where = ("--trainer.default_root_dir", str(tmp_path / "runs"))
    lines = refused(*fit, *where, "--ckpt_path", str(tmp_path / "x.ckpt"))
    assert any("holds more than tensors and plain values (posix.mkdir)" in line for line in lines), lines
    assert any("no good one beside it" in line for line in lines), lines
    lines = refused("export", "--checkpoint", str(tmp_path / "x.ckpt"), "--folder", str(tmp_path / "out"))
    assert "posix.mkdir" in lines[0]
    assert not (tmp_path / "run").exists()


def test_last_looks_where_this_run_would_save(tmp_path: Path) -> None:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from lit_rlhf.callbacks import Checkpoint

    (tmp_path / "version_3" / "checkpoints").mkdir(parents=True)
    logger = CSVLogger(str(tmp_path), name="")
    found = folders_of(L.Trainer(accelerator="cpu", logger=logger, callbacks=[Checkpoint()]))
    assert found == [tmp_path / "checkpoints", tmp_path / "version_3" / "checkpoints"]
    own = Checkpoint(str(tmp_path / "own"))
    assert folders_of(L.Trainer(accelerator="cpu", logger=logger, callbacks=[own])) == [tmp_path / "own"]
    bare = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    assert folders_of(bare)[0] == tmp_path / "checkpoints"
