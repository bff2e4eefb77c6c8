"""Seconds from the failure of one of two processes to the end of both, by launcher; two CPU processes, gloo.

usage: python benchmarks/faults/ranks.py [--silence 10]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import runs  # noqa: E402

REWARD = """
import os, signal, time
from pathlib import Path
calls = [0]

def strikes(prompts, completions, completion_ids, **_):
    calls[0] += 1
    rank, how = os.environ["STRIKE"].split(maxsplit=1)
    if os.environ.get("LOCAL_RANK", "0") == rank and calls[0] == 2:
        Path("struck").write_text(repr(time.time()))
        if how == "raises":
            raise LookupError("planted")
        os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
    return [float(sum(ids)) for ids in completion_ids]
"""
LAUNCHERS = {
    "Lightning's": ["-m", "lit_rlhf.cli"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "lit_rlhf.cli"),
    ],
}


def measure(launcher: str, rank: int, how: str, folder: Path, silence: float) -> tuple[float, int, str]:
    """Seconds, the launcher's exit code, and what the run said of the rank that failed."""
    root = folder / f"{launcher}-{rank}-{how}"
    args = runs.arguments("grpo", folder, root, "--model.rewards", '["strikes.strikes"]', "--data.batch_size", "2")
    args += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--ranks.silence", str(silence)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "STRIKE": f"{rank} {how}"}
    said = folder / "said"
    with said.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], *args], env=environment, cwd=folder, stdout=file, stderr=file
        )
        pids: set[int] = set()
        while run.poll() is None:
            pids |= children_of(run.pid)
            time.sleep(0.05)
        while any(is_running(pid) for pid in pids):
            time.sleep(0.05)
    seconds = time.time() - float((folder / "struck").read_text())
    lines = [line for line in said.read_text().splitlines() if "because of" in line or line.startswith("error: rank")]
    return seconds, run.returncode, lines[0][:160] if lines else "nothing"


def children_of(pid: int) -> set[int]:
    """Processes that a process has started."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--silence", type=float, default=10.0, help="ranks.silence")
    silence = parser.parse_args().silence
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.make_files(folder)
        (folder / "strikes.py").write_text(REWARD)
        print(
            "| launcher | rank | what it does | seconds | exit code | what is said |\n" + "| --- " * 6 + "|", flush=True
        )
        for launcher in LAUNCHERS:
            for rank, how in ((1, "raises"), (0, "raises"), (1, "is killed"), (1, "is stopped")):
                seconds, code, said = measure(launcher, rank, how, folder, silence)
                print(f"| {launcher} | {rank} | {how} | {seconds:.1f} | {code} | {said} |", flush=True)


if __name__ == "__main__":
    main()
