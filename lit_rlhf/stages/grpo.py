"""Group relative policy optimization: no critic, the other answers to a prompt are the baseline."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import (
    Dtype,
    Network,
    Reference,
    evaluating,
    load_causal,
    load_tokenizer,
    save_folder,
    token_logprobs,
)
from lit_rlhf.objectives import aggregate, clipped_policy_loss, group_advantages, kl_estimate, masked_mean
from lit_rlhf.rewards import MissingEOS, Reward, Rewards
from lit_rlhf.rollout import DecodeSampler, Sampler, Sampling
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.inner_loop import InnerLoop
from lit_rlhf.stages.measure import answer, group_metrics, judge_held_out, response_metrics, reward_metrics, sequence_kl
from lit_rlhf.stages.optim import Optim, configure
from lit_rlhf.stages.updates import Updates


class GRPO(InnerLoop):
    """GRPO with outcome supervision (Shao et al. 2024, DeepSeekMath, §4.1, eq. 3 and 4).

    Each prompt is answered ``group_size`` times; an answer's advantage is its score against its group's. The KL to the
    reference stands in the loss (k3). One batch of prompts is one rollout and one ``global_step``.

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
        advantage_scale: divide centred scores by the group's or the batch's standard deviation, or not at all.
        updates: how many optimizer steps are made on each rollout, and of how many sequences.
        kl_coef: β, weight of the KL term in the loss; at 0 no reference is loaded.
        clip_low: ε below 1, where the probability ratio stops paying off.
        clip_high: ε above 1.
        aggregation: how per-token losses become one number: mean of each response, then over responses (GRPO), mean
            over all tokens of the step (DAPO), or sum over a fixed length (Dr. GRPO).
        entropy_coef: weight of the entropy bonus.
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
        advantage_scale: Literal["group", "batch", "none"] = "group",
        updates: Updates = Updates(),
        kl_coef: float = 0.04,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "sequence_mean",
        entropy_coef: float = 0.0,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__(revive(Updates, updates), seed)
        remember(self, arguments)
        network, self.sampling, self.optim = revive(Network, network), revive(Sampling, sampling), revive(Optim, optim)
        self.missing_eos = revive(MissingEOS, missing_eos) if missing_eos else None
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.policy = load_causal(model, network, seed=seed)
        self.reference = Reference(self.policy, dtype=frozen_dtype) if kl_coef > 0 else None
        self.rewards = Rewards(rewards, reward_weights)
        self.sampler = sampler or DecodeSampler()
        self.group_size = self.samples_per_prompt = group_size
        self.advantage_scale, self.aggregation = advantage_scale, aggregation
        self.kl_coef, self.clip_low, self.clip_high, self.entropy_coef = kl_coef, clip_low, clip_high, entropy_coef
        self.samples: list[dict[str, Any]] = []
        self.finish_setup("policy")

    # -- the algorithm: prompts → rollout → scores → advantages → loss ---------------------------------------------

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Loss of the next microbatch; the first call for a batch makes its rollout."""
        if self.updates.empty:
            rollout = self.sample(batch.repeat(self.group_size))  # prompts → G responses each
            rollout = self.score(rollout)  # responses → scores, log-probs
            rollout = self.assess(rollout)  # scores → advantages
            self.updates.fill(rollout, self.mean_over_ranks)  # K epochs × M minibatches × microbatches
        part = self.updates.next()
        loss, metrics = self.loss(part)
        self.updates.record(metrics, part)
        return loss

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rollout:
        """Have the responses judged, and read by policy and reference as they are before any update."""
        with self.timed("score"), evaluating(self.policy):
            scores, parts = self.rewards(rollout)
            if self.missing_eos is not None:
                scores = self.missing_eos.apply(scores, rollout.ended)
            old = self.old_logprobs(rollout)
            ref, reference, temperature = None, self.reference, self.sampling.temperature
            if reference is not None:
                ref = self.read(
                    rollout, lambda part: reference.token_logprobs(self.policy, part, temperature=temperature)
                )
        rollout = rollout.with_(scores=scores, old_logprobs=old, ref_logprobs=ref)
        self.rollout_metrics |= reward_metrics(parts) | response_metrics(rollout)
        return rollout

    @torch.no_grad()
    def assess(self, rollout: Rollout) -> Rollout:
        """Give every token of a response its score relative to its group's."""
        scores, old, ref, mask = rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.mask
        advantages = group_advantages(scores, self.group_size, scale=self.advantage_scale)
        self.rollout_metrics |= group_metrics(scores, self.group_size)
        self.rollout_metrics |= {"objective/scores": scores.mean(), "objective/entropy": -masked_mean(old, mask)}
        if ref is not None:
            self.rollout_metrics |= {"objective/kl": sequence_kl(old, ref, mask), "objective/kl_coef": self.kl_coef}
        return rollout.with_(advantages=advantages.unsqueeze(1) * mask)

    def loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_policy + β·KL(π‖π_ref) − c_e·H, aggregated over the whole optimizer step (Shao et al. 2024, eq. 3)."""
        mask = part.mask
        metrics: dict[str, Tensor] = {}
        entropy = torch.zeros_like(part.advantages)
        if self.entropy_coef:
            logprobs, entropy = token_logprobs(self.policy, part, temperature=self.sampling.temperature, entropy=True)
            metrics["policy/entropy"] = masked_mean(entropy, mask)
        else:
            logprobs = token_logprobs(self.policy, part, temperature=self.sampling.temperature)
        policy_loss, policy = clipped_policy_loss(
            logprobs, part.old_logprobs, part.advantages, mask, clip_low=self.clip_low, clip_high=self.clip_high
        )
        metrics |= {f"policy/{key}": metric for key, metric in policy.items()}
        per_token = policy_loss - self.entropy_coef * entropy
        if part.ref_logprobs is not None:
            kl = kl_estimate(logprobs, part.ref_logprobs, "k3")
            per_token = per_token + self.kl_coef * kl.where(mask, 0.0)
            metrics["policy/kl_loss"] = masked_mean(kl, mask)
        metrics |= {"loss": masked_mean(per_token, mask), "policy/loss": masked_mean(policy_loss, mask)}
        size = {
            "token_mean": part.step_tokens,
            "sequence_mean": part.step_rows,
            "fixed_length": part.step_rows * self.sampling.max_new_tokens,
        }
        return aggregate(per_token, mask, self.aggregation, size[self.aggregation]), metrics

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
        """Write the policy as a Hugging Face folder (adapters merged, or kept as an adapter folder)."""
        save_folder(self.policy, self.tokenizer, folder, merge=merge)
