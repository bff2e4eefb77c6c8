"""After any checkpoint a resumed run does, bit for bit, what the run without interruption does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import exact, exact_cases

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each run has its own

# Checkpoints are numbered as they are written, one a step, and a second time after the step's validation. Which are
# tried: all (None), or some within an epoch, right before a validation, after it, at an epoch's end, in a warm-up.
BY_STEPS = {"max_epochs": -1, "check_val_every_n_epoch": None}
TRIED: dict[str, tuple[str, tuple[int, ...] | None, dict[str, Any]]] = {
    "every checkpoint, validation within epochs": ("sft", None, {"val_check_interval": 2}),
    "no validation, epochs end": ("sft", (3, 4), {**BY_STEPS, "max_steps": 7, "limit_val_batches": 0}),
    "two batches a step": ("sft", (0, 2), {"accumulate_grad_batches": 2, "val_check_interval": 3}),
    "packing": ("sft packing", (1, 4), {}),
    "noise and residual dropout, loader processes": ("sft noise", (1, 5), {"workers": 2}),
    "adapters": ("sft adapters", (3,), {}),
    "margins, every checkpoint": ("reward margin", None, {}),
    "rankings, a validation ends the run": (
        "reward ranked",
        (1, 3),
        {**BY_STEPS, "max_steps": 5, "val_check_interval": 5},
    ),
    "PPO, in and after the warm-up of the critic": ("ppo", (0, 2), {}),
    "PPO with steps judged, loader processes": ("ppo steps", (3,), {"workers": 1}),
    "PPO with a steered penalty": ("ppo penalty", (1,), {}),
    "GRPO before and after the reference moves": ("grpo", (1, 3), {"max_epochs": 1}),
    "GRPO with two rewards": ("grpo gdpo", (1,), {"max_epochs": 1}),
    "GRPO with steps judged": ("grpo steps", (1,), {"max_epochs": 1}),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    exact_cases.write_files(folder)
    return folder


@pytest.mark.parametrize("name", TRIED)
def test_resumed(name, model_folder, rows, tmp_path):
    case, points, settings = TRIED[name]
    build = partial(exact_cases.build, case, model_folder, rows, workers=settings.get("workers", 0))
    trainer = {key: value for key, value in settings.items() if key != "workers"}
    assert exact.faults(build, tmp_path, points, **trainer) == {}


def test_resumed_twice_within_an_epoch(model_folder, rows, tmp_path):
    """First right before a validation, then right after the next one, which is not to be made again."""
    build, settings = partial(exact_cases.build, "sft", model_folder, rows), {"max_epochs": 1, "val_check_interval": 2}
    whole = exact.play(build, tmp_path / "whole", **settings)
    once = exact.play(build, tmp_path / "once", exact.kept(tmp_path / "whole")[1], **settings)
    ckpt = exact.kept(tmp_path / "once")[2]
    twice = exact.play(build, tmp_path / "twice", ckpt, **settings)
    rest = exact.rest_of(once.events, twice.begin)
    assert [event[0] for event in once.events[: twice.begin]].count("validation") == 2 * 2
    assert exact.first_difference(rest, twice.events) == ""
    assert whole.events[-len(rest) :] == rest
