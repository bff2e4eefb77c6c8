"""A run on tape: all that it does and draws, and the same of runs that go on from its checkpoints."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import arena
import lightning as L
import numpy as np
import torch
from faults.runs import differences
from lightning.pytorch.loggers.logger import Logger

from lit_rlhf.callbacks import Checkpoint, ConfigWins, SafeCheckpointIO
from lit_rlhf.checkpoints import read

TIMES = ("time/", "throughput/", "share/", "memory/")
Event = tuple[Any, ...]
Build = Callable[[], tuple[L.LightningModule, L.LightningDataModule]]


def dice() -> tuple[float, float, float]:
    """A number of each global generator."""
    return random.random(), float(np.random.standard_normal()), float(torch.rand(()))


def moody(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[float]:
    """A reward that draws from all three; so coarse that some groups have no signal."""
    return [sum(i < 128 for i in ids) // 2 + float(sum(dice()) > 1.6) for ids in completion_ids]


def mark(value: Any) -> str:
    """A short hash of tensors and plain values, nested; bit for bit."""
    digest = hashlib.blake2b(digest_size=8)

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                digest.update(repr(key).encode())
                add(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                add(inner)
        elif isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


class Tape(L.Callback):
    """Writes down what happens; draws in every hook, as a user's callback may; notes in a checkpoint how far it is."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.begin = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.events.append(("epoch starts", dice()))

    def on_train_batch_start(self, trainer: L.Trainer, stage: L.LightningModule, batch: Any, i: int) -> None:
        rows = [mark(ids[real]) for ids, real in zip(batch.ids, batch.mask, strict=True)]
        texts = getattr(batch, "pretraining", None)
        self.events.append(("batch", i, rows, mark(None if texts is None else texts.ids), dice()))

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_: Any) -> None:
        moments = trainer.optimizers[0].state_dict()
        schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        state = {"weights": mark(stage.state_dict()), "moments": mark(moments), "schedule": mark(schedule)}
        self.events.append(("step", trainer.global_step, state, dice()))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.events.append(("validation", dice()))

    def on_train_epoch_end(self, *_: Any) -> None:
        self.events.append(("epoch ends", dice()))

    def on_save_checkpoint(self, trainer: L.Trainer, stage: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["tape"] = len(self.events)

    def on_load_checkpoint(self, trainer: L.Trainer, stage: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.begin = checkpoint["tape"]


class Book(Logger):
    """A logger that writes onto the tape, all but times."""

    name, version = "book", 0

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        kept = {key: float(value).hex() for key, value in sorted(metrics.items()) if not key.startswith(TIMES)}
        self.tape.events.append(("log", step, kept))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not of interest."""


class Listening:
    """A sampler that writes down what it draws."""

    def __init__(self, sampler: Any, tape: Tape) -> None:
        self.sampler, self.tape = sampler, tape

    def __call__(self, *given: Any, **more: Any) -> Any:
        rollout = self.sampler(*given, **more)
        self.tape.events.append(("sampled", mark([rollout.response_ids, rollout.mask])))
        return rollout


class Keeping(SafeCheckpointIO):
    """Keeps every file that is written, by number, also those that are written once more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.count = folder, 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        shutil.copy(path, self.folder / f"{self.count}.kept")
        self.count += 1


def kept(folder: Path) -> list[Path]:
    """Every checkpoint that a run in ``folder`` wrote, in order."""
    return sorted(folder.glob("*.kept"), key=lambda path: int(path.stem))


def play(build: Build, folder: Path, ckpt: Path | None = None, **settings: Any) -> Tape:
    """Train with the project's own callbacks; a resumed run finds the generators elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(7 if ckpt is None else 1234, verbose=False)
    tape = Tape()
    stage, data = build()
    if hasattr(stage, "sampler"):
        stage.sampler = Listening(stage.sampler, tape)
    saver = Checkpoint(str(folder / "saved"), filename="{step}", every_n_train_steps=1, save_last="link")
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0, **settings}
    trainer = arena.trainer(
        folder,
        logger=Book(tape),
        callbacks=[tape, ConfigWins(), saver],
        enable_checkpointing=True,
        plugins=[Keeping(folder)],
        **settings,
    )
    trainer.fit(stage, datamodule=data, ckpt_path=ckpt)
    return tape


def first_difference(whole: list[Event], resumed: list[Event]) -> str:
    """Where two tapes part; empty if they do not."""
    for i, (one, other) in enumerate(zip(whole, resumed, strict=False)):
        if one != other:
            if one[0] == other[0] == "log" and one[1] == other[1]:
                keys = one[2].keys() | other[2].keys()
                return f"event {i}: logged at {one[1]}: {[key for key in keys if one[2].get(key) != other[2].get(key)]}"
            return f"event {i}:\n  whole   {one}\n  resumed {other}"
    rest = (whole if len(whole) > len(resumed) else resumed)[min(len(whole), len(resumed)) :]
    return f"{len(whole)} events against {len(resumed)}, first of the rest {rest[0]}" if rest else ""


def rest_of(events: list[Event], begin: int) -> list[Event]:
    """What a run did from a checkpoint on; a step is logged a moment after it was saved, by the run that is stopped."""
    rest = events[begin:]
    return rest[1:] if rest[0][0] == "log" else rest


def end_of(file: Path) -> dict[str, Any]:
    """A checkpoint but for the names of files, and the moment after the last step when it was written."""
    moment = ("callbacks", "epoch", "loops", "generators", "tape")
    return {key: value for key, value in read(file).items() if key not in moment}


def faults(build: Build, folder: Path, points: Iterable[int] | None = None, **settings: Any) -> dict[int, str]:
    """Resume from checkpoints of a run and compare with the rest of that run.

    Args:
        build: makes stage and data anew.
        folder: an empty place.
        points: which checkpoints, by number, negative ones from the end; all if None.
        settings: of the Trainer.

    Returns:
        What is not the same, by checkpoint; nothing if all is well.
    """
    whole = play(build, folder / "whole", **settings)
    files = kept(folder / "whole")
    end, found = end_of(files[-1]), {}
    chosen = range(len(files) - 1) if points is None else points
    for point in chosen:
        again = play(build, folder / str(point), files[point], **settings)
        found[point] = first_difference(rest_of(whole.events, again.begin), again.events)
        if not found[point] and (parted := differences(end, end_of(kept(folder / str(point))[-1]))):
            found[point] = f"the last checkpoint differs at {parted[:5]}"
    return {point: fault for point, fault in found.items() if fault}
