"""Group relative policy optimization: no critic, the other answers to a prompt are the baseline."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import Average, Dtype, Network, Reference, averaged, load_causal, load_tokenizer, save_folder
from lit_rlhf.objectives import (
    aggregate,
    baseline_advantages,
    masked_mean,
    masked_whiten,
    normalize_then_sum,
    rewards_to_go,
    step_advantages,
    token_rewards,
)
from lit_rlhf.rewards import MissingEOS, Reward, Rewards
from lit_rlhf.rollout import DecodeSampler, Sampler, Sampling
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.fresh import explore
from lit_rlhf.stages.guards import refuse_steps, refuse_unseen, warn_if_silent
from lit_rlhf.stages.inner_loop import InnerLoop
from lit_rlhf.stages.measure import answer, group_metrics, judge_held_out, sequence_kl
from lit_rlhf.stages.optim import Optim, configure
from lit_rlhf.stages.penalties import kl_to_reference, policy_terms, read_policy, steer_kl
from lit_rlhf.stages.reading import recall
from lit_rlhf.stages.settings import KL, Advantages, Clip, Correction, Entropy, Updates


class GRPO(InnerLoop):
    """GRPO (Shao et al. 2024, DeepSeekMath, §4.1, eq. 3 and 4) and its kin: Dr. GRPO, DAPO, RLOO, REINFORCE++, GSPO.

    Each prompt is answered ``group_size`` times; an answer's advantage is its score against its group's. One batch of
    prompts is one rollout and one ``global_step``. ``docs/algorithms.md`` says which settings make which algorithm.

    Args:
        model: hub id or folder of the SFT model: the policy's first weights, and the reference.
        rewards: what to maximise: callables ``f(prompts, completions, **columns)`` and reward models.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how the policy is loaded.
        frozen_dtype: precision of the reference's frozen copy.
        reward_weights: a factor for each reward, 0 = logged only; all 1 if null.
        missing_eos: what happens to the score of a response that the length limit cut off; nothing if null.
        sampling: how responses are drawn. The temperature also divides the trainer's logits.
        sampler: what draws them; a decode loop of our own if null.
        optim: the optimizer's settings.
        group_size: G, answers a prompt.
        groups: prompts a rollout; the further ones of a batch replace those whose answers all score the same (dynamic
            sampling). All prompts of the batch if null.
        advantages: how scores become advantages.
        truncated: whether responses that the length limit cut off count in the loss, or are masked (DAPO's overlong
            filtering).
        updates: how many optimizer steps are made on each rollout, and of how many sequences.
        kl: price of leaving the reference; with coefficient 0 none is loaded.
        clip: how far one rollout may move the policy.
        correction: weigh tokens by how likely the sampler drew them; not if null.
        aggregation: how per-token losses become one number: mean of each response, then over responses (GRPO), mean
            over all tokens of the step (DAPO), or sum over a fixed length (Dr. GRPO).
        entropy: bonus for being undecided.
        refresh_reference: make the policy the new reference every so many rollouts (iterative GRPO); never if null.
        ema: decay, a rollout, of a moving average of the policy's weights, which is what is exported; off if null.
        seed: of sampling and shuffling; every draw is a pure function of it and of the rollout's number.
    """

    def __init__(
        self,
        model: str,
        rewards: list[Reward],
        tokenizer: str | None = None,
        network: Network = Network(),
        frozen_dtype: Dtype = "float32",
        reward_weights: list[float] | None = None,
        missing_eos: MissingEOS | None = None,
        sampling: Sampling = Sampling(),
        sampler: Sampler | None = None,
        optim: Optim = Optim(lr=1e-6),
        group_size: int = 8,
        groups: int | None = None,
        advantages: Advantages = Advantages(),
        truncated: Literal["count", "mask"] = "count",
        updates: Updates = Updates(),
        kl: KL = KL(coef=0.04, estimator="k3", place="loss"),
        clip: Clip = Clip(),
        correction: Correction | None = None,
        aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "sequence_mean",
        entropy: Entropy = Entropy(),
        refresh_reference: int | None = None,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__(revive(Updates, updates), seed)
        remember(self, arguments)
        network, self.sampling, self.optim = revive(Network, network), revive(Sampling, sampling), revive(Optim, optim)
        self.advantages, self.kl, self.clip = revive(Advantages, advantages), revive(KL, kl), revive(Clip, clip)
        self.entropy = revive(Entropy, entropy)
        self.correction = revive(Correction, correction) if correction else None
        self.missing_eos = revive(MissingEOS, missing_eos) if missing_eos else None
        refuse_unseen(self.advantages, self.kl, self.missing_eos)
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.policy = load_causal(model, network, seed=seed)
        self.reference = Reference(self.policy, dtype=frozen_dtype) if self.kl.needs_reference else None
        if refresh_reference is not None and (self.reference is None or self.reference.frozen is None):
            raise ValueError("refresh_reference moves a frozen copy: it goes with a KL, and without adapters")
        self.average = Average(self.policy, ema) if ema is not None else None
        self.rewards = Rewards(rewards, reward_weights)
        self.sampler = sampler or DecodeSampler()
        self.group_size = self.samples_per_prompt = group_size
        self.groups, self.truncated, self.aggregation = groups, truncated, aggregation
        self.refresh_reference, self.refreshes_reference = refresh_reference, refresh_reference is not None
        self.samples: list[dict[str, Any]] = []
        self.finish_setup("policy")

    def on_train_batch_start(self, batch: Prompts, batch_idx: int) -> None:
        """Refuse what does not divide; every ``refresh_reference`` rollouts the policy becomes the reference."""
        self.updates.refuse_remainder((self.groups or len(batch)) * self.group_size)
        every = self.refresh_reference
        if every and self.reference is not None and self.global_step and self.global_step % every == 0:
            self.reference.refresh(self.policy)

    # -- the algorithm: prompts → rollout → scores → advantages → loss ---------------------------------------------

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Loss of the next microbatch; the first call for a batch makes its rollout."""
        if self.updates.empty:
            rollout = explore(self, batch)  # prompts → G responses each → scores
            rollout = recall(self, rollout)  # responses → log-probs of policy and reference
            rollout = self.assess(rollout)  # scores → advantages
            self.updates.fill(rollout, self.mean_over_ranks)  # K epochs × M minibatches × microbatches
        part = self.updates.next()
        loss, metrics = self.loss(part)
        self.updates.record(metrics, part)
        return loss

    @torch.no_grad()
    def assess(self, rollout: Rollout) -> Rollout:
        """Give each token its response's score against its group's, less β·KL where that is no part of the loss."""
        mask, kl, beta = rollout.mask, kl_to_reference(self, rollout), float(self.kl_coef)
        scores = rollout.scores if rollout.outcomes is None else rollout.outcomes  # steps are credited below
        if self.kl.place == "score":
            scores = scores - beta * kl.sum(dim=1)
        relative = self.compare(rollout, scores)
        if self.kl.place == "reward":
            credit = rewards_to_go(token_rewards(relative, kl, mask, kl_coef=beta), mask, gamma=1.0)
        else:
            credit = relative.unsqueeze(1) * mask
        if rollout.step_scores is not None and rollout.step_ends is not None:
            credit = credit + step_advantages(
                *(rollout.step_scores, rollout.step_ends, mask, self.group_size),
                scale=self.advantages.scale,
                over_ranks=self.sum_over_ranks,
            )
        if self.advantages.whiten:
            credit = masked_whiten(credit, mask, over_ranks=self.sum_over_ranks)
        self.report(rollout)
        counted = mask & rollout.ended.unsqueeze(1) if self.truncated == "mask" else mask
        warn_if_silent(self, counted)
        return rollout.with_(advantages=credit * counted, mask=counted)

    def compare(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """Advantage of each response [B] from its score."""
        if self.advantages.mix == "normalize_then_sum":
            refuse_steps(rollout)
            return normalize_then_sum(*self.rewards.weighed(rollout), self.group_size, over_ranks=self.sum_over_ranks)
        baseline, scale = self.advantages.baseline, self.advantages.scale
        return baseline_advantages(
            scores, self.group_size, baseline=baseline, scale=scale, over_ranks=self.sum_over_ranks
        )

    def report(self, rollout: Rollout) -> None:
        """Note what is known of the rollout; move β for the next one."""
        scores, old, ref, mask = rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.mask
        self.rollout_metrics |= group_metrics(scores, self.group_size)
        self.rollout_metrics |= {"objective/scores": scores.mean(), "objective/entropy": -masked_mean(old, mask)}
        if ref is not None:
            distance = sequence_kl(old, ref, mask)
            self.rollout_metrics |= {"objective/kl": distance, "objective/kl_coef": float(self.kl_coef)}
            steer_kl(self, distance, len(rollout) * self.trainer.world_size)

    def loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_policy + β·KL(π‖π_ref) − c_e·H, aggregated over the whole optimizer step (Shao et al. 2024, eq. 3)."""
        per_token, metrics = policy_terms(self, part, *read_policy(self, part))
        metrics["loss"] = masked_mean(per_token, part.mask)
        size = {
            "token_mean": part.step_tokens,
            "sequence_mean": part.step_rows,
            "fixed_length": part.step_rows * self.sampling.max_new_tokens,
        }
        return aggregate(per_token, part.mask, self.aggregation, size[self.aggregation]), metrics

    # -- Lightning --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score greedy and sampled answers to held-out prompts."""
        judge_held_out(self, batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts by sampling."""
        return answer(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """One AdamW over the policy."""
        return configure(self, {"policy": (self.policy.parameters(), self.optim.lr)}, self.optim)

    def export(self, folder: str, merge: bool = True) -> None:
        """Write the policy, or its average, as a Hugging Face folder (adapters merged, or as an adapter folder)."""
        with averaged(self.policy, self.average):
            save_folder(self.policy, self.tokenizer, folder, merge=merge)
