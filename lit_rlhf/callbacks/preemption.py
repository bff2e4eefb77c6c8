"""The machine is to be taken away: save at the next safe point, and go."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.callbacks.checkpoint import Checkpoint


class Preemption(Callback):
    """On a signal, finish the rollout (the optimizer step) at hand, save a checkpoint and end with exit code 128 + n.

    The code is the shell's for a process that signal n ended, so no script takes the run for a finished one; nothing
    is exported. Started again with ``--ckpt_path last`` it goes on as if nothing had been.

    Lightning's own handlers are put aside while training lasts, so that none is handled twice: that of SIGTERM saves
    nothing, and that of SLURM's requeue signal saves wherever it strikes, which may be between two updates of a
    rollout, where no run can be resumed exactly. What the latter does afterwards, ``scontrol requeue``, is done here.
    More signals, while the first is obeyed, change nothing.

    Args:
        signals: names of the signals; none: Lightning's handlers stay.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")) -> None:
        known = signal.Signals.__members__
        if unknown := [name for name in signals if name not in known]:
            raise ValueError(f"preemption.signals: no signal {', '.join(unknown)} here; for instance SIGTERM, SIGUSR1")
        if deaf := [name for name in signals if name in ("SIGKILL", "SIGSTOP")]:
            raise ValueError(f"preemption.signals: no process is told of {', '.join(deaf)}; take SIGTERM or SIGUSR1")
        self.signals = [known[name] for name in signals]
        self._received = 0
        self._leaving = 0
        self._step = -1
        self._saved = ""
        self._requeue: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; Lightning has put its handlers in place a moment ago."""
        self._received = self._leaving = 0
        saves = any(isinstance(one, Checkpoint) for one in trainer.checkpoint_callbacks)
        if not self.signals or not saves or threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal or signal.SIGUSR1
        taken = dict.fromkeys([*self.signals, *([self._requeue] if self._requeue else [])])
        self._before = {one: signal.signal(one, self._note) for one in taken}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, if the batch before ended with a checkpoint for that; else note where this one begins."""
        self._leave(trainer)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if a signal came and the optimizer has stepped: gradients are in no checkpoint."""
        if trainer.global_step not in (self._step, trainer.max_steps):  # at the last the run is over anyway
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before a validation, which may take longer than there is time."""
        self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if a signal came meanwhile."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step not in (0, trainer.max_steps):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _note(self, number: int, _frame: Any) -> None:
        self._received = self._received or number

    def _save(self, trainer: Trainer) -> None:
        """Save and be ready to leave, if a signal came to any process."""
        came = self._received
        if trainer.world_size > 1:
            number = torch.tensor(came, device=trainer.strategy.root_device)
            came = int(trainer.strategy.reduce(number, reduce_op="max"))
        saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint)), None)
        if came and saver is not None:
            saver.save_now(trainer)
            self._leaving, self._saved = came, saver._last_checkpoint_saved

    def _give_back(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def _leave(self, trainer: Trainer) -> None:
        if not self._leaving:
            return
        name, saved = signal.Signals(self._leaving).name, self._saved or "there is none"
        rank_zero_info(f"{name}: stopped. Newest checkpoint: {saved}. Start again with --ckpt_path last")
        if self._requeue == self._leaving and trainer.is_global_zero:
            requeue()
        raise SystemExit(128 + self._leaving)


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        rank_zero_warn(f"job {job} could not be requeued: {error}")
        return
    rank_zero_info(f"job {job} requeued" if not code else f"job {job} not requeued: scontrol ended with code {code}")
