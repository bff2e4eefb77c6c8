"""The mechanism under PPO and GRPO: many updates on one rollout, inside Lightning's automatic optimization.

Lightning calls ``optimizer_step`` once a prompt batch; the hook here steps K epochs × M minibatches times, and each
step's closure runs ``training_step`` once a microbatch. So one prompt batch is one ``global_step``, and clipping,
schedules, ``max_steps``, checkpoint intervals, precision plugins and strategies work as their users expect.
There is no algorithm in this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import forget_in_checkpoints, keep_adapters_only
from lit_rlhf.rewards import Rewards
from lit_rlhf.rollout import Sampler, Sampling
from lit_rlhf.stages.guards import refuse_accumulation, refuse_half_precision_weights
from lit_rlhf.stages.seeds import seed_for
from lit_rlhf.stages.updates import Plan, Updates


class InnerLoop(LightningModule):
    """Hooks that run the planned updates on a rollout; PPO and GRPO add the story.

    A stage sets ``samples_per_prompt``, and in ``training_step`` fills ``updates`` when it is empty and returns the
    loss of ``updates.next()``.
    """

    samples_per_prompt = 1
    sampler: Sampler
    sampling: Sampling
    policy: Any
    tokenizer: Any
    rewards: Rewards
    episodes: Tensor
    tokens: Tensor
    update_count: Tensor

    def __init__(self, updates: Updates, seed: int) -> None:
        super().__init__()
        self.updates = Plan(updates)
        self.target_kl, self.seed = updates.target_kl, seed
        self.rollout_metrics: dict[str, Tensor | float] = {}
        for counter in ("episodes", "tokens", "update_count"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.long))

    def finish_setup(self, *networks: str) -> None:
        """Introduce the rewards to the tokenizer; keep out of checkpoints what never trains.

        Args:
            networks: names of the networks that train; under LoRA a checkpoint holds their adapters and heads only.
        """
        self.rewards.bind(self.tokenizer)
        forget_in_checkpoints(self, ("reference", "rewards"))
        keep_adapters_only(self, networks)

    # -- before training -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse the Trainer settings that would quietly train something else."""
        refuse_accumulation(self.trainer)
        refuse_half_precision_weights(self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's samples."""
        self.samples: list[dict[str, Any]] = []

    def on_train_batch_start(self, batch: Prompts, batch_idx: int) -> None:
        """Plan this rollout's updates; the plan is the same on every rank."""
        self.updates.plan(len(batch) * self.samples_per_prompt, seed_for(self.seed, "shuffling", self.global_step))

    # -- what the stories are told with ---------------------------------------------------------------------------

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the wall-clock seconds of a phase as ``time/{phase}``."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.rollout_metrics[f"time/{phase}"] = time.perf_counter() - started

    def sample(self, prompts: Prompts) -> Rollout:
        """Draw a response to each prompt from the policy; the same seed and rollout number draw the same ones."""
        seed = seed_for(self.seed, "sampling", self.global_step, self.global_rank)
        with self.timed("rollout"):
            rollout = self.sampler(self.policy, self.tokenizer, prompts, self.sampling, seed=seed)
        speed = int(rollout.mask.sum()) * self.trainer.world_size / max(self.rollout_metrics["time/rollout"], 1e-9)
        self.rollout_metrics["throughput/rollout_tokens_per_second"] = speed
        torch.manual_seed(seed_for(self.seed, "dropout", self.global_step, self.global_rank))
        return rollout

    def read(self, rollout: Rollout, reader: Callable[[Rollout], Tensor]) -> Tensor:
        """Apply a per-token reader to the rollout, a microbatch at a time; [B, T]."""
        width = rollout.mask.shape[1]
        parts = [reader(part) for part in self.updates.parts(rollout)]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    # -- the loop --------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step once a planned minibatch; log once; free the gradients before the next generation."""
        assert optimizer_closure is not None
        self._closure, started = optimizer_closure, time.perf_counter()
        for step in range(len(self.updates.steps)):
            self.updates.step, self.updates.micro = step, 0
            optimizer.step(closure=self._accumulate)
            self.update_count += 1
            if self._kl_exceeded(step):
                break
        optimizer.zero_grad(set_to_none=True)
        sampled = self.rollout_metrics["time/rollout"] + self.rollout_metrics["time/score"]
        self.rollout_metrics["time/update"] = time.perf_counter() - started - sampled
        self._log_rollout()
        self.updates.clear()

    def _accumulate(self) -> Any:
        """Forward and backward of every microbatch of the current optimizer step."""
        last = len(self.updates.steps[self.updates.step]) - 1
        for micro in range(last + 1):
            self._zero_grad = micro == 0
            with self._gradient_sync(micro == last):
                loss = self._closure()  # Lightning's: training_step, zero_grad, backward
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Zero once an optimizer step, not once a microbatch."""
        if self._zero_grad:
            optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _gradient_sync(self, on: bool) -> Iterator[None]:
        """Average gradients over ranks with the last microbatch only."""
        wrapped = self.trainer.strategy.model
        if not on and isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                yield
        else:
            yield

    def _kl_exceeded(self, step: int) -> bool:
        """Whether this step's approximate KL passed the target; decided on all ranks together."""
        if self.target_kl is None:
            return False
        return bool(self.mean_over_ranks(self.updates.mean_metrics(step)["policy/approx_kl"]) > self.target_kl)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy and critic each by its own norm: the critic's gradient must not shrink the policy's."""
        for group in optimizer.param_groups:
            limit = gradient_clip_val or float("inf")
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(group["params"], limit)
            else:
                norm = torch.nn.utils.clip_grad_norm_(group["params"], limit)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                self.rollout_metrics[f"{group['name']}/grad_norm"] = norm.detach()

    # -- after ------------------------------------------------------------------------------------------------------

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average over the processes; itself where there is one."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="mean")

    def _log_rollout(self) -> None:
        """Everything that was learned about this rollout, in one all-reduce and one call."""
        assert self.updates.rollout is not None
        tokens, rows = int(self.updates.rollout.mask.sum()), len(self.updates.rollout)
        seconds = sum(float(self.rollout_metrics.get(f"time/{phase}", 0.0)) for phase in ("rollout", "score", "update"))
        metrics = {**self.rollout_metrics, **self.updates.mean_metrics()}
        metrics["throughput/tokens_per_second"] = tokens * self.trainer.world_size / max(seconds, 1e-9)
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in metrics.values()])
        means = self.mean_over_ranks(stacked).tolist()
        summed = self.mean_over_ranks(torch.tensor([tokens, rows], device=self.device, dtype=torch.double))
        self.tokens += int(summed[0] * self.trainer.world_size)
        self.episodes += int(summed[1] * self.trainer.world_size)
        counters = {"episodes": self.episodes, "tokens": self.tokens, "updates": self.update_count}
        self.log_dict({**dict(zip(metrics, means, strict=True)), **{k: float(v) for k, v in counters.items()}})
        self.rollout_metrics = {}
