"""How far the training data has been read, in rows of all processes together, and what the Trainer makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass
class Position:
    """How far the training data has been read."""

    epoch: int = 0
    rows: int = 0  # rows of this epoch that all processes together have read
    started: bool = False
    pretraining: int = 0  # rows of the pretraining stream, if there is one, that all processes together have read

    def seek(self, epoch: int, rows: int, pretraining: int = 0) -> None:
        """Go there: the next pass begins at this place."""
        self.epoch, self.rows, self.started, self.pretraining = epoch, rows, False, pretraining

    def begin(self, usable: int) -> None:
        """Begin a pass over ``usable`` rows: where it was sought to be, else at the start of the next epoch."""
        if self.started or self.rows >= usable:
            self.epoch, self.rows = self.epoch + 1, 0
        self.started = True


def recount(trainer: Trainer, position: Position, share: int, batch_size: int, world: int) -> None:
    """Where a run goes on with other processes or batches, count the batches behind it in the new size.

    The Trainer counts batches and would end the epoch too early or too late; the place counts rows.

    Args:
        trainer: restored, and about to read.
        position: restored too; nothing is done where it is at the start of an epoch.
        share: rows of this process in an epoch.
        batch_size: rows that a process reads for one batch.
        world: number of processes.
    """
    done = trainer.fit_loop.epoch_loop.batch_progress.current
    if not position.rows or position.started or not done.ready or trainer.limit_train_batches != 1.0:
        return
    left = max(share - position.rows // world, 0) // batch_size
    shift = share // batch_size - left - done.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(done, name, getattr(done, name) + shift)
