"""A reward model as a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from lit_rlhf.models import load_scalar, save_scalar

sys.path.append(str(Path(__file__).parent))  # some_rewards.py, by its dotted path


@pytest.fixture(scope="session")
def reward_folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model with its tokenizer and the moments of its scores."""
    folder = tmp_path_factory.mktemp("reward")
    save_scalar(load_scalar(model_folder, seed=3), tiny.tiny_tokenizer(), folder, mean=0.25, std=2.0)
    return folder
