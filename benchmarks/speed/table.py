"""The comparisons that peers.py wrote, as one markdown table: ``python benchmarks/speed/table.py FOLDER …``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "| work | tokens a step: ours, peer | ours, CPU s | peer, CPU s | faster (CPU) | faster (wall) "
    "| ours, by phase, wall s | peer, by phase, wall s | peak memory: ours, peer, MB |\n|" + " --- |" * 9
)
ORDER = ("grpo", "rloo", "ppo", "sft", "reward", "loop_sft", "loop_grpo")


def describe(work: dict[str, Any]) -> str:
    """One line that says what a step is."""
    task, rows = work["task"], work["rows"]
    what = {"sft": "sequences", "loop_sft": "sequences", "reward": "pairs"}.get(task, "prompts")
    size = f"{rows} {what}" + (f" × {work['group']}" if work["group"] > 1 else "")
    if what == "prompts":
        updates = work["epochs"] * work["minibatches"]
        size += f", {work['response_tokens']} new tokens, {updates} update{'s' if updates > 1 else ''}"
    else:
        size += f" × {work['sequence_tokens']}"
    return f"{task}, {work['shape']}, {size}, {work['lengths']}"


def row(result: dict[str, Any]) -> str:
    """One comparison as a row."""
    ours, (name, peer) = result["sides"]["ours"], list(result["sides"].items())[1]
    phases = [" ".join(f"{k} {v:.3g}" for k, v in side["phases"].items()) for side in (ours, peer)]
    versions = f" ({name} {peer['versions']['trl']})" if "trl" in peer["versions"] else f" ({name} torch)"
    faster = result["faster"]
    if name == "plain":
        gain = [f"+{1000 * (ours[clock] - peer[clock]):.2f} ms" for clock in ("cpu", "wall")]
    else:
        gain = [f"**{faster['cpu']:.2f}×**", f"{faster['wall']:.2f}×"]
    cells = [
        describe(result["work"]) + versions,
        f"{ours['tokens']:.0f}, {peer['tokens']:.0f}",
        f"{ours['cpu']:.4g}",
        f"{peer['cpu']:.4g}",
        *gain,
        *phases,
        f"{ours['peak_mb']:.0f}, {peer['peak_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def footing(results: list[dict[str, Any]]) -> str:
    """Where and with what it was measured."""
    versions = {
        f"{package} {number}"
        for result in results
        for side in result["sides"].values()
        for package, number in side["versions"].items()
    }
    machines = {f"{r['machine']['processor']}, {r['machine']['cores']} cores" for r in results}
    threads = {side["threads"] for r in results for side in r["sides"].values()}
    repeats = {len(r["sides"]["ours"]["steps"]) for r in results}
    return (
        f"Medians of {', '.join(map(str, sorted(repeats)))} steps in turn after one of warm-up; float32, "
        f"{', '.join(map(str, sorted(threads)))} thread(s); {'; '.join(sorted(machines))}; "
        f"{', '.join(sorted(versions))}."
    )


def main(folders: list[Path]) -> None:
    """Print the table of all files in the folders."""
    results = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"no JSON files in {', '.join(map(str, folders))}")
    results.sort(key=lambda result: (result["work"]["shape"], ORDER.index(result["work"]["task"])))
    print(HEAD)
    for result in results:
        print(row(result))
    print(f"\n{footing(results)}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
