"""Reduce per-token quantities under a mask (True = counts)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
OverRanks = Callable[[Tensor], Tensor]  # adds a tensor up over the processes, entry by entry


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, *, over_ranks: OverRanks | None = None) -> Tensor:
    """Average the counted entries.

    mean(x) = Σ mask·x / Σ mask, and 0 where nothing counts.

    Args:
        x: Values of any kind, [...].
        mask: Which of them count, bool, the shape of ``x``.
        dim: Dimension to average over; None = all of them.
        over_ranks: Adds a tensor up over the processes, for the mean of what all of them hold; every process must
            call it, and no gradient is promised. None = this process alone.

    Returns:
        A scalar, or ``x`` without dimension ``dim``.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    kept = torch.where(mask, x, 0.0)
    total, count = (kept.sum(), mask.sum()) if dim is None else (kept.sum(dim), mask.sum(dim))
    if over_ranks is not None:
        total, count = over_ranks(total), over_ranks(count)
    return total / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, center: bool = True, over_ranks: OverRanks | None = None) -> Tensor:
    """Scale the counted entries to variance 1, and shift them to mean 0 if ``center``.

    y = (x − μ) / √(σ² + 1e-8) [+ μ if not centered], with μ and σ² (population variance) over the counted entries.

    Args:
        x: Advantages or rewards of the sampled responses, [B, T].
        mask: Tokens of the response, bool [B, T].
        center: True moves the mean to 0 (advantages), False leaves it where it is (rewards).
        over_ranks: Adds a tensor up over the processes, so that μ and σ² are those of all of them; None = this one's.

    Returns:
        [B, T], 0 where nothing counts.

    Source: ``whiten`` in lm_human_preferences/utils/core.py of openai/lm-human-preferences (cbfd210), the code of
    Ziegler et al. 2019. Unlike there padding takes no part. Its ``shift_mean`` is ``center`` here.

    >>> masked_whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    mean = masked_mean(x, mask, over_ranks=over_ranks)
    centered = torch.where(mask, x - mean, 0.0)
    whitened = centered * torch.rsqrt(masked_mean(centered.square(), mask, over_ranks=over_ranks) + 1e-8)
    return whitened if center else torch.where(mask, whitened + mean, 0.0)


def group_mean(x: Tensor, groups: Tensor) -> Tensor:
    """Average the entries of each group.

    mean_g = Σ_{i : groups[i] = g} x_i / #{i : groups[i] = g}, and 0 for a group without entries.

    Args:
        x: One value an entry, [N], for example the losses of N comparisons.
        groups: Group of each entry, long [N], numbered from 0; entries of a group need not be neighbours.

    Returns:
        [max(groups) + 1].

    >>> group_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([2., 5.])
    """
    number = int(groups.max()) + 1 if groups.numel() else 0
    counts = torch.bincount(groups, minlength=number)
    return x.new_zeros(number).index_add(0, groups, x) / counts.clamp(min=1)


def aggregate(per_token: Tensor, mask: Tensor, how: Aggregation, denominator: float | Tensor | None = None) -> Tensor:
    """Reduce per-token losses to the loss of the batch.

    L = Σ_b Σ_t w_bt·ℓ_bt / denominator. ``token_mean`` and ``fixed_length``: w = 1; ``sequence_mean``: w = 1 / |y_b|,
    the mean over each response. The sum runs over counted tokens; with nothing to count L is 0.

    A response that shall not teach anything, one that was cut off for example, gets a row of False: it adds 0 and sends
    no gradient, and the two means do not count it. To keep the others' weight what it would have been with it, pass
    a ``denominator`` that counts it.

    Args:
        per_token: Losses ℓ, [B, T].
        mask: Tokens of the response, bool [B, T].
        how: What weighs the same: every token of the batch (DAPO), every sequence whatever its length (GRPO), or every
            token by a constant that knows no lengths (Dr. GRPO).
        denominator: What the sum is divided by. Given that of the whole optimizer step, the losses of its microbatches
            sum to the loss of the whole. Default, from this batch alone: counted tokens (``token_mean``), sequences
            with a counted token (``sequence_mean``), B·T (``fixed_length``, which then depends on the padding).

    Returns:
        A scalar.

    Raises:
        ValueError: If ``how`` is none of the three.

    Sources: ``token_mean`` Yu et al. 2025 (DAPO, arXiv 2503.14476) eq. 8; ``sequence_mean`` Shao et al. 2024
    (DeepSeekMath, arXiv 2402.03300) eq. 3; ``fixed_length`` Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783) §3.

    >>> losses, mask = torch.tensor([[2.0, 4.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [aggregate(losses, mask, how).item() for how in ("token_mean", "sequence_mean", "fixed_length")]
    [4.0, 4.5, 3.0]
    """
    if how == "sequence_mean":
        total, own = masked_mean(per_token, mask, dim=1).sum(), mask.any(dim=1).sum()
    elif how == "token_mean":
        total, own = torch.where(mask, per_token, 0.0).sum(), mask.sum()
    elif how == "fixed_length":
        total, own = torch.where(mask, per_token, 0.0).sum(), torch.tensor(mask.numel())
    else:
        raise ValueError(f"how is {how!r}; expected 'token_mean', 'sequence_mean' or 'fixed_length'")
    if denominator is None:
        denominator = own
    if isinstance(denominator, Tensor):
        return total / torch.where(denominator > 0, denominator, 1)
    return total / (denominator or 1.0)  # a step that holds no token at all: 0 / 1, not 0 / 0
