"""A small workspace and a good config a stage, and the command line run in this process as a shell would see it."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from faults import runs

from lit_rlhf.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a user sees.

    Args:
        code: the exit code, or the error that would be a traceback.
        said: the error stream, without Lightning's notes of what it does.
    """

    code: int | BaseException
    said: str

    @property
    def is_door(self) -> bool:
        """Whether it ended with words and exit code 2."""
        return self.code == 2 and "Traceback" not in self.said and "error: " in self.said


def config(stage: str) -> dict[str, Any]:
    """A config whose fit makes one step."""
    init: dict[str, Any] = {"model": "base"}
    if stage in ("ppo", "grpo"):
        init |= {"rewards": ["arena.low_ids"], "sampling": {"max_new_tokens": 2}}
    data = {"train": f"{stage}.jsonl", "batch_size": 2, "limit": 4, "val_fraction": 0}
    quiet = ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
    return {
        "seed_everything": 0,
        "model": {"class_path": f"lit_rlhf.{runs.CLASSES[stage]}", "init_args": init},
        "data": {"class_path": f"lit_rlhf.{runs.DATA[stage]}", "init_args": data},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "limit_val_batches": 0, **dict.fromkeys(quiet, False)},
    }


def make_workspace(folder: Path) -> None:
    """A tiny model, rows and a config for each stage."""
    runs.make_files(folder)
    for stage in runs.STAGES:
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config(stage)), encoding="utf-8")


def run(folder: Path, args: Sequence[str]) -> Outcome:
    """Run ``lit-rlhf`` in a folder; directory, environment and warnings are put back."""
    here, environment, said = Path.cwd(), dict(os.environ), io.StringIO()
    code: int | BaseException = 0
    os.chdir(folder)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            main(list(args))
    except SystemExit as stopped:
        code = int(stopped.code or 0) if not isinstance(stopped.code, str) else 1
    except Exception as error:
        code = error
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
    return Outcome(code, said.getvalue())
