"""Whether the network that is to read a batch can."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from lit_rlhf.models import refuse_unreadable


def readable(data: LightningDataModule, batch: Any, dataloader_idx: int) -> Any:
    """Refuse a batch that the stage's network cannot read; a data module's ``on_before_batch_transfer``.

    There the ids are still on the CPU, so looking at them makes no GPU wait.

    Args:
        data: whose Trainer runs a stage with a ``policy`` or a ``reward``.
        batch: Examples, Pairs or Prompts.
        dataloader_idx: which loader it comes from.

    Raises:
        SettingError: a token beyond the vocabulary, or a row beyond the learned positions.
    """
    module = getattr(data.trainer, "lightning_module", None)
    network = getattr(module, "policy", None) or getattr(module, "reward", None)
    for part in (batch, getattr(batch, "pretraining", None)):
        if part is not None and hasattr(network, "get_input_embeddings"):
            refuse_unreadable(network, part.ids, part.mask)
    return batch
