"""W&B that cannot be reached, or dies in the midst of a run: training goes on, metrics are kept, the run ends."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
from faults import runs, wandb_run

LIMIT = 120  # seconds; Lightning's own logger gives up after a hundred for each thing that is logged, or never


FAULTS = ("closed", "garbage", "killed", "server_gone")


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory) -> dict[str, Path]:
    """What each run left; all at once, since W&B mostly waits."""
    folders = {fault: tmp_path_factory.mktemp(fault) for fault in FAULTS}
    processes = {
        fault: runs.server().Process(target=wandb_run.main, args=(fault, str(folder), model_folder, 1.0))
        for fault, folder in folders.items()
    }
    for process in processes.values():
        process.start()
    deadline = time.monotonic() + LIMIT
    for fault, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0))
        with (folders[fault] / "said").open("a") as said:
            print(f"exit code {process.exitcode}", file=said)
        process.kill()
    return folders


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_and_metrics_are_kept(fault, folders):
    tmp_path = folders[fault]
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "trained" in said, said
    assert "exit code 0" in said, said
    assert "Traceback" not in said
    with (tmp_path / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(wandb_run.STEPS))
    own = [line for line in said.splitlines() if "W&B cannot be reached" in line or "W&B failed" in line]
    assert len(own) == 1, said
    assert "wandb sync" in own[0]
    began = "cannot be reached" if fault in ("closed", "garbage") else "failed"
    assert f"W&B {began}" in own[0]
    offline = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(offline) == (fault != "server_gone")
    kept = offline or list(tmp_path.glob("wandb/run-*/*.wandb"))
    assert kept  # a process that is killed at once has written little
