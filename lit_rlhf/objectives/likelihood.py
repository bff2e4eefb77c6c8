"""Make given tokens likely, and say how undecided a distribution is."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.objectives.reduce import aggregate


def next_token_loss(logprobs: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Average the negative log-likelihood of the tokens to be learned.

    L = −Σ mask·log π(y_t | y_<t) / denominator; exp(L) is the perplexity.

    Args:
        logprobs: log π of the given tokens under the model being trained, [B, T].
        mask: Tokens to be learned, bool [B, T].
        denominator: Tokens to be learned in the whole optimizer step, so that its microbatches sum to the loss of the
            whole; None = those of this batch.

    Returns:
        A scalar, in nats; 0 if nothing is to be learned.

    Source: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155) §3.5 (supervised fine-tuning).

    >>> next_token_loss(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    return aggregate(-logprobs, mask, "token_mean", denominator)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Measure how undecided each distribution over the vocabulary is.

    H = −Σ_v p_v·log p_v, p = softmax(logits); a token that cannot occur (logit −∞) adds nothing.

    Args:
        logits: Scores of the V tokens, already divided by the temperature, [..., V].

    Returns:
        [...], in nats, from 0 to log V.

    Source: Shannon 1948, §6. Same as logsumexp − Σ p·logit (openai/lm-human-preferences), but finite for logits of −∞.

    >>> entropy_from_logits(torch.tensor([[0.0, 0.0, -float("inf")]]))
    tensor([0.6931])
    """
    logprobs = logits.log_softmax(dim=-1)
    probs = logprobs.exp()
    return -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(dim=-1)
