"""Dynamic sampling: groups without signal make way for further prompts (Yu et al. 2025, DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.stages.measure import without_signal
from lit_rlhf.stages.reading import judge, with_steps

if TYPE_CHECKING:
    from lit_rlhf.stages.grpo import GRPO


def explore(stage: GRPO, batch: Prompts) -> Rollout:
    """Answer and judge the first ``groups`` prompts of a batch; then replace groups without signal by further ones.

    The further prompts are the rest of the same batch, so where the data stands never depends on scores, and a group
    that finds no replacement stays. All processes go through as many rounds, each with as many prompts: as the one with
    the most silent groups needs. Each fills its own places, so a run on two processes replaces other groups than a run
    on one, unless all find a replacement in the same round.

    Args:
        stage: GRPO; all prompts are answered where its ``groups`` is null.
        batch: prompts of this process.

    Returns:
        A rollout of ``groups`` × G rows with scores.

    Raises:
        MisconfigurationException: the batch has fewer prompts than ``groups``.
    """
    group, used = stage.group_size, stage.groups or len(batch)
    if used > len(batch):
        raise MisconfigurationException(
            f"model.groups={used} prompts make a rollout, but a batch of this process has {len(batch)}: set "
            f"data.batch_size to {used} or more; those above are the further prompts of dynamic sampling."
        )
    rollout = judge(stage, stage.sample(batch.select(torch.arange(used))))
    replaced = 0
    while used < len(batch):
        silent = without_signal(rollout.scores, group)
        more = min(int(stage.max_over_ranks(silent.sum())), len(batch) - used)
        if not more:
            break
        fresh = judge(stage, stage.sample(batch.select(torch.arange(used, used + more)), first=used))
        rows = _with_replacements(silent, without_signal(fresh.scores, group), group)
        if rollout.step_scores is not None or fresh.step_scores is not None:
            rollout, fresh = with_steps(rollout), with_steps(fresh)
        rollout = rollout.join(fresh).select(rows)
        replaced, used = replaced + int((rows >= silent.numel() * group).sum()) // group, used + more
    if stage.groups is not None:
        stage.rollout_metrics |= {"groups/replaced": float(replaced), "groups/unused_prompts": float(len(batch) - used)}
    return rollout


def _with_replacements(silent: Tensor, fresh_silent: Tensor, group: int) -> Tensor:
    """Rows of the joined rollout: each silent group's place goes to a fresh group with signal, while there are any."""
    places, ready = silent.nonzero().flatten().cpu(), (~fresh_silent).nonzero().flatten().cpu()
    count = min(len(places), len(ready))
    groups = torch.arange(len(silent))
    groups[places[:count]] = len(silent) + ready[:count]
    return (groups.unsqueeze(1) * group + torch.arange(group)).flatten()
