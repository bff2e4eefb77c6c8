"""Settings and fixtures every test shares: one thread, no network, tiny models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
# Some virtual machines announce AMX and then kill whoever uses it (half-precision products): stay one step below.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with its tokenizer, as a Hugging Face folder."""
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def sharded_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sharded stages start from: ``policy``, a Llama whose two ends are tied, and a reward model, ``reward``.

    ``judge`` is another one, as adapters on the policy's base.
    """
    import arena

    from lit_rlhf.models import load_scalar, save_scalar

    root = tmp_path_factory.mktemp("sharded")
    tiny.tiny_llama(tie_word_embeddings=True).save_pretrained(root / "policy")
    tiny.tiny_tokenizer().save_pretrained(root / "policy")
    save_scalar(load_scalar(str(root / "policy"), seed=3), tiny.tiny_tokenizer(), str(root / "reward"))
    arena.reward_on_adapters(str(root / "policy"), root / "judge")
    return root


@pytest.fixture(params=[0, 1, 2])
def mesh_of_three(request):
    """A mesh of three processes as one of them sees it; the others are not there, and what is sent is lost."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=request.param, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def tokenizer():
    """The byte tokenizer."""
    return tiny.tiny_tokenizer()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _end_of_wandb() -> Iterator[None]:
    """A W&B run lasts until its process ends: the next test would find it in progress."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
