"""How fast a fit is, and where its time and memory go."""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_rlhf.callbacks.crowding import Crowding
from lit_rlhf.stages.inner_loop import InnerLoop
from lit_rlhf.stages.ppo import PPO


class Throughput(Callback):
    """Log tokens a second, each phase's share of the time, peak memory, and the share of the device's peak FLOP/s.

    Each value at a logged step is about all that happened since the last one, in the first process; a GPU is waited
    for at logged steps only. In PPO and GRPO the phases are those that the stage times; elsewhere there is one, the
    update, from the start of a batch to its end.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the weights while no strategy has sharded them."""
        training = [child for child in pl_module.children() if any(p.requires_grad for p in child.parameters())]
        weights = sum(p.numel() for child in training for p in child.parameters())
        if isinstance(pl_module, PPO) and pl_module.value.adapter:  # reads the policy's base, too, in a pass of its own
            weights += sum(p.numel() for p in pl_module.policy.parameters() if not p.requires_grad)
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        # A token costs two a weight forward, two backward to what the weight reads, and two to the weight if it trains.
        self.token_flops = 4 * weights + 2 * trainable
        self.peak_flops = peak_flops(trainer.strategy.root_device, str(trainer.precision))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.logged_step = trainer.global_step
        if isinstance(pl_module, InnerLoop):
            self.counters = int(pl_module.tokens), int(pl_module.update_count)
        self._begin(pl_module.device)
        self.crowding = Crowding()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.batch_began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation within the fit is a phase of its own."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.seconds["validation"] += time.perf_counter() - self.validation_began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at a logged step, log."""
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        due = every > 0 and step != self.logged_step and step % every == 0
        if due and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if isinstance(pl_module, InnerLoop):
            self._count_rollout(trainer, pl_module, batch)
        else:
            self.seconds["update"] += time.perf_counter() - self.batch_began
            mask = getattr(batch, "mask", None)
            self.updated += mask.sum() if isinstance(mask, Tensor) else 0
        if due:
            self.logged_step = step
            pl_module.log_dict(self._metrics(trainer.world_size) | peak_memory(pl_module.device))
            self._begin(pl_module.device)
            if pl_module.device.type == "cpu" and trainer.is_global_zero:
                self.crowding.look()

    def _begin(self, device: torch.device) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)  # of each phase
        self.responses = 0.0  # response tokens of all processes, in PPO and GRPO
        self.updated: float | Tensor = 0  # tokens that this process's updates read
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _count_rollout(self, trainer: Trainer, stage: InnerLoop, batch: Any) -> None:
        """Take a rollout's seconds from the stage's own log, its tokens and updates from the stage's counters."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("time/"):
                self.seconds[name.removeprefix("time/")] += float(value)
        (tokens, updates), before = (int(stage.tokens), int(stage.update_count)), self.counters
        self.counters = tokens, updates
        responses, passes = tokens - before[0], (updates - before[1]) / stage.updates.settings.minibatches
        prompts = int(batch.mask.sum()) * stage.samples_per_prompt
        self.responses += responses
        self.updated += passes * (prompts + responses / trainer.world_size)

    def _metrics(self, processes: int) -> dict[str, float]:
        wall = max(time.perf_counter() - self.began, 1e-9)
        shares = {f"share/{phase}": seconds / wall for phase, seconds in self.seconds.items()}
        metrics = {**shares, "share/other": max(1 - sum(shares.values()), 0.0)}
        updated, seconds = float(self.updated), self.seconds["update"]
        if self.responses:
            for phase in sorted(self.seconds.keys() - {"rollout", "validation"}):  # the stage logs the rollout's itself
                metrics[f"throughput/{phase}_tokens_per_second"] = self.responses / max(self.seconds[phase], 1e-9)
        elif updated:
            metrics["throughput/tokens_per_second"] = updated * processes / (wall - self.seconds["validation"])
        if self.peak_flops and seconds:
            metrics["mfu"] = updated * self.token_flops / seconds / self.peak_flops
        return metrics


def peak_flops(device: torch.device, precision: str) -> int | None:
    """Give a GPU's peak FLOP/s from Lightning's table; None where the table does not know it.

    Args:
        device: any device.
        precision: the Trainer's, for instance ``bf16-mixed``.
    """
    if device.type != "cuda":
        return None
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not in the table
        return get_available_flops(device, kinds.get(precision.split("-")[0], torch.float32))


def peak_memory(device: torch.device) -> dict[str, float]:
    """Give ``memory/peak_gb``: on a GPU what was allocated at most since the last reset, else the peak resident size.

    Args:
        device: any device.
    """
    if device.type == "cuda":
        return {"memory/peak_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return {"memory/peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
