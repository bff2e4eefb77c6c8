"""Supervised fine-tuning: imitate the demonstrations, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.batch import Examples, Prompts
from lit_rlhf.metrics import Perplexity, TokenAccuracy
from lit_rlhf.models import (
    Network,
    embedding_noise,
    fits,
    forget_in_checkpoints,
    keep_adapters_only,
    load_causal,
    load_tokenizer,
    next_token_logprobs,
    packed_next_token_logprobs,
    save_folder,
    uniform_noise,
)
from lit_rlhf.objectives import next_token_loss
from lit_rlhf.rewards import Reward, Rewards
from lit_rlhf.rollout import DecodeSampler, Sampling
from lit_rlhf.stages.arguments import remember, revive
from lit_rlhf.stages.finite import Watch, clip_and_log
from lit_rlhf.stages.guards import refuse_half_precision_weights
from lit_rlhf.stages.measure import SHOWN, answer, log_rows
from lit_rlhf.stages.memory import explained_backward, explains_memory
from lit_rlhf.stages.optim import Optim, configure, divide_gradients
from lit_rlhf.stages.parts import read_in_parts
from lit_rlhf.stages.ranks import over_ranks, sum_over_ranks
from lit_rlhf.stages.resume import greet
from lit_rlhf.stages.seeds import seed_for
from lit_rlhf.stages.spread import spread


class SFT(LightningModule):
    """Minimise the mean negative log-likelihood of the tokens that the data marks as to be learned.

    The mean is over all such tokens of an optimizer step, whatever ``accumulate_grad_batches`` and the number of
    processes: each batch's loss is a sum, and the accumulated gradient is divided once by the count.

    Args:
        model: hub id or folder of the language model to start from.
        tokenizer: hub id or folder of the tokenizer; ``model`` if null.
        network: how the model is loaded.
        optim: the optimizer's settings.
        packing: read several examples in one row, none of which sees another; the result is the same. It makes fewer
            and longer rows of many short ones, which pays with flash attention.
        neftune_alpha: α of uniform noise on the embeddings in training, α / √(L·d) at most for a row of L tokens (Jain
            et al. 2023, arXiv 2310.05914: 5 to 15); 0 = none.
        sampling: how the samples shown at validation are drawn.
        sample_prompts: held-out examples whose beginning is continued at validation; 0 = none.
        rewards: what judges these continuations: ``val/score`` is the mean over the sampled ones, to choose a
            checkpoint by (Ouyang et al. 2022, §3.5). Rewards that read a column of the data cannot: there is none.
        seed: of those samples, of dropout and of the noise.
    """

    tokens: Tensor

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        network: Network = Network(),
        optim: Optim = Optim(),
        packing: bool = False,
        neftune_alpha: float = 0.0,
        sampling: Sampling = Sampling(max_new_tokens=64),
        sample_prompts: int = 4,
        rewards: list[Reward] | None = None,
        seed: int = 0,
    ) -> None:
        arguments = locals().copy()
        super().__init__()
        remember(self, arguments)
        network, self.sampling, self.optim = revive(Network, network), revive(Sampling, sampling), revive(Optim, optim)
        self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=network.trust_remote_code)
        self.policy = load_causal(model, network, seed=seed)
        self.rewards = Rewards(rewards) if rewards else None
        if self.rewards is not None:
            self.rewards.bind(self.tokenizer)
            forget_in_checkpoints(self, ["rewards"])
        keep_adapters_only(self, ["policy"])
        self.watch = Watch(self, self.optim)
        if not 0 <= neftune_alpha < float("inf"):
            raise ValueError(f"neftune_alpha is {neftune_alpha}: expected 0 for no noise, or more (5 is usual)")
        self.packing, self.neftune_alpha = packing, neftune_alpha
        self.sampler = DecodeSampler()
        self.sample_prompts, self.seed = sample_prompts, seed
        self.samples: list[dict[str, Any]] = []
        self.sampled_prompts = 0  # of this validation
        self.step_tokens: int | Tensor = 0
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.val_perplexity, self.val_accuracy = Perplexity(), TokenAccuracy()

    def read(self, batch: Examples, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each next token, whether it was the likeliest, and whether it is learned; [B, L − 1]."""
        learned = batch.loss_mask & batch.mask
        if self.packing:
            logprobs, correct = packed_next_token_logprobs(self.policy, batch.ids, batch.mask, learned, noise)
        else:
            more = (learned,) if noise is None else (learned, noise)
            logprobs, correct = read_in_parts(noisy_logprobs, self.policy, batch.ids, batch.mask, *more)
        return logprobs, correct, learned[:, 1:]

    configure_model = spread  # shards the networks where the strategy asks for it

    def on_fit_start(self) -> None:
        """Refuse the Trainer settings that would quietly train something else."""
        refuse_half_precision_weights(self.trainer)

    @explains_memory("policy")
    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        """Sum of the batch's negative log-likelihood; the step's gradient is divided by its tokens before clipping."""
        logprobs, correct, mask = self.read(batch, self.draw(batch))
        total, count = next_token_loss(logprobs, mask, 1.0), mask.sum()
        self.watch.note(logprobs.where(mask, 0.0).sum(dim=1))
        self.step_tokens += count  # a tensor: asking for its value here would make a GPU wait
        loss, right, counted = sum_over_ranks(self.trainer, total.detach(), (correct & mask).sum(), count)
        self.tokens += counted.long()
        mean, accuracy = (value / counted.clamp(min=1) for value in (loss, right))
        self.log_dict(
            {"loss": mean, "perplexity": mean.exp(), "token_accuracy": accuracy, "tokens": self.tokens.float()},
            batch_size=len(batch),
        )
        return total * self.trainer.accumulate_grad_batches  # Lightning divides by it; the count below is the true one

    def draw(self, batch: Examples) -> Tensor | None:
        """Seed what is random in this batch by (seed, batch, rank) alone; return its noise [B, L, d], if any."""
        place = (self.trainer.fit_loop.total_batch_idx, self.global_rank)
        torch.manual_seed(seed_for(self.seed, "dropout", *place))
        if not self.neftune_alpha:
            return None
        return uniform_noise(self.policy, batch.mask, self.neftune_alpha, seed=seed_for(self.seed, "noise", *place))

    on_load_checkpoint = greet  # refuses another run's checkpoint, says how far this one had come

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into that of the token-weighted mean over batches and ranks."""
        count = torch.as_tensor(self.step_tokens, device=self.device, dtype=torch.double)
        divide_gradients(optimizer, float(over_ranks(self.trainer, count, "mean")))
        self.step_tokens = 0

    backward, configure_gradient_clipping = explained_backward, clip_and_log

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's samples."""
        self.samples, self.sampled_prompts = [], 0

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        """Held-out loss, perplexity and accuracy over all tokens; a few sampled continuations."""
        logprobs, correct, mask = self.read(batch)
        self.val_perplexity.update(logprobs, mask)
        self.val_accuracy.update(correct, mask)
        if self.sampled_prompts < self.sample_prompts:
            self.show_samples(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the token-weighted means of the whole held-out set."""
        perplexity, to = self.val_perplexity.compute(), "test" if self.trainer.testing else "val"
        accuracy = self.val_accuracy.compute()
        self.log_dict(
            {f"{to}/loss": perplexity.log(), f"{to}/perplexity": perplexity, f"{to}/token_accuracy": accuracy}
        )
        self.val_perplexity.reset()
        self.val_accuracy.reset()

    def show_samples(self, batch: Examples, batch_idx: int) -> None:
        """Continue the beginnings of a few examples (the part before the first learned token, at least 8 tokens)."""
        beginnings, own = [], batch.loss_mask.any(dim=1)[: self.sample_prompts - self.sampled_prompts]
        for ids, mask, learned in zip(batch.ids, batch.mask, batch.loss_mask, strict=True):
            length, first = int(mask.sum()), int(learned.int().argmax())
            beginning = ids[: first if first > 1 else min(8, length - 1)]
            if fits(self.policy, len(beginning) + self.sampling.max_new_tokens):
                beginnings.append(beginning)
            if len(beginnings) == self.sample_prompts - self.sampled_prompts:
                break
        if not beginnings:
            return
        self.sampled_prompts += len(beginnings)
        width = max(len(ids) for ids in beginnings)
        ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in beginnings])
        lengths = torch.tensor([len(ids) for ids in beginnings], device=ids.device)
        mask = torch.arange(width, device=ids.device) >= (width - lengths).unsqueeze(1)
        texts = tuple(self.tokenizer.batch_decode(beginnings, skip_special_tokens=True))
        seed = seed_for(self.seed, "validation", batch_idx, self.global_rank)
        prompts = Prompts(ids, mask, texts)
        for mode, temperature in (("greedy", 0.0), ("sampled", self.sampling.temperature)):
            sampling = dataclasses.replace(self.sampling, temperature=temperature)
            rollout = self.sampler(self.policy, self.tokenizer, prompts, sampling, seed=seed)
            scores: list[float | None] = [None] * len(texts)
            if self.rewards is not None:
                judged, _ = self.rewards(rollout)
                scores = judged.tolist()
                if mode == "sampled":
                    to = "test" if self.trainer.testing else "val"
                    log_rows(self, {f"{to}/score": judged[own]})
            self.samples += [
                {"step": self.global_step, "mode": mode, "prompt": prompt, "completion": text, "score": score}
                for prompt, text, score in zip(texts[:SHOWN], rollout.completions, scores, strict=False)
            ]

    test_step, on_test_epoch_start, on_test_epoch_end = (
        validation_step,
        on_validation_epoch_start,
        on_validation_epoch_end,
    )

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Continue prompts (served by ``PromptData``) by sampling."""
        return answer(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """One AdamW over the policy."""
        return configure(self, {"policy": (self.policy.parameters(), self.optim.lr)}, self.optim)

    def export(self, folder: str, merge: bool = True) -> None:
        """Write the policy as a Hugging Face folder (adapters merged, or kept as an adapter folder)."""
        save_folder(self.policy, self.tokenizer, folder, merge=merge)


def noisy_logprobs(
    model: Any, ids: Tensor, mask: Tensor, learned: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`next_token_logprobs` of rows [n, L] from the left edge, with ``noise`` [n, L, d] on the embeddings."""
    with embedding_noise(model, noise):
        return next_token_logprobs(model, ids, mask, learned)
