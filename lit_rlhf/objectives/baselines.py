"""Assign credit by comparison: a response against others, without a critic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.objectives.reduce import OverRanks, masked_mean

Baseline = Literal["group", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "none"]


def baseline_advantages(
    scores: Tensor,
    group_size: int,
    *,
    baseline: Baseline = "group",
    scale: Scale = "group",
    over_ranks: OverRanks | None = None,
) -> Tensor:
    """Compare each response with a baseline, in units of a standard deviation.

    A_i = (s_i − b_i) / (std(s) + 1e-4), std with n − 1, of the group or the batch; ``none`` does not divide.
    b_i: mean_group(s), or Σ_{j≠i} s_j / (G − 1) over the others of the group, or mean_batch(s), or 0.

    Args:
        scores: Judgement of each whole response, [B], the G responses of a prompt side by side.
        group_size: G; must divide B.
        baseline: Compare with the ``group`` (GRPO), with the others of the group (``leave_one_out``, RLOO), with the
            whole ``batch`` (REINFORCE), or with nothing (``none``). Against its group a lone response, and each of
            equal scores, gets exactly 0.
        scale: Whose standard deviation divides: that of the ``group`` (GRPO), of all scores (``batch``), or ``none``
            (Dr. GRPO, RLOO). A standard deviation of 0 does not divide.
        over_ranks: Adds a tensor up over the processes, so that ``batch`` means the responses of all of them; None =
            of this one. A group lives on one process.

    Returns:
        [B], one advantage for all tokens of a response.

    Raises:
        ValueError: If ``baseline`` or ``scale`` is not one of those named.

    Sources: ``group`` Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300) §4.1.2; ``leave_one_out`` Ahmadian et al. 2024
    (arXiv 2402.14740) §2.2, after Kool et al. 2019; ``batch`` Williams 1992 (REINFORCE), the mean of the batch as
    reinforcement baseline; scale ``none`` Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783) §3; scale ``batch`` Liu et al.
    2025 (Lite PPO, arXiv 2508.08221). The papers name neither n − 1 nor the 1e-4, which keeps groups of nearly equal
    scores from being blown up; both are what TRL does.

    >>> baseline_advantages(torch.tensor([1.0, 3.0, 5.0, 7.0]), 2, baseline="batch", scale="none")
    tensor([-3., -1.,  1.,  3.])
    """
    groups = scores.reshape(-1, group_size)
    return _compare(groups, torch.ones_like(groups, dtype=torch.bool), baseline, scale, over_ranks).reshape(-1)


def group_advantages(
    scores: Tensor, group_size: int, *, scale: Scale = "group", over_ranks: OverRanks | None = None
) -> Tensor:
    """Compare each response with the group drawn for the same prompt (GRPO).

    A_i = (s_i − mean_group(s)) / (std(s) + 1e-4): ``baseline_advantages`` with the group as baseline, which has the
    sources.

    Args:
        scores: Judgement of each whole response, [B], the G responses of a prompt side by side.
        group_size: G; must divide B. A group of one, or of equal scores, gets exactly 0.
        scale: Whose standard deviation divides: that of the ``group`` (GRPO), of all scores (``batch``), or
            ``none`` (Dr. GRPO).
        over_ranks: Adds a tensor up over the processes, for the ``batch``; None = this process alone.

    Returns:
        [B], one advantage for all tokens of a response.

    Raises:
        ValueError: If ``scale`` is none of the three.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2, scale="none")
    tensor([-1.,  1.,  0.,  0.])
    """
    return baseline_advantages(scores, group_size, baseline="group", scale=scale, over_ranks=over_ranks)


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Compare each response with the mean of the *other* responses to the same prompt (RLOO).

    A_i = s_i − Σ_{j≠i} s_j / (G − 1) = G / (G − 1)·(s_i − mean_group(s)): ``baseline_advantages`` with the others as
    baseline, which has the source.

    Args:
        scores: Judgement of each whole response, [B], the G responses of a prompt side by side.
        group_size: G; must divide B. A response without others gets 0.

    Returns:
        [B], one advantage for all tokens of a response.

    >>> leave_one_out_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([-2.,  2.,  0.,  0.])
    """
    return baseline_advantages(scores, group_size, baseline="leave_one_out", scale="none")


def step_advantages(
    step_scores: Tensor,
    step_ends: Tensor,
    mask: Tensor,
    group_size: int,
    *,
    scale: Scale = "group",
    over_ranks: OverRanks | None = None,
) -> Tensor:
    """Give each token the normalised scores of the steps that end at it or later (process supervision).

    r̃_j = (r_j − mean(R)) / (std(R) + 1e-4), R all steps of all responses of the group;  A_t = Σ_{j: end_j ≥ t} r̃_j.

    Args:
        step_scores: Judgement of each step of each response, [B, S], the G responses of a prompt side by side.
        step_ends: Index in the response of each step's last token, long [B, S]; −1 = no such step, and its score is
            not read. Steps need not be in order.
        mask: Tokens of the response, bool [B, T].
        group_size: G; must divide B.
        scale: Whose standard deviation divides: that of the steps of the ``group``, of all steps (``batch``), or
            ``none``.
        over_ranks: Adds a tensor up over the processes, for the ``batch``; None = this process alone.

    Returns:
        [B, T], 0 where nothing counts, and after a response's last step.

    Raises:
        ValueError: If ``scale`` is none of the three.

    Source: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300) §4.1.3; n − 1 and 1e-4 as in ``baseline_advantages``.

    >>> scores, ends = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[0, 2], [1, -1]])
    >>> step_advantages(scores, ends, torch.ones(2, 3) > 0, 2, scale="none")
    tensor([[0., 1., 1.],
            [0., 0., 0.]])
    """
    exists = step_ends >= 0
    shape = (-1, group_size * step_scores.shape[1])
    normalized = _compare(step_scores.reshape(shape), exists.reshape(shape), "group", scale, over_ranks)
    at_ends = normalized.new_zeros(mask.shape).scatter_add(1, step_ends.clamp(min=0), normalized.reshape(exists.shape))
    return torch.where(mask, at_ends.flip(1).cumsum(1).flip(1), 0.0)


