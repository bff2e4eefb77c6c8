"""PPO-ptx: the likelihood of pretraining texts beside the reward (Ouyang et al. 2022, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.batch import Examples, Prompts, Rollout
from lit_rlhf.models import next_token_logprobs
from lit_rlhf.objectives import next_token_loss

if TYPE_CHECKING:
    from lit_rlhf.stages.ppo import PPO


def pretraining_texts(stage: PPO, batch: Prompts) -> Examples | None:
    """Texts to be learned beside this batch's rollout; None where the stage learns none.

    Raises:
        MisconfigurationException: there are none, or they do not suffice to give each minibatch one.
    """
    if not stage.ptx_coef:
        return None
    count, minibatches = 0 if batch.pretraining is None else len(batch.pretraining), stage.updates.settings.minibatches
    if count < minibatches:
        raise MisconfigurationException(
            f"model.ptx_coef={stage.ptx_coef} learns pretraining texts, at least one a minibatch ({minibatches}), but "
            f"the data serves {count} a batch: set data.pretraining and data.pretraining_batch_size."
        )
    stage.pretraining_sum = torch.zeros((), device=stage.device)
    return batch.pretraining


def pretraining_loss(stage: PPO, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """γ·L_ptx: mean negative log-likelihood of the step's pretraining texts, times its weight.

    The paper sums γ·E[log π(x)] and does not say over what; the mean is over the tokens of the optimizer step, on all
    processes.
    """
    texts = part.pretraining
    assert texts is not None
    learned = texts.loss_mask & texts.mask
    logprobs, _ = next_token_logprobs(stage.policy, texts.ids, texts.mask, learned)
    total = next_token_loss(logprobs, learned[:, 1:], 1.0)
    stage.pretraining_sum += total.detach()
    seen = sum(texts for *_, texts in stage.updates.counts[: stage.updates.step + 1])  # tokens, mean over ranks
    stage.rollout_metrics["pretraining/loss"] = stage.pretraining_sum / max(seen, 1.0)
    return stage.ptx_coef * total / part.pretraining_tokens, {}
