"""Stands in for sbatch, srun and scontrol, which it is called as: sets the variables that SLURM sets, no more.

sbatch OPTIONS SCRIPT …: runs the script, as job $STAND_IN_JOB. srun OPTIONS COMMAND …: a process a task, each on a node
of its own. scontrol …: writes its arguments down in $STAND_IN_NOTES/scontrol.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def sbatch(words: list[str]) -> int:
    """Run the script with the options of its head and of the command line, the latter first."""
    script = next(i for i, word in enumerate(words) if not word.startswith("--"))
    head = [line.removeprefix("#SBATCH ") for line in Path(words[script]).read_text().splitlines()]
    options = dict(word[2:].partition("=")[::2] for word in [*head, *words[:script]] if word.startswith("--"))
    assert options["signal"] == "SIGUSR1@600"
    nodes, each = options["nodes"], options["ntasks-per-node"]
    job = {
        "JOB_ID": os.environ["STAND_IN_JOB"],
        "JOB_NAME": options["job-name"],
        "NNODES": nodes,
        "NTASKS": str(int(nodes) * int(each)),
        "NTASKS_PER_NODE": each,
        "NODELIST": "127.0.0.1",
        "SUBMIT_DIR": str(Path.cwd()),
    }
    environment = {**os.environ, **{f"SLURM_{name}": value for name, value in job.items()}}
    return subprocess.run(["bash", *words[script:]], env=environment, check=False).returncode


def srun(words: list[str]) -> int:
    """Start the tasks; end all when one fails; the code of the first that failed."""
    assert words[0] == "--kill-on-bad-exit=1"
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        place = {"PROCID": str(task), "LOCALID": str(task % each), "NODEID": str(task // each)}
        environment = {**os.environ, **{f"SLURM_{name}": value for name, value in place.items()}}
        tasks.append(subprocess.Popen(words[1:], env=environment))
    while not any(task.poll() for task in tasks) and None in [task.returncode for task in tasks]:
        time.sleep(0.1)
    for task in tasks:  # the others of a job that was asked to stop are about to
        try:
            task.wait(20)
        except subprocess.TimeoutExpired:
            task.kill()
    return next((task.returncode for task in tasks if task.returncode), 0)


def scontrol(words: list[str]) -> int:
    """Write down what was asked for."""
    with (Path(os.environ["STAND_IN_NOTES"]) / "scontrol").open("a") as file:
        file.write(" ".join(words) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
