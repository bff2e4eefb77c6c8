"""Runs that are killed at the worst moments and started again end bit for bit where an undisturbed run ends."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from faults import runs

from lit_rlhf.checkpoints import read

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")


@pytest.fixture(scope="module")
def whole(folder: Path, server):
    """What the undisturbed run of a stage ends with."""
    ends: dict[str, dict] = {}

    def end(stage: str) -> dict:
        if stage not in ends:
            root = folder / f"{stage}-whole"
            assert runs.Run(server, runs.arguments(stage, folder, root), folder / f"{stage}.log").wait() == 0
            ends[stage] = runs.end_of(root)
        return ends[stage]

    return end


@pytest.mark.parametrize(
    ("stage", "hook"),
    [
        ("sft", "fsync@7"),  # the third file is written, not flushed, not renamed
        ("ppo", "replace@4"),  # the second file has its name, the link not yet
        ("grpo", f"SIGKILL@{random.randint(3, 12)}"),  # some update after the first rollout, of two a rollout
    ],
    ids=["sft", "ppo", "grpo"],
)
def test_killed_and_started_again_it_ends_where_an_undisturbed_run_ends(stage, hook, folder, server, whole):
    root, log = folder / f"{stage}-killed", folder / f"{stage}-killed.log"
    command = runs.arguments(stage, folder, root)
    run = runs.Run(server, command, log, hook)
    assert run.wait() == -signal.SIGKILL, log.read_text(encoding="utf-8")
    saved = runs.steps_saved(root)
    assert 0 < saved < runs.STEPS
    assert read(root / "version_0" / "checkpoints" / "last.ckpt")["global_step"] in (saved, saved - 1)
    assert runs.Run(server, command, log).wait() == 0, log.read_text(encoding="utf-8")
    assert f"going on after {'step' if stage == 'sft' else 'rollout'} {saved}" in log.read_text(encoding="utf-8")
    assert runs.differences(runs.end_of(root), whole(stage)) == []


def test_sigterm_within_a_rollout_saves_after_it_exports_nothing_and_is_resumed_exactly(folder, server, whole):
    """Eight updates a rollout, so the 11th is in the second. No interval is due: the one checkpoint is its."""
    root, log = folder / "ppo-term", folder / "ppo-term.log"
    command = runs.arguments("ppo", folder, root, "--checkpoint.every_n_train_steps", "100")
    run = runs.Run(server, command, log, "SIGTERM@11")
    assert run.wait() == 128 + signal.SIGTERM, log.read_text(encoding="utf-8")
    said = log.read_text(encoding="utf-8")
    assert "SIGTERM: stopped. Newest checkpoint:" in said
    assert "Traceback" not in said
    assert runs.steps_saved(root) == 2
    assert not (root / "model").exists()
    assert runs.Run(server, command, log).wait() == 0, log.read_text(encoding="utf-8")
    assert "going on after rollout 2, 8 episodes, epoch 0 and row 8 of the data" in log.read_text(encoding="utf-8")
    assert runs.differences(runs.end_of(root), whole("ppo")) == []


def test_sigterm_in_a_validation_waits_for_its_end_and_no_longer(folder, server, whole):
    """Four batches an epoch, so the validation stands between step 4 and step 5."""
    root, log = folder / "sft-term", folder / "sft-term.log"
    command = runs.arguments("sft", folder, root, "--checkpoint.every_n_train_steps", "100")
    assert runs.Run(server, command, log, "validation_step@1").wait() == 128 + signal.SIGTERM
    assert runs.steps_saved(root) == 4
    assert runs.Run(server, command, log).wait() == 0, log.read_text(encoding="utf-8")
    assert runs.differences(runs.end_of(root), whole("sft")) == []
