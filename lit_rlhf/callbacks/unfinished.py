"""Where in Lightning's loops a run stands when it is saved: what is still to be done before the next batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def within_a_step(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated: they are in no checkpoint, so nothing may be saved now."""
    return trainer.fit_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Whether the batch that has just ended is followed by a validation, which has not begun."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batches: Any = loop.batch_progress.total
    just_ended = trainer.training and batches.completed < batches.processed
    if not just_ended or fetcher is None or not loop._should_check_val_fx(fetcher):
        return False
    trainer.validating = True  # as Lightning has it where it makes the loaders
    loop.val_loop.setup_data()
    trainer.training = True
    return not loop.val_loop.skip  # there may be no rows


def expect_validation(fit_loop: dict[str, Any]) -> None:
    """Have the resumed run begin with the validation that was to follow.

    Lightning would pass over it: it goes back to a validation only if it was stopped within one, so that is what the
    checkpoint says: the batch is completed, and the first batch of the validation has begun.

    Args:
        fit_loop: its state as a checkpoint holds it.
    """
    train, validation = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_loop.val_loop.batch_progress"]
    for count in ("total", "current"):
        train[count]["completed"] = train[count]["processed"]
        validation[count].update(dict.fromkeys(validation[count], 0))
    validation["total"].update(ready=1, started=1)


def begin_epoch(trainer: Trainer) -> None:
    """Where a run was saved at the end of an epoch, have the resumed one begin the next, hooks and counts included.

    Lightning does so unless ``max_steps`` is set: then it takes the epoch that is over for one to go on with.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop._restarting = loop.epoch_loop.restarting = False


def begin_validation(trainer: Trainer) -> None:
    """Forget where the run was resumed, now that the validation begins: a later checkpoint would still say so."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.ready = total.started = total.processed = total.completed
