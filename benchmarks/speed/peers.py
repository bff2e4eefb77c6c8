"""Time this project beside a peer on the same work, a step of one and a step of the other in turn.

    benchmarks/speed/environments.sh PEERS                                   the peers' environments, once
    python benchmarks/speed/peers.py grpo --peers PEERS                      one comparison
    python benchmarks/speed/peers.py grpo --peers PEERS --epochs 4 --lengths ragged --shape 15m --rows 8
    python benchmarks/speed/peers.py all --peers PEERS --out results         the whole table: JSON files in results/
    python benchmarks/speed/peers.py loop_sft                                what the Trainer adds; needs no peer
    python benchmarks/speed/table.py results                                 the files as markdown

Each side runs in a process of its own environment and works only when it is told to; the other waits meanwhile. The
first step warms up and is discarded. Work, models and lengths: see ``work.py``; CPU, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from table import row
from work import Work, save_models

HERE = Path(__file__).resolve().parent
# Of each task: the other side's script, its folder under --peers that goes before the environment's own packages, and
# the work of a full measurement. Microbatches are those that TRL is fastest with.
TASKS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "grpo": ("side_trl.py", None, {"rows": 64, "group": 8, "micro": 64}),
    "rloo": ("side_trl.py", None, {"rows": 64, "group": 8, "micro": 64}),
    "ppo": ("side_trl_ppo.py", "trl_ppo", {"rows": 64, "epochs": 4, "micro": 64, "kl_coef": 0.05}),
    "sft": ("side_trl.py", None, {"rows": 32}),
    "reward": ("side_trl.py", None, {"rows": 32}),
    "loop_sft": ("side_plain.py", None, {"shape": "toy", "rows": 4, "sequence_tokens": 16, "burst": 50}),
    "loop_grpo": (
        "side_plain.py",
        None,
        {"shape": "toy", "rows": 2, "group": 4, "prompt_tokens": 4, "response_tokens": 8, "burst": 20},
    ),
}
TABLE: list[tuple[str, dict[str, Any]]] = [
    *(("grpo", {"lengths": lengths, "epochs": epochs}) for lengths in ("full", "ragged") for epochs in (1, 4)),
    *(("rloo", {"lengths": lengths}) for lengths in ("full", "ragged")),
    *(("ppo", {"lengths": lengths, "minibatches": count}) for lengths in ("full", "ragged") for count in (1, 4)),
    *((task, {"lengths": lengths}) for task in ("sft", "reward") for lengths in ("full", "ragged")),
    ("loop_sft", {}),
    ("loop_grpo", {}),
]


class Side:
    """A measured process.

    Args:
        python: its environment's interpreter.
        script: what it runs.
        path: folders that go before its environment's own packages.
        work: what it does.
        folder: where the models are.
        log: where its own output goes.
    """

    def __init__(self, python: Path, script: str, path: str, work: Work, folder: Path, log: Path) -> None:
        self.script, self.log = script, log
        environment = os.environ | {
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(work.threads),
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(python), str(HERE / script), json.dumps(asdict(work)), str(folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def hear(self) -> dict[str, Any]:
        """The process's next answer.

        Raises:
            SystemExit: it ended; the message holds the last lines of its output.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-30:])
            raise SystemExit(f"{self.script} ended with:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> dict[str, Any]:
        """Let it make a step (or a burst of them); what that took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Let it go: it stops when its input ends."""
        self.process.communicate()


def summary(about: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of one side, and the steps themselves."""
    phases = {name: statistics.median(step["phases"][name] for step in steps) for name in steps[0]["phases"]}
    if "generate" in phases and "update" not in phases:
        phases["rest"] = statistics.median(step["wall"] - step["phases"]["generate"] for step in steps)
    return {
        **{key: statistics.median(step[key] for step in steps) for key in ("wall", "cpu", "tokens")},
        "phases": phases,
        "peak_mb": steps[-1]["peak_mb"],
        **about,
        "steps": [{key: step[key] for key in ("wall", "cpu", "tokens")} for step in steps],
    }


def compare(work: Work, peers: Path | None) -> dict[str, Any]:
    """Time both sides on the work."""
    script, over, _ = TASKS[work.task]
    if script != "side_plain.py" and peers is None:
        raise SystemExit(f"{work.task} needs --peers FOLDER, which benchmarks/speed/environments.sh makes")
    ours_path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(HERE.parents[1]))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(work.shape, folder)
        names = ("ours", "plain" if script == "side_plain.py" else "trl")
        sides: list[Side] = []
        try:
            sides.append(Side(Path(sys.executable), "side_ours.py", ours_path, work, folder, folder / "ours.log"))
            if names[1] == "plain":
                python, path = Path(sys.executable), ours_path
            else:
                assert peers is not None
                python, path = peers.absolute() / "trl" / "bin" / "python", str(peers.absolute() / over) if over else ""
            sides.append(Side(python, script, path, work, folder, folder / "peer.log"))
            about = [side.hear() for side in sides]
            rounds = [[side.step() for side in sides] for _ in range(work.steps // work.burst)][1:]
        finally:
            for side in sides:
                side.end()
    measured = {name: summary(about[i], [steps[i] for steps in rounds]) for i, name in enumerate(names)}
    ours, peer = (measured[name] for name in names)
    return {
        "work": asdict(work),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "sides": measured,
        "faster": {clock: peer[clock] / ours[clock] for clock in ("wall", "cpu")},
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def file_name(work: Work) -> str:
    """A name that no two comparisons of the table share."""
    updates = f"{work.epochs}x{work.minibatches}"
    return f"{work.task}_{work.shape}_{work.lengths}_{updates}_rows{work.rows}.json"


def main() -> None:
    """Read the command line, compare, print a row each, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("--peers", type=Path, help="folder that environments.sh made")
    parser.add_argument("--out", type=Path, help="folder for the JSON files")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side, after one that warms up")
    parser.add_argument("--shape", help="toy, 1m or 15m")
    parser.add_argument("--lengths", choices=["full", "ragged"])
    parser.add_argument("--rows", type=int, help="prompts, sequences or pairs a step")
    parser.add_argument("--group", type=int, help="responses a prompt (GRPO, RLOO)")
    parser.add_argument("--epochs", type=int, help="passes over a rollout")
    parser.add_argument("--minibatches", type=int, help="optimizer steps a pass")
    parser.add_argument("--micro", type=int, help="sequences a forward pass of TRL's updates")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    knobs = ("shape", "lengths", "rows", "group", "epochs", "minibatches", "micro", "threads")
    given = {name: getattr(args, name) for name in knobs if getattr(args, name) is not None}
    print("comparing, seconds a step, median of", args.repeats, flush=True)
    for task, settings in TABLE if args.task == "all" else [(args.task, {})]:
        full = TASKS[task][2] | settings | given
        full["steps"] = (args.repeats + 1) * full.get("burst", 1)
        work = Work(task, **full)
        result = compare(work, args.peers)
        print(row(result), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / file_name(work)).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
