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
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import can_share, forget_in_checkpoints, keep_adapters_only, token_logprobs
from lit_rlhf.rewards import Rewards
from lit_rlhf.rollout import Sampler, Sampling
from lit_rlhf.stages.guards import refuse_accumulation, refuse_half_precision_weights
from lit_rlhf.stages.measure import gap_metrics
from lit_rlhf.stages.optim import clip_gradients
from lit_rlhf.stages.seeds import seed_for
from lit_rlhf.stages.updates import Plan, Updates


class InnerLoop(LightningModule):
    """Hooks that run the planned updates on a rollout; PPO and GRPO add the story.

    A stage sets ``samples_per_prompt``, and in ``training_step`` fills ``updates`` when it is empty and returns the
    loss of ``updates.next()``.
    """

    samples_per_prompt = 1
    turns = 1  # backward passes a microbatch: one a network that shares no weights with the others
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
        self.seed = seed
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
        # DDP waits for every gradient in the pass that it averages in: there all networks go together.
        self.updates.turns = 1 if isinstance(self.trainer.strategy, DDPStrategy) else self.turns

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's samples."""
        self.samples: list[dict[str, Any]] = []

    def on_train_batch_start(self, batch: Prompts, batch_idx: int) -> None:
        """Refuse a batch whose rollout would not divide, before it is made."""
        self.updates.refuse_remainder(len(batch) * self.samples_per_prompt)

    # -- what the stories are told with ---------------------------------------------------------------------------

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the wall-clock seconds of a phase as ``time/{phase}``."""
        started = time.perf_counter()
        with torch.profiler.record_function(phase):
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.rollout_metrics[f"time/{phase}"] = time.perf_counter() - started

    def sample(self, prompts: Prompts) -> Rollout:
        """Draw a response to each prompt from the policy, and plan the updates on them.

        What a row draws follows from the seed, the rollout's number and the row's number in the batch of all processes.
        """
        seed = seed_for(self.seed, "sampling", self.global_step)
        here, group, world = torch.arange(len(prompts)), self.samples_per_prompt, self.trainer.world_size
        # Prompt i of this process is prompt i · world + rank of the batch: data/loader.py, RankSampler.
        rows = (here // group * world + self.global_rank) * group + here % group
        with self.timed("rollout"):
            rollout = self.sampler(self.policy, self.tokenizer, prompts.with_(rows=rows), self.sampling, seed=seed)
        seed, shares = seed_for(self.seed, "shuffling", self.global_step), group > 1 and can_share(self.policy)
        self.updates.draw_up(rollout, seed, self.max_over_ranks, shares)
        self._sync_gradients()
        speed = int(rollout.mask.sum()) * self.trainer.world_size / max(self.rollout_metrics["time/rollout"], 1e-9)
        self.rollout_metrics["throughput/rollout_tokens_per_second"] = speed
        torch.manual_seed(seed_for(self.seed, "dropout", self.global_step, self.global_rank))
        return rollout

    def read(self, rollout: Rollout, reader: Callable[[Rollout], Tensor], like_updates: bool = False) -> Tensor:
        """Apply a per-token reader to the rollout, rows of like length together; [B, T].

        With ``like_updates`` in the updates' own microbatches, so that what is read is what they will read.
        """
        whole = torch.zeros(rollout.mask.shape, device=self.device)
        for rows in self.updates.parts(like_updates):
            part = reader(rollout.select(rows).trim())
            whole[rows.to(self.device), : part.shape[1]] = part
        return whole

    def old_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs of the policy before any update: the sampler's where they are the trainer's own, else read; [B, T].

        Whether they are is seen on a sample of rows, one in thirty-two and four at least.
        """

        def reader(part: Rollout) -> Tensor:
            return token_logprobs(self.policy, part, temperature=self.sampling.temperature)

        sampled, bound = rollout.sampler_logprobs, self.updates.settings.sampler_gap
        if sampled is not None and bound > 0:
            rows = torch.linspace(0, len(rollout) - 1, min(len(rollout), max(4, len(rollout) // 32))).long()
            part = rollout.select(rows).trim()
            gap = gap_metrics(part, reader(part))
            self.rollout_metrics |= gap
            if self.max_over_ranks(gap["sampler/logprob_gap_max"]) <= bound:
                return sampled
        read = self.read(rollout, reader, like_updates=True)
        if sampled is not None:
            self.rollout_metrics |= gap_metrics(rollout, read)
        return read

    # -- the loop --------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step once a planned minibatch; log once; free the gradients before the next generation."""
        assert optimizer_closure is not None
        self._closure, started = optimizer_closure, time.perf_counter()
        for step in range(self.updates.count):
            self.updates.step, self.updates.passes = step, 0
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
        loss = None
        while loss is None or self.updates.more:
            self._zero_grad = loss is None
            self._sync_gradients()
            loss = self._closure()  # Lightning's: training_step, zero_grad, backward
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Zero once an optimizer step, not once a microbatch."""
        if self._zero_grad:
            optimizer.zero_grad(set_to_none=True)

    def _sync_gradients(self) -> None:
        """Have the gradients averaged over ranks with the last microbatch of a step only.

        What ``no_sync`` sets for a block of code: the first step's number of microbatches is known inside it.
        """
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = self.updates.at_last

    def _kl_exceeded(self, step: int) -> bool:
        """Whether this step's approximate KL passed the target; decided on all ranks together."""
        target = self.updates.settings.target_kl
        if target is None:
            return False
        return bool(self.mean_over_ranks(self.updates.mean_metrics(step)["policy/approx_kl"]) > target)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy and critic each by its own norm, and note the norms."""
        self.rollout_metrics |= clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- after ------------------------------------------------------------------------------------------------------

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average over the processes; itself where there is one."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="mean")

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """The largest over the processes, elementwise; itself where there is one."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="max")

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
        values = dict(zip(metrics, means, strict=True)) | {name: float(count) for name, count in counters.items()}
        self.log_dict(values, batch_size=1)
        self.rollout_metrics = {}
