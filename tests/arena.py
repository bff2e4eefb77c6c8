"""A tiny world in which every stage can be run for real in a second: prompts, pairs, examples, a dense reward."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from tiny import tiny_tokenizer
from torch.utils.data import DataLoader

from lit_rlhf.batch import Examples, Pairs, Prompts, Rollout
from lit_rlhf.models import Lora, Network, load_scalar, save_scalar
from lit_rlhf.rollout import Sampling

SHORT = Sampling(max_new_tokens=8)


def low_ids(prompts: list, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of a completion's token ids below 128: dense, easy to learn, and knows nothing of language."""
    return [sum(i < 128 for i in ids) / len(ids) for ids in completion_ids]


def constant(prompts: list, completions: list[str], **_: Any) -> list[float]:
    """The same score for everything: no signal."""
    return [1.0] * len(completions)


def prompts(rows: int = 4, seed: int = 0) -> Prompts:
    """Left-padded random prompts of 3 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, 6), generator=generator)
    pads = torch.randint(0, 4, (rows, 1), generator=generator)
    pads[0] = 0
    mask = torch.arange(6) >= pads
    return Prompts(ids.where(mask, 0), mask, tuple(f"prompt {i}" for i in range(rows)), {"answer": ("x",) * rows})


def rollout(lengths: list[int]) -> Rollout:
    """Responses of the given lengths to prompts of two tokens."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, count = torch.full(mask.shape, 5).where(mask, 0), len(lengths)
    prompt = torch.full((count, 2), 7)
    return Rollout(prompt, prompt > 0, ids, mask, mask[:, 0], ("p",) * count, ("c",) * count)


def examples(rows: int, seed: int = 0) -> Examples:
    """Ragged counting sequences (each token one more than the last), the first two tokens not learned."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(10, 30, (rows, 1), generator=generator)
    lengths = torch.randint(4, 13, (rows, 1), generator=generator)
    mask = torch.arange(12) < lengths
    ids = (start + torch.arange(12)).where(mask, 0)
    return Examples(ids, mask, mask & (torch.arange(12) >= 2))


def pairs(count: int, seed: int = 0) -> Pairs:
    """Pairs in which the better response has the higher token ids, ragged."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (2 * count, 1), generator=generator)
    mask = torch.arange(8) < lengths
    high = torch.randint(140, 250, (count, 8), generator=generator)
    low = torch.randint(10, 120, (count, 8), generator=generator)
    ids = torch.stack([high, low], dim=1).view(2 * count, 8).where(mask, 0)
    rows = torch.arange(count)
    return Pairs(ids, mask, 2 * rows, 2 * rows + 1, rows)


def stir(model: Any, seed: int = 1, size: float = 0.1) -> Any:
    """Move everything trainable, so that adapters are no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def reward_on_adapters(base: str, folder: Any, **more: Any) -> str:
    """Write the adapters and the head of a reward model over a base; returns the folder."""
    model = stir(load_scalar(base, Network(lora=Lora(r=3)), seed=5), seed=7)
    save_scalar(model, tiny_tokenizer(), folder, merge=False, **more)
    return str(folder)


def loader(batches: list) -> DataLoader:
    """A loader over ready batches, in order."""
    return DataLoader(batches, batch_size=None)


def trainer(folder: Any = None, **settings: Any) -> L.Trainer:
    """A quiet CPU trainer."""
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "inference_mode": False,
        "log_every_n_steps": 1,
        **settings,
    }
    return L.Trainer(**settings)


def fit(
    stage: L.LightningModule, batches: list, held_out: list | None = None, ckpt_path: str | None = None, **settings: Any
) -> L.Trainer:
    """Train a stage on ready batches; returns the trainer."""
    run = trainer(**settings)
    run.fit(stage, loader(batches), loader(held_out) if held_out else None, ckpt_path=ckpt_path)
    return run


class Log(L.Callback):
    """Keeps the metrics of every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def weights(stage: L.LightningModule) -> torch.Tensor:
    """All trainable weights, flat."""
    return torch.cat([p.detach().flatten() for p in stage.parameters() if p.requires_grad])
