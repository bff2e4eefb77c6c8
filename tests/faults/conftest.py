"""What tests share that start runs in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a few rows for every stage."""
    path = tmp_path_factory.mktemp("faults")
    runs.make_files(path)
    return path


@pytest.fixture(scope="module")
def server():
    """What starts processes."""
    return runs.server()
