"""Learn scores from comparisons, and say how far the scores can be trusted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.objectives.reduce import group_mean


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Punish a comparison that the scores get wrong (Bradley–Terry).

    ℓ = −(1 − ε)·log σ(m) − ε·log σ(−m), m = r_chosen − r_rejected − margin.

    Args:
        chosen: Scores of the preferred responses, [M].
        rejected: Scores of the others, [M].
        margin: By how much the preferred one should lead, [M]; None = 0.
        label_smoothing: ε, the share of labels taken to be the wrong way round.

    Returns:
        [M], one loss a comparison.

    Sources: Stiennon et al. 2020 (arXiv 2009.01325) §3.4; margin Touvron et al. 2023 (Llama 2, arXiv 2307.09288) eq. 2.

    >>> pairwise_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]), margin=torch.tensor([0.0, 1.0]))
    tensor([0.6931, 0.6931])
    """
    lead = chosen - rejected if margin is None else chosen - rejected - margin
    if not label_smoothing:
        return -F.logsigmoid(lead)
    return -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Pull the scores of a comparison towards a mean of 0, which comparisons alone leave free.

    ℓ = (r_chosen + r_rejected)².

    Args:
        chosen: Scores of the preferred responses, [M].
        rejected: Scores of the others, [M].

    Returns:
        [M], one loss a comparison.

    Source: Eisenstein et al. 2023 (arXiv 2312.09244) eq. 2; TRL recommends a weight of 0.01.

    >>> centering_loss(torch.tensor([2.0]), torch.tensor([-1.0]))
    tensor([1.])
    """
    return (chosen + rejected).square()


def ranking_loss(scores: Tensor, groups: Tensor) -> Tensor:
    """Compare all ranked responses of a prompt pair by pair, each prompt weighing the same.

    ℓ_p = −1 / C(K, 2)·Σ_{i<j} log σ(r_i − r_j) over the K responses of prompt p, best first.

    Args:
        scores: Scores of all responses of all prompts, [N]; within a prompt the best stands first.
        groups: Prompt of each response, long [N], numbered from 0; K may differ from prompt to prompt.

    Returns:
        [number of prompts]; 0 for a prompt with a single response.

    Source: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155) eq. 1. With K = 2 it is ``pairwise_loss``.

    >>> ranking_loss(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    tensor([0.3133, 0.6931])
    """
    pairs = torch.triu(groups.unsqueeze(1) == groups.unsqueeze(0), diagonal=1).nonzero()
    better, worse = pairs.unbind(1)
    number = int(groups.max()) + 1 if groups.numel() else 0
    losses = group_mean(pairwise_loss(scores[better], scores[worse]), groups[better])
    return F.pad(losses, (0, number - losses.shape[0]))  # the last prompts may have a single response


def best_of_k_loss(scores: Tensor, groups: Tensor) -> Tensor:
    """Punish a prompt whose best response does not stand out from the rest (softmax cross-entropy).

    ℓ_p = −log( e^{r_best} / Σ_i e^{r_i} ) over the K responses of prompt p.

    Args:
        scores: Scores of all responses of all prompts, [N]; within a prompt the best stands first.
        groups: Prompt of each response, long [N], numbered from 0; K may differ from prompt to prompt.

    Returns:
        [number of prompts].

    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 1. With K = 2 it is ``pairwise_loss``.

    >>> best_of_k_loss(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    tensor([0.3133, 0.6931])
    """
    number, rows = int(groups.max()) + 1 if groups.numel() else 0, torch.arange(len(groups), device=groups.device)
    first = rows.new_full((number,), len(groups) - 1).scatter_reduce(0, groups, rows, "amin")
    peak = scores.detach().new_full((number,), -torch.inf).scatter_reduce(0, groups, scores.detach(), "amax")
    total = scores.new_zeros(number).index_add(0, groups, (scores - peak[groups]).exp())
    return total.log() + peak - scores[first]


def calibration_error(margins: Tensor, bins: int = 10) -> Tensor:
    """Measure how far the scores' confidence is from their accuracy (expected calibration error).

    With confidence p = σ(|m|) that the higher score belongs to the preferred response, and c = 1 if it does:
    ECE = Σ_bins n_bin / M·|mean_bin(c) − mean_bin(p)|.

    Args:
        margins: m = r_chosen − r_rejected of M comparisons, [M]; a tie counts as half right.
        bins: Number of equal bins over p from ½ to 1.

    Returns:
        A detached scalar from 0 (a lead of m wins σ(m) of its comparisons) to 1; 0 for no comparisons.

    Source: Guo et al. 2017 (arXiv 1706.04599) eq. 3, for two classes.

    >>> calibration_error(torch.tensor([100.0, 100.0, 100.0, -100.0]))
    tensor(0.2500)
    """
    with torch.no_grad():
        confidence = margins.abs().sigmoid()
        correct = (margins.sign() + 1) / 2
        index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
        gaps = margins.new_zeros(bins).index_add(0, index, correct - confidence)
        return gaps.abs().sum() / max(margins.numel(), 1)
