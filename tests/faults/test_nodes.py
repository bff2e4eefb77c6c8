"""The scripts of examples/, as two nodes on the loopback: the run of one process on the same global batch."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pair import free_port

from lit_rlhf.callbacks.checkpoint import refuse_another_start
from lit_rlhf.checkpoints import CheckpointError, newest, read

ROOT = Path(__file__).parents[2]
STEPS = 4
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="shell scripts")


def settings(folder: Path, root: str, batch_size: int) -> list[str]:
    """Options over configs/grpo.yaml that make its run tiny."""
    options = {
        "config": "tiny.yaml",
        "model.model": folder / "base",
        "model.rewards": '["faults.nodes.noted"]',
        "model.group_size": 2,
        "model.sampling.max_new_tokens": 6,
        "model.frozen_dtype": "null",
        "model.optim.lr": 1e-3,
        "data.train": folder / "grpo.jsonl",
        "data.prompt_column": "prompt",
        "data.chat": "false",
        "data.system_prompt": "null",
        "data.batch_size": batch_size,
        "data.val_fraction": 0.2,
        "trainer.max_steps": STEPS,
        "trainer.default_root_dir": folder / root,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_train_steps": 100,
        "export.folder": folder / root / "model",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def environment(folder: Path, name: str, **more: str) -> dict[str, str]:
    """Of a launcher; what its processes sample is noted in a folder of this name."""
    notes = folder / name
    notes.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "STAND_IN_NOTES": str(notes), **more}


def ended(process: subprocess.Popen, log: Path, code: int = 0) -> str:
    """What a process said until its end."""
    try:
        process.wait(150)
    finally:
        process.kill()
    assert process.returncode == code, log.read_text()[-4000:]
    return log.read_text()


def start(folder: Path, log: str, words: list[str], env: dict[str, str]) -> tuple[subprocess.Popen, Path]:
    with (folder / log).open("w") as file:
        return subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT), folder / log


def weights(root: Path) -> dict[str, torch.Tensor]:
    saved = read(newest(root.glob("version_*/checkpoints"))[0])
    assert saved["global_step"] == STEPS
    return saved["state_dict"]


def sampled(folder: Path, rank: int) -> list:
    return [json.loads(line) for line in (folder / f"sampled{rank}").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of one process with batches twice as large."""
    words = [sys.executable, "-m", "lit_rlhf.cli", "fit", "--config", "grpo.yaml", *settings(folder, "alone", 2)]
    ended(*start(folder, "alone.log", words, environment(folder, "notes-alone")))
    return folder / "alone"


def same_as(alone: Path, root: Path) -> None:
    for (name, one), two in zip(weights(alone).items(), weights(root).values(), strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_torchrun_on_two_nodes_is_one_process_and_the_second_node_writes_nothing(folder, alone):
    head = {"NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{free_port()}", "JOB": "test"}
    env = environment(folder, "notes-torchrun", **head)
    script = ["bash", "examples/torchrun.sh"]
    nodes = [start(folder, f"{root}.log", [*script, *settings(folder, root, 1)], env) for root in ("first", "second")]
    said = [ended(*node) for node in nodes]
    written = [[path for path in (folder / root).rglob("*") if path.is_file()] for root in ("first", "second")]
    first = 0 if written[0] else 1  # the rendezvous decides which node is first
    files, root = written[first], folder / ("first", "second")[first]
    assert written[1 - first] == []
    names = [path.name for path in files]
    assert [names.count(name) for name in ("metrics.csv", "samples.jsonl", "config.yaml", "config.json")] == [1] * 4
    assert [path.name for path in files if path.suffix == ".ckpt" and not path.is_symlink()] == ["step=4.ckpt"]
    unwatched = [line for text in said for line in text.splitlines() if "is not watched" in line]
    assert not unwatched
    same_as(alone, root)
    own = [sampled(folder / "notes-torchrun", rank) for rank in (0, 1)]
    everything = sampled(folder / "notes-alone", 0)
    # In training each rank draws its own rows' tokens, those that one process draws for them; so in validation.
    assert sorted(map(str, {*map(str, own[0]), *map(str, own[1])})) == sorted({*map(str, everything)})
    assert not {str(row) for row in own[0][:4]} & {str(row) for row in own[1][:4]}


def test_slurm_requeues_a_job_that_ran_out_of_time_and_its_second_start_goes_on(folder, alone):
    """No SLURM here: stand-ins set the variables that it sets, and note what scontrol is asked for."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        text = f"#!{sys.executable}\n" + (ROOT / "tests/faults/slurm_stand_in.py").read_text()
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    job = str(free_job())
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    env = environment(folder, "notes-slurm", PATH=path, STAND_IN_JOB=job)
    words = ["sbatch", "--ntasks-per-node=1", "examples/slurm.sh", *settings(folder, "slurm", 1)]
    said = ended(*start(folder, "slurm-1.log", words, env), 128 + 10)
    assert "SIGUSR1: stopped. Newest checkpoint: " in said
    assert said.count(f"job {job} requeued") == 1
    assert (folder / "notes-slurm" / "scontrol").read_text() == f"requeue {job}\n"
    assert not (folder / "slurm" / "model").exists()
    said = ended(*start(folder, "slurm-2.log", words, {**env, "SLURM_RESTART_COUNT": "1"}))
    assert "going on after rollout 3" in said
    same_as(alone, folder / "slurm")
    assert (folder / "slurm" / "model" / "config.json").exists()


@pytest.mark.parametrize(("own", "refused"), [("/mnt/runs/version_0/checkpoints/step=2.ckpt", False), (None, True)])
def test_a_rank_that_does_not_see_the_checkpoint_is_refused(own, refused):
    """Rank 0 would go on and this one begin anew: they would wait for each other. Where it is mounted is no matter."""
    strategy = SimpleNamespace(broadcast=lambda _: "/data/runs/version_0/checkpoints/step=2.ckpt")
    trainer = SimpleNamespace(ckpt_path=own, strategy=strategy, world_size=2, global_rank=1)
    with (
        pytest.raises(CheckpointError, match=r"rank 0 goes on from /data/.+ rank 1 from nothing")
        if refused
        else nullcontext()
    ):
        refuse_another_start(trainer)


def free_job() -> int:
    """A job number from which Lightning makes a port that is free: 15000 and its last four digits."""
    while True:
        job = random.randint(1000, 9999)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 15000 + job)):
                return job
