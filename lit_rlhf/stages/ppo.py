"""Proximal policy optimization against any rewards, with a critic and a per-token KL penalty in the reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import (
    Average,
    Dtype,
    Network,
    Reference,
    averaged,
    load_causal,
    load_tokenizer,
    save_folder,
    weights_of,
)
from lit_rlhf.objectives import aggregate, generalized_advantages, masked_whiten, token_rewards
from lit_rlhf.rewards import MissingEOS, Reward, Rewards
from lit_rlhf.rollout import DecodeSampler, Sampler, Sampling
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.critic import appraise, critic_weights, new_critic, read_both, value_terms, values_of
from lit_rlhf.stages.guards import warn_if_silent
from lit_rlhf.stages.inner_loop import InnerLoop
from lit_rlhf.stages.measure import answer, judge_held_out, objective_metrics
from lit_rlhf.stages.optim import Optim, configure, forget_moments
from lit_rlhf.stages.penalties import kl_to_reference, policy_terms, read_policy, steer_kl
from lit_rlhf.stages.pretraining import pretraining_loss, pretraining_texts
from lit_rlhf.stages.reading import judge, recall
from lit_rlhf.stages.settings import KL, Clip, Correction, Entropy, Updates, Value
from lit_rlhf.stages.shaping import ScoreShaping, Shaping, step_rewards

Loss = Callable[[Rollout], tuple[Tensor, dict[str, Tensor]]]


class PPO(InnerLoop):
    """PPO as Ziegler et al. (2019), Stiennon et al. (2020) and Ouyang et al. (2022) ran it on language models.

    Four roles: the policy; its frozen reference; the rewards (functions, reward models, or both); and a critic, of its
    own weights, adapters on the policy's or a head on it. One batch of prompts is one rollout and one ``global_step``.

    Args:
        model: hub id or folder of the SFT model: the policy's first weights, and the reference.
        rewards: what to maximise: callables ``f(prompts, completions, **columns)`` and reward models.
        critic: hub id or folder of the critic's first weights, a reward model or a language model; ``model`` if null.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how policy and critic are loaded.
        frozen_dtype: precision of the reference's frozen copy.
        reward_weights: a factor for each reward, 0 = logged only; all 1 if null.
        missing_eos: what happens to the score of a response that the length limit cut off; nothing if null.
        shaping: how scores are brought to a known size.
        whiten_rewards: scale per-token rewards to variance 1 over the rollout, keeping their mean.
        sampling: how responses are drawn. The temperature also divides the trainer's logits.
        sampler: what draws them; a decode loop of our own if null.
        optim: the optimizer's settings, for both networks.
        updates: how many optimizer steps are made on each rollout, and of how many sequences.
        kl: price of leaving the reference; with coefficient 0 and no target none is loaded.
        clip: how far one rollout may move the policy.
        correction: weigh tokens by how likely the sampler drew them; not if null.
        gamma: discount.
        lam: λ of the generalised advantage estimate; at 1 it is the reward to go with the critic as its baseline.
        value: how the critic learns.
        entropy: bonus for being undecided.
        ptx_coef: γ, weight of the likelihood of the pretraining texts that the data serves (PPO-ptx, Ouyang et al.
            2022, eq. 2), as a mean over their tokens.
        ema: decay, a rollout, of a moving average of the policy's weights, which is what is exported; off if null.
        seed: of sampling and shuffling; every draw is a pure function of it and of the rollout's number.
    """

    def __init__(
        self,
        model: str,
        rewards: list[Reward],
        critic: str | None = None,
        tokenizer: str | None = None,
        network: Network = Network(),
        frozen_dtype: Dtype = "float32",
        reward_weights: list[float] | None = None,
        missing_eos: MissingEOS | None = None,
        shaping: Shaping = Shaping(),
        whiten_rewards: bool = False,
        sampling: Sampling = Sampling(),
        sampler: Sampler | None = None,
        optim: Optim = Optim(lr=3e-6, eps=1e-5),
        updates: Updates = Updates(epochs=4),
        kl: KL = KL(),
        clip: Clip = Clip(),
        correction: Correction | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        value: Value = Value(),
        entropy: Entropy = Entropy(),
        ptx_coef: float = 0.0,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__(revive(Updates, updates), seed)
        remember(self, arguments)
        network, self.sampling, self.optim = revive(Network, network), revive(Sampling, sampling), revive(Optim, optim)
        self.kl, self.clip, self.value = revive(KL, kl), revive(Clip, clip), revive(Value, value)
        self.entropy, self.shaping = revive(Entropy, entropy), ScoreShaping(revive(Shaping, shaping))
        self.correction = revive(Correction, correction) if correction else None
        self.missing_eos = revive(MissingEOS, missing_eos) if missing_eos else None
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.policy = load_causal(model, network, seed=seed)
        self.critic = new_critic(self, critic, model, network)
        self.reference = Reference(self.policy, dtype=frozen_dtype) if self.kl.needs_reference else None
        self.average = Average(self.policy, ema) if ema is not None else None
        self.rewards = Rewards(rewards, reward_weights)
        self.sampler = sampler or DecodeSampler()
        self.gamma, self.lam, self.ptx_coef, self.whiten_rewards = gamma, lam, ptx_coef, whiten_rewards
        self.turns, self.pretraining_sum = len(self.losses), torch.zeros(())
        self.samples: list[dict[str, Any]] = []
        self.finish_setup("policy", "critic")

    def on_train_batch_start(self, batch: Prompts, batch_idx: int) -> None:
        """Refuse what does not divide; where the critic's warm-up ends, the policy's moments start anew."""
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step == self.value.warmup > 0:
            forget_moments(self.trainer.optimizers[0], "policy")

    # -- the algorithm: prompts → rollout → scores → advantages → loss ---------------------------------------------

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Loss of the next microbatch; the first call for a batch makes its rollout."""
        if self.updates.empty:
            rollout = judge(self, self.sample(batch))  # prompts → responses → scores
            rollout = recall(self, rollout)  # responses → log-probs of policy and reference
            rollout = appraise(self, rollout)  # responses → values
            rollout = self.assess(rollout)  # scores, values → advantages, returns
            self.updates.fill(rollout, self.mean_over_ranks, pretraining_texts(self, batch))
        part = self.updates.next()
        loss, metrics = self.loss(part)
        self.updates.record(metrics, part)
        return loss

    @torch.no_grad()
    def assess(self, rollout: Rollout) -> Rollout:
        """Turn scores into per-token rewards (− β·KL, the score on the last token), advantages and returns."""
        mask, kl, beta = rollout.mask, kl_to_reference(self, rollout), float(self.kl_coef)
        warn_if_silent(self, mask)
        scores = self.shaping(rollout, self.sum_over_ranks)
        if self.kl.place == "score":
            scores = scores - beta * kl.sum(dim=1)
        of_steps, scores = step_rewards(rollout, scores)
        rewards = of_steps + token_rewards(scores, kl, mask, kl_coef=beta if self.kl.place == "reward" else 0.0)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, center=False, over_ranks=self.sum_over_ranks)
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=self.gamma, lam=self.lam)
        advantages = masked_whiten(advantages, mask, over_ranks=self.sum_over_ranks)
        rollout = rollout.with_(rewards=rewards, advantages=advantages, returns=returns)
        metrics = objective_metrics(rollout, beta)
        self.rollout_metrics |= metrics
        steer_kl(self, metrics["objective/kl"], len(rollout) * self.trainer.world_size)
        return rollout

    def loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """L = (L_policy − c_e·H) + c_v·L_value + γ·L_ptx, token means over the step (Schulman et al. 2017, eq. 9).

        What shares no pass takes turns where the strategy allows it: the activations of one term are gone before the
        next one's network runs.
        """
        found = [term(part) for term in self.updates.whose_turn(*self.losses)]
        total = torch.stack([loss for loss, _ in found]).sum()
        metrics = {key: value for _, more in found for key, value in more.items()}
        # As a mean over this part's tokens, which is what the record weighs it by.
        metrics["loss"] = total.detach() * (part.step_tokens / part.mask.sum().clamp(min=1))
        return total, metrics

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The terms of the loss, each of which has a pass of its own."""
        own = (self.joint_loss,) if self.value.shared else (self.policy_loss, self.value_loss)
        return (*own, self.ptx_loss) if self.ptx_coef else own

    def policy_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """L_policy − c_e·H (+ β·KL where it is part of the loss)."""
        return self.improve(part, *read_policy(self, part))

    def value_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """c_v·L_value of a critic with weights of its own, or adapters."""
        return self.fit_values(part, values_of(self, part))

    def joint_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Both, from one pass through the trunk that they share."""
        logprobs, entropy, values = read_both(self, part)
        (policy, of_policy), (value, of_value) = self.improve(part, logprobs, entropy), self.fit_values(part, values)
        return policy + value, of_policy | of_value

    def improve(self, part: Rollout, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy loss from what the policy says of the responses, [B, T] each."""
        per_token, metrics = policy_terms(self, part, logprobs, entropy)
        return aggregate(per_token, part.mask, "token_mean", part.step_tokens), metrics

    def fit_values(self, part: Rollout, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Value loss times its coefficient, from the values [B, T] of the critic being trained."""
        per_token, metrics = value_terms(self, part, values)
        return self.value.coef * aggregate(per_token, part.mask, "token_mean", part.step_tokens), metrics

    def ptx_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """γ·L_ptx over the pretraining texts of this part."""
        return pretraining_loss(self, part)

    # -- Lightning --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score greedy and sampled answers to held-out prompts."""
        judge_held_out(self, batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts by sampling."""
        return answer(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """One AdamW with a group each for policy and critic; during the critic's warm-up the policy's rate is 0."""
        critic_lr = self.value.lr if self.value.lr is not None else self.optim.lr
        groups = {
            "policy": (weights_of(self.policy).values(), self.optim.lr),
            "critic": (critic_weights(self), critic_lr),
        }
        return configure(self, groups, self.optim, begin={"policy": self.value.warmup})

    def export(self, folder: str, merge: bool = True) -> None:
        """Write the policy, or its average, as a Hugging Face folder (adapters merged, or as an adapter folder)."""
        with averaged(self.policy, self.average):
            save_folder(self.policy, self.tokenizer, folder, merge=merge)
