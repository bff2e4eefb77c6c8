"""The warning about more threads than free cores, with made-up numbers."""

from __future__ import annotations

import warnings
from itertools import chain, repeat
from pathlib import Path

import arena
import pytest
import torch

from lit_rlhf.callbacks import Throughput, throughput
from lit_rlhf.callbacks.crowding import Crowding, thread_seconds
from lit_rlhf.stages import SFT, Optim


@pytest.fixture
def threads(monkeypatch):
    """Two threads, as far as anyone asks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def crowding(*readings, seconds: float = 12.0) -> Crowding:
    """One whose looks find these (seconds run, seconds waited), so many seconds after one another."""
    clock = chain.from_iterable(repeat(seconds * n, 2 if n else 1) for n in range(100))
    return Crowding(iter(readings).__next__, clock.__next__)


def test_it_warns_once_when_threads_wait_for_cores(threads):
    crowded = crowding((1.0, 0.5), (12.0, 1.0), (15.0, 11.0), (15.0, 31.0))
    crowded.look()  # 0.5 of 11.5 seconds: a busy moment
    with pytest.warns(UserWarning, match=r"77% of their time .* torch uses 2 threads, .* set OMP_NUM_THREADS=1"):
        crowded.look()
    crowded.look()


def test_it_is_silent_where_nothing_is_wrong_or_known(threads, monkeypatch):
    crowding((0.0, 0.0), (20.0, 4.0)).look()  # under a quarter
    crowding((0.0, 0.0), (1.0, 3.0), seconds=4.0).look()  # too short a time to tell
    crowding(None).look()  # not Linux
    crowding((0.0, 0.0), None).look()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    crowding((0.0, 0.0), (1.0, 30.0)).look()  # one thread gets its share, no less


def test_the_kernels_counts_of_all_threads_are_added(tmp_path: Path):
    for name, counts in {"7": "1500000000 250000000 12\n", "8": "500000000 250000000 3\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(counts)
    assert thread_seconds(tmp_path) == (2.0, 0.5)
    (tmp_path / "9").mkdir()
    assert thread_seconds(tmp_path) is None
    assert thread_seconds(tmp_path / "none") is None


def test_throughput_looks_at_logged_steps(threads, model_folder, monkeypatch):
    looks = []
    monkeypatch.setattr(throughput, "Crowding", lambda: type("Fake", (), {"look": lambda self: looks.append(1)})())
    with warnings.catch_warnings():
        stage = SFT(model_folder, optim=Optim(lr=1e-3))
        arena.fit(stage, [arena.examples(4)] * 4, callbacks=[Throughput()], log_every_n_steps=2)
    assert len(looks) == 2
