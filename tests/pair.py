"""Two processes that meet: a worker script started once a rank, and ended when one of them fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def meeting_place() -> dict[str, str]:
    """The environment of workers that are to meet, and to find the tests."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def run_launched(script: Path, *arguments: str, seconds: float = 300) -> None:
    """Run ``script``, whose Trainer starts the second process; it must end well.

    Args:
        script: the worker.
        arguments: of the script.
        seconds: after which it is killed.
    """
    environment = {**meeting_place(), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, str(script), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


def run_pair(script: Path, out: Path, *arguments: str, seconds: float = 300) -> None:
    """Run ``script`` as rank 0 and 1 with LOCAL_RANK, MASTER_ADDR and MASTER_PORT set; both must end well.

    Args:
        script: the worker.
        out: where what they say is kept.
        arguments: of the script.
        seconds: after which both are killed.
    """
    environment, command = meeting_place(), [sys.executable, str(script), *arguments]
    with (out / "said_0").open("w") as zero, (out / "said_1").open("w") as one:
        ranks = [
            subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(rank)}, stderr=said)
            for rank, said in enumerate((zero, one))
        ]
    deadline = time.monotonic() + seconds
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank in ranks:  # without the other one it would wait forever
        rank.kill()
    assert codes == [0, 0], "\n".join(said.read_text()[-3000:] for said in sorted(out.glob("said_*")))
