"""Learn scores from comparisons, and say how far the scores can be trusted."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.objectives.reduce import group_mean, masked_mean


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Punish a comparison that the scores get wrong (Bradley–Terry).

    ℓ = −(1 − ε)·log σ(d) − ε·log σ(−d), d = r_chosen − r_rejected − margin.

    Args:
        chosen: Scores of the preferred responses, [M].
        rejected: Scores of the others, [M].
        margin: By how much the preferred one should lead, [M]; None = 0.
        label_smoothing: ε, the share of comparisons thought to be labelled the wrong way round, from 0 to ½. The best d
            is then log((1 − ε) / ε) instead of ever more.

    Returns:
        [M], one loss a comparison.

    Sources: Stiennon et al. 2020 (arXiv 2009.01325) §3.4; margin Touvron et al. 2023 (Llama 2, arXiv 2307.09288) eq. 2;
    smoothed labels Szegedy et al. 2015 (arXiv 1512.00567) §7, for comparisons Mitchell 2023 ("conservative DPO",
    https://ericmitchell.ai/cdpo.pdf). Computed as −log σ(d) + ε·d, which is the same.

    >>> pairwise_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]), margin=torch.tensor([0.0, 1.0]))
    tensor([0.6931, 0.6931])
    """
    lead = chosen - rejected if margin is None else chosen - rejected - margin
    return label_smoothing * lead - F.logsigmoid(lead)


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
    """Punish scores that do not single out the best response of each prompt.

    ℓ_p = −log(exp(r_best) / Σ_i exp(r_i)) over the K responses of prompt p: softmax cross-entropy.

    Args:
        scores: Scores of all responses of all prompts, [N]; within a prompt the best stands first, the order of the
            others says nothing.
        groups: Prompt of each response, long [N], numbered from 0; K may differ from prompt to prompt.

    Returns:
        [max(groups) + 1]; 0 for a prompt with a single response, or none.

    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 1, there K = 4. With K = 2 it is ``pairwise_loss``.

    >>> best_of_k_loss(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 1]))
    tensor([0.3133, 1.0986])
    """
    same = groups.unsqueeze(1) == groups.unsqueeze(0)
    best = ~same.tril(diagonal=-1).any(1)  # no earlier row is of the same prompt
    losses = torch.where(same, scores, -torch.inf).logsumexp(1) - scores
    number = int(groups.max()) + 1 if groups.numel() else 0
    return scores.new_zeros(number).index_add(0, groups, torch.where(best, losses, 0.0))


class Reliability(NamedTuple):
    """How often comparisons are right, by how sure the scores are: the rows of a reliability diagram."""

    edges: Tensor  # [bins + 1], confidences from ½ to 1 between which the bins lie
    counts: Tensor  # [bins], long, comparisons in each
    accuracy: Tensor  # [bins], share of them that are right; 0 in an empty bin
    confidence: Tensor  # [bins], mean confidence of them; 0 in an empty bin


def accuracy_by_margin(margins: Tensor, bins: int = 10) -> Reliability:
    """Sort comparisons by how sure the scores are, and count how many of them are right.

    Confidence p = σ(|m|) that the higher score belongs to the preferred response; c = 1 if it does, ½ in a tie.

    Args:
        margins: m = r_chosen − r_rejected of M comparisons, [M].
        bins: Number of equal bins over p from ½ to 1; an edge belongs to the bin above it.

    Returns:
        Edges, counts, accuracy and mean confidence of the bins, detached. Where scores are honest, accuracy and
        confidence agree; an accuracy below says the scores are too far apart.

    Source: Guo et al. 2017 (arXiv 1706.04599) §2 (reliability diagrams), for two classes.

    >>> accuracy_by_margin(torch.tensor([0.0, 100.0, 100.0, -100.0]), bins=2)[1:3]
    (tensor([1, 3]), tensor([0.5000, 0.6667]))
    """
    with torch.no_grad():
        confidence = margins.abs().sigmoid()
        correct = (margins.sign() + 1) / 2
        index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
        inside = index == torch.arange(bins, device=margins.device).unsqueeze(1)
        edges = torch.linspace(0.5, 1.0, bins + 1, dtype=margins.dtype, device=margins.device)
        accuracy, mean = (masked_mean(x.expand_as(inside), inside, dim=1) for x in (correct, confidence))
        return Reliability(edges, inside.sum(1), accuracy, mean)


def calibration_error(margins: Tensor, bins: int = 10) -> Tensor:
    """Measure how far the scores' confidence is from their accuracy (expected calibration error).

    ECE = Σ_bins n_bin / M·|accuracy_bin − confidence_bin|, the bins being those of ``accuracy_by_margin``.

    Args:
        margins: m = r_chosen − r_rejected of M comparisons, [M]; a tie counts as half right.
        bins: Number of equal bins over p from ½ to 1.

    Returns:
        A detached scalar from 0 (a lead of m wins σ(m) of its comparisons) to 1; 0 for no comparisons.

    Source: Guo et al. 2017 (arXiv 1706.04599) eq. 3, for two classes.

    >>> calibration_error(torch.tensor([100.0, 100.0, 100.0, -100.0]))
    tensor(0.2500)
    """
    _, counts, accuracy, confidence = accuracy_by_margin(margins, bins)
    return (counts * (accuracy - confidence).abs()).sum() / max(margins.numel(), 1)


def score_length_correlation(scores: Tensor, lengths: Tensor) -> Tensor:
    """Measure how far scores follow the length of the responses (Pearson correlation).

    ρ = Σ(r_i − r̄)(n_i − n̄) / √(Σ(r_i − r̄)²·Σ(n_i − n̄)²); 0 if all scores or all lengths are equal.

    Args:
        scores: Scores of N responses, [N].
        lengths: Their lengths in tokens, [N], of any type.

    Returns:
        A detached scalar from −1 to 1: 0 says that length does not show, 1 that the score is a measure of length.

    Source: Pearson 1895; the length bias of reward models Singhal et al. 2023 (arXiv 2310.03716).

    >>> score_length_correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 6, 8]))
    tensor(1.)
    """
    with torch.no_grad():
        if scores.numel() < 2:
            return scores.new_zeros(())
        units, varies = [], torch.ones_like(scores[0], dtype=torch.bool)
        for x in (scores, lengths):
            x = x.to(torch.promote_types(scores.dtype, torch.float32))
            varies = varies & (x.max() > x.min())
            units.append(F.normalize(x - x.mean(), dim=0))
        return torch.where(varies, units[0] @ units[1], 0.0).to(scores.dtype)