def normalize_then_sum(
    scores: Tensor, weights: Tensor, group_size: int, *, over_ranks: OverRanks | None = None
) -> Tensor:
    """Normalise every reward within its groups before they are mixed, so that none drowns the others (GDPO).

    A_i = Σ_r w_r·(s_ir − mean_group(s_r)) / (std_group(s_r) + 1e-4);  out_i = (A_i − mean_batch(A)) / (std_batch(A) +
    1e-4). Summed first and normalised after, different mixtures of rewards may become the same advantage.

    Args:
        scores: What each of R rewards says of each whole response, [B, R], the G responses of a prompt side by side;
            NaN = the reward does not apply to this response, and adds nothing.
        weights: w, [R].
        group_size: G; must divide B.
        over_ranks: Adds a tensor up over the processes, so that the batch is that of all of them; None = this one's.

    Returns:
        [B], one advantage for all tokens of a response.

    Source: Liu et al. 2026 (GDPO, arXiv 2601.05242) §3. The last step takes each response once, not once a token; n − 1
    and 1e-4 as in ``baseline_advantages``.

    >>> scores = torch.tensor([[0.0, 10.0], [1.0, 30.0], [0.0, 20.0], [0.0, 20.0]])
    >>> normalize_then_sum(scores, torch.tensor([1.0, 1.0]), 2)
    tensor([-1.2246,  1.2246,  0.0000,  0.0000])
    """
    groups = scores.T.reshape(-1, group_size)  # those of the first reward, then those of the second, …
    each = _compare(groups, ~groups.isnan(), "group", "group", None).reshape(scores.T.shape)
    return baseline_advantages(weights @ each, len(scores), baseline="batch", scale="batch", over_ranks=over_ranks)


def _compare(groups: Tensor, counts: Tensor, baseline: Baseline, scale: Scale, over_ranks: OverRanks | None) -> Tensor:
    """Counted scores [groups, G] less their baseline, over a standard deviation; 0 for those that do not count."""
    if baseline == "group":
        compared = _center(groups, counts)
    elif baseline == "leave_one_out":
        size = counts.sum(1, keepdim=True).to(groups.dtype)
        compared = _center(groups, counts) * (size / (size - 1).clamp(min=1))
    elif baseline == "batch":
        compared = _center_batch(groups, counts, over_ranks)
    elif baseline == "none":
        compared = torch.where(counts, groups, 0.0)
    else:
        raise ValueError(f"baseline is {baseline!r}; expected 'group', 'leave_one_out', 'batch' or 'none'")
    if scale == "group":
        return compared / _divisor(_center(groups, counts), counts)
    if scale == "batch":
        deviations = _center_batch(groups, counts, over_ranks).reshape(1, -1)
        return compared / _divisor(deviations, counts.reshape(1, -1), over_ranks)
    if scale != "none":
        raise ValueError(f"scale is {scale!r}; expected 'group', 'batch' or 'none'")
    return compared


def _center(x: Tensor, counts: Tensor) -> Tensor:
    """Counted entries less their row's mean; exactly 0 in a row of equals, however the mean rounds."""
    highest = torch.where(counts, x, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(counts, x, torch.inf).amin(1, keepdim=True)
    return torch.where(counts & (highest != lowest), x - masked_mean(x, counts, dim=1).unsqueeze(1), 0.0)


def _center_batch(x: Tensor, counts: Tensor, over_ranks: OverRanks | None) -> Tensor:
    """Counted entries less the mean of all."""
    if over_ranks is None:
        return _center(x.reshape(1, -1), counts.reshape(1, -1)).reshape(x.shape)
    for _ in range(2):  # the first mean of equal scores is off by a rounding, the second by a rounding of that
        x = torch.where(counts, x - masked_mean(x, counts, over_ranks=over_ranks), 0.0)
    return x


def _divisor(deviations: Tensor, counts: Tensor, over_ranks: OverRanks | None = None) -> Tensor:
    """Sample standard deviation of each row plus 1e-4, from deviations off the mean; 1 where there is none."""
    total, count = deviations.square().sum(1, keepdim=True), counts.sum(1, keepdim=True)
    if over_ranks is not None:
        total, count = over_ranks(total), over_ranks(count)
    spread = (total / (count - 1).clamp(min=1)).sqrt()
    return torch.where(spread > 0, spread + 1e-4, 1.0)
