"""Proximal policy optimization against any rewards, with a critic and a per-token KL penalty in the reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.models import (
    Dtype,
    Network,
    Reference,
    evaluating,
    load_causal,
    load_scalar,
    load_tokenizer,
    response_values,
    save_folder,
    token_logprobs,
)
from lit_rlhf.objectives import (
    adapt_kl_coef,
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    masked_mean,
    masked_whiten,
    token_rewards,
)
from lit_rlhf.rewards import MissingEOS, Reward, Rewards
from lit_rlhf.rollout import DecodeSampler, Sampler, Sampling
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.inner_loop import InnerLoop
from lit_rlhf.stages.measure import answer, judge_held_out, response_metrics, reward_metrics, sequence_kl
from lit_rlhf.stages.optim import Optim, configure
from lit_rlhf.stages.updates import Updates


class PPO(InnerLoop):
    """PPO as Ziegler et al. (2019) and Stiennon et al. (2020) ran it on language models.

    Four roles: the policy; its frozen reference; the rewards (functions, reward models, or both); and a critic of its
    own weights. One batch of prompts is one rollout and one ``global_step``.

    Args:
        model: hub id or folder of the SFT model: the policy's first weights, and the reference.
        rewards: what to maximise: callables ``f(prompts, completions, **columns)`` and reward models.
        critic: hub id or folder of the critic's first weights, a reward model or a language model; ``model`` if null.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how policy and critic are loaded.
        frozen_dtype: precision of the reference's frozen copy.
        reward_weights: a factor for each reward, 0 = logged only; all 1 if null.
        missing_eos: what happens to the score of a response that the length limit cut off; nothing if null.
        sampling: how responses are drawn. The temperature also divides the trainer's logits.
        sampler: what draws them; a decode loop of our own if null.
        optim: the optimizer's settings, for both networks.
        critic_lr: learning rate of the critic; ``optim.lr`` if null.
        updates: how many optimizer steps are made on each rollout, and of how many sequences.
        kl_coef: β, weight of the per-token KL penalty in the reward (the first one, where it adapts).
        kl_target: nats a response that β is steered to (Ziegler et al. 2019, §2.2); β stays fixed if null.
        kl_horizon: sequences over which β adapts.
        gamma: discount.
        lam: λ of the generalised advantage estimate.
        clip: ε, how far the probability ratio may pay off beyond 1.
        value_clip: how far the critic may move from its old value; unclipped if null.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        whiten_rewards: scale per-token rewards to variance 1 over the rollout, keeping their mean.
        seed: of sampling and shuffling; every draw is a pure function of it and of the rollout's number.
    """

    kl_coef: Tensor
    turns = 2

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
        sampling: Sampling = Sampling(),
        sampler: Sampler | None = None,
        optim: Optim = Optim(lr=3e-6, eps=1e-5),
        critic_lr: float | None = None,
        updates: Updates = Updates(epochs=4),
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        whiten_rewards: bool = False,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__(revive(Updates, updates), seed)
        remember(self, arguments)
        network, self.sampling, self.optim = revive(Network, network), revive(Sampling, sampling), revive(Optim, optim)
        self.missing_eos = revive(MissingEOS, missing_eos) if missing_eos else None
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.policy = load_causal(model, network, seed=seed)
        self.critic = load_scalar(critic or model, network, seed=seed)
        needs_reference = kl_coef > 0 or kl_target is not None
        self.reference = Reference(self.policy, dtype=frozen_dtype) if needs_reference else None
        self.rewards = Rewards(rewards, reward_weights)
        self.sampler = sampler or DecodeSampler()
        self.gamma, self.lam, self.clip, self.value_clip = gamma, lam, clip, value_clip
        self.value_coef, self.entropy_coef, self.whiten_rewards = value_coef, entropy_coef, whiten_rewards
        self.kl_target, self.kl_horizon, self.critic_lr = kl_target, kl_horizon, critic_lr
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef), dtype=torch.double))
        self.samples: list[dict[str, Any]] = []
        self.finish_setup("policy", "critic")

    # -- the algorithm: prompts → rollout → scores → advantages → loss ---------------------------------------------

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Loss of the next microbatch; the first call for a batch makes its rollout."""
        if self.updates.empty:
            rollout = self.sample(batch)  # prompts → responses
            rollout = self.score(rollout)  # responses → scores, log-probs, values
            rollout = self.assess(rollout)  # scores → advantages, returns
            self.updates.fill(rollout, self.mean_over_ranks)  # K epochs × M minibatches × microbatches
        part = self.updates.next()
        loss, metrics = self.loss(part)
        self.updates.record(metrics, part)
        return loss

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rollout:
        """Have the responses judged, and read by policy, reference and critic as they are before any update."""
        with self.timed("score"), evaluating(self.policy, self.critic):
            scores, parts = self.rewards(rollout)
            if self.missing_eos is not None:
                scores = self.missing_eos.apply(scores, rollout.ended)
            old = self.old_logprobs(rollout)
            ref, reference, temperature = None, self.reference, self.sampling.temperature
            if reference is not None:
                ref = self.read(
                    rollout, lambda part: reference.token_logprobs(self.policy, part, temperature=temperature)
                )
            values = self.read(rollout, lambda part: response_values(self.critic, part))
        rollout = rollout.with_(scores=scores, old_logprobs=old, ref_logprobs=ref, values=values)
        self.rollout_metrics |= reward_metrics(parts) | response_metrics(rollout)
        return rollout

    @torch.no_grad()
    def assess(self, rollout: Rollout) -> Rollout:
        """Turn scores into per-token rewards (− β·KL, the score on the last token), advantages and returns."""
        mask, old = rollout.mask, rollout.old_logprobs
        ref = old if rollout.ref_logprobs is None else rollout.ref_logprobs  # no reference: no penalty
        kl = kl_estimate(old, ref, "k1")
        beta = float(self.kl_coef)
        rewards = token_rewards(rollout.scores, kl, mask, kl_coef=beta)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, center=False)
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=self.gamma, lam=self.lam)
        advantages = masked_whiten(advantages, mask)

        sequence = sequence_kl(old, ref, mask)
        self.rollout_metrics |= {
            "objective/scores": rollout.scores.mean(),
            "objective/kl": sequence,
            "objective/kl_coef": beta,
            "objective/entropy": -masked_mean(old, mask),
            "objective/non_score_reward": -beta * sequence,
            "objective/rlhf_reward": rollout.scores.mean() - beta * sequence,
            "value/explained_variance": explained_variance(rollout.values, returns, mask),
        }
        if self.kl_target is not None:
            seen, episodes = float(self.mean_over_ranks(sequence)), len(rollout) * self.trainer.world_size
            new = adapt_kl_coef(beta, seen, target=self.kl_target, horizon=self.kl_horizon, samples=episodes)
            self.kl_coef.fill_(new)
        return rollout.with_(rewards=rewards, advantages=advantages, returns=returns)

    def loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """L = (L_policy − c_e·H) + c_v·L_value, a token mean over the optimizer step (Schulman et al. 2017, eq. 9).

        The two share no weights, so they take turns where the strategy allows it: the activations of one network are
        gone before the other runs.
        """
        terms = [term(part) for term in self.updates.whose_turn(self.policy_loss, self.value_loss)]
        per_token = torch.stack([term for term, _ in terms]).sum(dim=0)
        metrics = {key: value for _, found in terms for key, value in found.items()}
        metrics["loss"] = masked_mean(per_token, part.mask)
        return aggregate(per_token, part.mask, "token_mean", part.step_tokens), metrics

    def policy_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped policy loss less the entropy bonus, [B, T]."""
        mask = part.mask
        metrics: dict[str, Tensor] = {}
        entropy = torch.zeros_like(part.advantages)
        if self.entropy_coef:
            logprobs, entropy = token_logprobs(self.policy, part, temperature=self.sampling.temperature, entropy=True)
            metrics["policy/entropy"] = masked_mean(entropy, mask)
        else:
            logprobs = token_logprobs(self.policy, part, temperature=self.sampling.temperature)
        policy_loss, policy = clipped_policy_loss(
            logprobs, part.old_logprobs, part.advantages, mask, clip_low=self.clip, clip_high=self.clip
        )
        metrics |= {f"policy/{key}": metric for key, metric in policy.items()}
        metrics["policy/loss"] = masked_mean(policy_loss, mask)
        return policy_loss - self.entropy_coef * entropy, metrics

    def value_loss(self, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped value loss times its coefficient, [B, T]."""
        values = response_values(self.critic, part)
        value_loss, value = clipped_value_loss(values, part.values, part.returns, part.mask, clip=self.value_clip)
        metrics = {f"value/{key}": metric for key, metric in value.items()}
        metrics["value/loss"] = masked_mean(value_loss, part.mask)
        return self.value_coef * value_loss, metrics

    # -- Lightning --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score greedy and sampled answers to held-out prompts."""
        judge_held_out(self, batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts by sampling."""
        return answer(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """One AdamW with a group each for policy and critic."""
        critic_lr = self.critic_lr if self.critic_lr is not None else self.optim.lr
        groups = {
            "policy": (self.policy.parameters(), self.optim.lr),
            "critic": (self.critic.parameters(), critic_lr),
        }
        return configure(self, groups, self.optim)

    def export(self, folder: str, merge: bool = True) -> None:
        """Write the policy as a Hugging Face folder (adapters merged, or kept as an adapter folder)."""
        save_folder(self.policy, self.tokenizer, folder, merge=merge)
