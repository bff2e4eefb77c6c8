"""Tiny runs through the command line, each in a process of its own that can be killed; for tests and the soak.

The processes are forked from a server that has imported the libraries once, so that one takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch

from lit_rlhf import SFT
from lit_rlhf.checkpoints import newest, read

STAGES = ("sft", "reward", "ppo", "grpo")
STEPS = 6
PRELOAD = ["torch", "transformers", "lightning", "lit_rlhf.commands.train", "lit_rlhf.stages", "faults.runs"]
CLASSES = {"sft": "SFT", "reward": "RewardModeling", "ppo": "PPO", "grpo": "GRPO"}
DATA = {"sft": "SFTData", "reward": "PreferenceData", "ppo": "PromptData", "grpo": "PromptData"}


def server() -> Any:
    """The context that starts processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def make_files(folder: Path) -> None:
    """A tiny model and a few rows for every stage."""
    tiny.save_tiny(folder / "base")
    rows = [{"prompt": f"Q{i}:", "completion": f" answer {i}"} for i in range(20)]
    pairs = [{"prompt": f"Q{i}:", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(20)]
    for name, kind in (("sft", rows), ("reward", pairs), ("ppo", rows), ("grpo", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind), encoding="utf-8")


def arguments(stage: str, folder: Path, root: Path, *more: str) -> list[str]:
    """The command of a run: the same for its first start and every later one."""
    settings = [
        *("fit", "--model", f"lit_rlhf.{CLASSES[stage]}", "--model.model", str(folder / "base")),
        *(
            "--data",
            f"lit_rlhf.{DATA[stage]}",
            "--data.train",
            str(folder / f"{stage}.jsonl"),
            "--data.batch_size",
            "4",
        ),
        *("--trainer.default_root_dir", str(root), "--trainer.max_steps", str(STEPS), "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--model.optim.lr", "1e-3", "--checkpoint.every_n_train_steps", "1", "--export.folder", str(root / "model")),
        *("--ckpt_path", "last"),
    ]
    if stage in ("ppo", "grpo"):
        settings += ["--model.rewards", '["arena.low_ids"]']
        settings += ["--model.sampling.max_new_tokens", "6", "--model.updates.minibatches", "2"]
    return [*settings, *more]


def child(args: list[str], log: str, hook: str | None) -> None:
    """What runs in the process: the command, with its output in a file and a fault planted in it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if hook:
        plant(*hook.split("@"))
    from lit_rlhf.cli import main

    main(args)


def plant(name: str, number: str) -> None:
    """Have the process strike itself at the ``number``-th call of something.

    Args:
        name: one of `struck_at`'s, or a signal, which comes with a step of the optimizer: within a rollout, after some
            of its updates.
        number: which call.
    """
    if name.startswith("SIG"):
        owner, attribute, strike = torch.optim.AdamW, "step", signal.Signals[name]
    else:
        owner, attribute, strike = struck_at()[name]
    calls, real = [0], getattr(owner, attribute)

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(number):
            os.kill(os.getpid(), strike)
        return real(*args, **kwargs)

    setattr(owner, attribute, struck)


def struck_at() -> dict[str, tuple[Any, str, signal.Signals]]:
    """By name of a moment: the function whose call is the moment, and the signal."""
    from transformers import PreTrainedTokenizerBase

    from lit_rlhf.rewards import Rewards
    from lit_rlhf.rollout import decode

    return {
        "fsync": (os, "fsync", signal.SIGKILL),  # a checkpoint's bytes are written, not flushed, not renamed
        "replace": (os, "replace", signal.SIGKILL),  # it gets its name, or the link is moved
        "sampling": (decode, "read_on", signal.SIGKILL),  # before a token of the responses
        "scoring": (Rewards, "__call__", signal.SIGKILL),
        "export": (PreTrainedTokenizerBase, "save_pretrained", signal.SIGKILL),  # the weights are there, no tokenizer
        "validation_step": (SFT, "validation_step", signal.SIGTERM),
    }


class Run:
    """One process."""

    def __init__(self, context: Any, args: list[str], log: Path, hook: str | None = None) -> None:
        self.log = log
        self.process = context.Process(target=child, args=(args, str(log), hook))
        self.process.start()
        self.started = time.monotonic()

    def wait(self, seconds: float = 120) -> int:
        """The exit code: negative is a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.log.read_text(encoding="utf-8"))
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)


def steps_saved(root: Path) -> int:
    """The step of the newest checkpoint under a root; 0 where there is none."""
    files = newest(root.glob("version_*/checkpoints"))
    return read(files[0])["global_step"] if files else 0


def end_of(root: Path) -> dict[str, Any]:
    """What a finished run leaves: weights, moments, counters, schedule and place in the data."""
    saved = read(newest(root.glob("version_*/checkpoints"))[0])
    assert saved["global_step"] == STEPS
    kept = ("state_dict", "optimizer_states", "lr_schedulers", *DATA.values())
    exported = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    return {key: saved[key] for key in kept if key in saved} | {"exported": exported}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two nested values are not the same bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{place}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [text for key in one for text in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [text for i, (left, right) in pairs for text in differences(left, right, f"{place}[{i}]")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [place]
