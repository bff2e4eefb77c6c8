"""The mechanism under PPO and GRPO: many updates on one rollout, inside Lightning's automatic optimization.

Lightning calls ``optimizer_step`` once a prompt batch; the hook here steps K epochs × M minibatches times, and each
step's closure runs ``training_step`` once a microbatch. So one prompt batch is one ``global_step``, and clipping,
schedules, ``max_steps``, checkpoints, precision plugins and strategies work as expected. No algorithm is in this file.
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
from lit_rlhf.models import Average, can_share, forget_in_checkpoints, keep_adapters_only
from lit_rlhf.rewards import Rewards
from lit_rlhf.rollout import Sampler, Sampling
from lit_rlhf.stages.finite import Watch, bad_microbatches, clip_finite
from lit_rlhf.stages.guards import refuse_accumulation, refuse_half_precision_weights
from lit_rlhf.stages.halving import Halving
from lit_rlhf.stages.memory import explained, microbatch_sizes
from lit_rlhf.stages.optim import Optim
from lit_rlhf.stages.penalties import steer_penalty
from lit_rlhf.stages.ranks import over_ranks
from lit_rlhf.stages.resume import greet
from lit_rlhf.stages.seeds import seed_for
from lit_rlhf.stages.settings import KL, Clip, Updates
from lit_rlhf.stages.spread import spread
from lit_rlhf.stages.updates import Plan


class InnerLoop(LightningModule):
    """Hooks that run the planned updates on a rollout; PPO and GRPO add the story.

    A stage sets ``samples_per_prompt``, and in ``training_step`` fills ``updates`` when it is empty and returns the
    loss of ``updates.next()``.
    """

    samples_per_prompt = 1
    turns = 1  # backward passes a microbatch: one a loss that shares no weights with the others
    refreshes_reference = False  # whether the reference moves, and so must be in checkpoints
    sampler: Sampler
    sampling: Sampling
    policy: Any
    tokenizer: Any
    rewards: Rewards
    average: Average | None
    kl: KL
    clip: Clip
    optim: Optim
    kl_coef: Tensor
    clip_penalty: Tensor
    episodes: Tensor
    tokens: Tensor
    update_count: Tensor

    def __init__(self, updates: Updates, seed: int) -> None:
        super().__init__()
        self.updates = Plan(updates)
        self.seed = seed
        self.rollout_metrics: dict[str, Tensor | float] = {}
        self.sampled: list[int] = [0, 0]  # tokens and responses of this rollout, the discarded ones too
        for counter in ("episodes", "tokens", "update_count"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.long))

    def finish_setup(self, *networks: str) -> None:
        """Introduce the rewards to tokenizer and policy; keep out of checkpoints what never trains.

        Args:
            networks: names of the networks that train; under LoRA a checkpoint holds their adapters and heads only.
        """
        self.rewards.bind(self.tokenizer, self.policy)
        # Equal on all processes as it is; DDP would send it round before every forward pass.
        own = [] if self.average is None else [f"average.{name}" for name, _ in self.average.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = own
        forget_in_checkpoints(self, ("rewards",) if self.refreshes_reference else ("reference", "rewards"))
        keep_adapters_only(self, networks)
        self.watch, self.halving = Watch(self, self.optim), Halving(self)
        for weight, first in (("kl_coef", self.kl.coef), ("clip_penalty", self.clip.penalty)):
            self.register_buffer(weight, torch.tensor(float(first), dtype=torch.double))

    # -- before training -------------------------------------------------------------------------------------------

    configure_model = spread  # shards the networks where the strategy asks for it

    def on_fit_start(self) -> None:
        """Refuse the Trainer settings that would quietly train something else."""
        refuse_accumulation(self.trainer)
        refuse_half_precision_weights(self.trainer)
        # DDP waits for every gradient in the pass that it averages in: there all networks go together.
        self.updates.turns = 1 if isinstance(self.trainer.strategy, DDPStrategy) else self.turns
        self.halving.begin()

    on_load_checkpoint = greet  # refuses another run's checkpoint, says how far this one had come

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
        with torch.profiler.record_function(phase), explained(phase):
            yield
        self._wait()
        spent = self.rollout_metrics.get(f"time/{phase}", 0.0)  # a phase may come more than once
        self.rollout_metrics[f"time/{phase}"] = spent + time.perf_counter() - started

    def _wait(self) -> None:
        """Let the device finish what it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sample(self, prompts: Prompts, first: int = 0) -> Rollout:
        """Draw ``samples_per_prompt`` responses to each prompt from the policy.

        What a row draws follows from the seed, the rollout's number and the row's number in the batch of all processes.

        Args:
            prompts: of this process.
            first: number of the first of them in this process's batch.
        """
        seed, group = seed_for(self.seed, "sampling", self.global_step), self.samples_per_prompt
        here = torch.arange(first * group, (first + len(prompts)) * group)
        # Prompt i of this process is prompt i · world + rank of the batch: data/loader.py, RankSampler.
        rows = (here // group * self.trainer.world_size + self.global_rank) * group + here % group
        prompts = prompts.repeat(group).with_(rows=rows)
        with self.timed("rollout"):
            rollout = self.sampler(self.policy, self.tokenizer, prompts, self.sampling, seed=seed)
        self.sampled = [self.sampled[0] + int(rollout.mask.sum()), self.sampled[1] + len(rollout)]
        return rollout

    def plan(self, rollout: Rollout) -> None:
        """Plan the updates on a rollout; fix what dropout draws in them."""
        seed, shares = seed_for(self.seed, "shuffling", self.global_step), self.samples_per_prompt > 1
        self.updates.draw_up(rollout, seed, self.max_over_ranks, shares and can_share(self.policy))
        self._sync_gradients()
        torch.manual_seed(seed_for(self.seed, "dropout", self.global_step, self.global_rank))

    # -- the loop --------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step once a planned minibatch; log once; free the gradients before the next generation."""
        assert optimizer_closure is not None
        self._closure, started = optimizer_closure, time.perf_counter()
        for step in range(self.updates.count):
            self.updates.step, self.updates.passes = step, 0
            with explained("update", lambda: microbatch_sizes(self)):
                optimizer.step(closure=self.halving.around(self._accumulate))
            self.update_count += not self.watch.in_a_row
            if self._kl_exceeded(step):
                break
        optimizer.zero_grad(set_to_none=True)
        if self.clip.form == "penalty":
            steer_penalty(self, self.updates.mean_metrics(step)["policy/old_kl"])
        if self.average is not None:
            self.average.update(self.policy)
        self._wait()
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
            self.watch.note(loss)
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Zero once an optimizer step, not once a microbatch."""
        if self._zero_grad:
            optimizer.zero_grad(set_to_none=True)

    def _sync_gradients(self) -> None:
        """Have the gradients averaged over ranks with the last microbatch of a step only, as ``no_sync`` would."""
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = self.updates.at_last and not self.halving.wanted

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
        """Clip policy and critic each by its own norm, and note the norms; make no step that is not finite."""
        limits = gradient_clip_val, gradient_clip_algorithm
        self.rollout_metrics |= clip_finite(self, optimizer, *limits, lambda _: bad_microbatches(self))
        if self.updates.idle and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            optimizer.zero_grad(set_to_none=True)  # else AdamW would go on by its moments

    # -- after ------------------------------------------------------------------------------------------------------

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average over the processes; itself where there is one."""
        return over_ranks(self.trainer, value, "mean")

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Add up over the processes; itself where there is one."""
        return over_ranks(self.trainer, value, "sum")

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """The largest over the processes, elementwise; itself where there is one."""
        return over_ranks(self.trainer, value, "max")

    def _log_rollout(self) -> None:
        """Everything that was learned about this rollout, in one all-reduce and one call."""
        totals = self.sum_over_ranks(torch.tensor(self.sampled, device=self.device, dtype=torch.double)).tolist()
        tokens, phases = totals[0], ("rollout", "score", "update")
        seconds = [float(self.rollout_metrics.get(f"time/{phase}", 0.0)) for phase in phases]
        metrics = {**self.rollout_metrics, **self.updates.mean_metrics()}
        metrics["throughput/rollout_tokens_per_second"] = tokens / max(seconds[0], 1e-9)
        metrics["throughput/tokens_per_second"] = tokens / max(sum(seconds), 1e-9)
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in metrics.values()])
        means = self.mean_over_ranks(stacked).tolist()
        self.tokens += int(totals[0])
        self.episodes += int(totals[1])
        counters = {"episodes": self.episodes, "tokens": self.tokens, "updates": self.update_count}
        values = dict(zip(metrics, means, strict=True)) | {name: float(count) for name, count in counters.items()}
        self.log_dict(values, batch_size=1)
        self.rollout_metrics, self.sampled = {}, [0, 0]
