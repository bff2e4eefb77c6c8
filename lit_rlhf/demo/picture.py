"""Draw the run: gold and proxy score over steps and against KL."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .measure import Measured, bootstrap_mean

COLOURS = {"SFT": "#555555", "PPO": "#1f6fb4", "GRPO": "#d1602b"}
CURVES = {
    "step": "step",
    "gold": "rewards/gold/mean",
    "proxy": "rewards/reward_model/mean",
    "kl": "objective/kl",
}
LABELS = {"gold": "gold score (judge)", "proxy": "proxy score (reward model)"}


def read_curves(path: Path) -> dict[str, list[float]]:
    """Read step, gold, proxy and KL of every rollout from the ``metrics.csv`` that Lightning's CSVLogger wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(CURVES["gold"])]
    return {name: [float(row[column]) for row in rows] for name, column in CURVES.items()}


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Average each value with the neighbours that it has, a window of ``window`` centred on it."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(curves: Mapping[str, Mapping[str, Sequence[float]]], results: Sequence[Measured], path: Path) -> None:
    """Draw four panels: gold (above) and proxy (below), over steps (left) and against KL (right).

    Args:
        curves: For each run ("PPO", "GRPO") its step, gold, proxy and kl, rollout by rollout.
        results: Held-out measurements; each becomes a point with its 95 % intervals, the SFT policy a line.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, score in zip(axes, LABELS, strict=True):
        row[0].set_ylabel(LABELS[score])
        for axis, against in zip(row, ("step", "kl"), strict=True):
            for name, curve in curves.items():
                axis.plot(curve[against], curve[score], ".", color=COLOURS[name], alpha=0.25, markersize=4)
                axis.plot(smooth(curve[against]), smooth(curve[score]), color=COLOURS[name], label=f"{name}, training")
            axis.axhline(
                bootstrap_mean(getattr(results[0], score))[0], color=COLOURS["SFT"], linestyle="--", linewidth=1
            )
            axis.grid(alpha=0.25)
        for result in results:
            _held_out(row[1], result, score)
    axes[1][0].set_xlabel("step (one rollout each)")
    axes[1][1].set_xlabel("KL to the SFT policy (nats a story)")
    axes[0][0].set_title("over the run")
    axes[0][1].set_title("against KL; points: held-out prompts, 95 % intervals")
    axes[0][1].legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _held_out(axis: object, result: Measured, score: str) -> None:
    (x, *x_ends), (y, *y_ends) = bootstrap_mean(result.kl), bootstrap_mean(getattr(result, score))
    axis.errorbar(  # type: ignore[attr-defined]
        x,
        y,
        xerr=[[x - x_ends[0]], [x_ends[1] - x]],
        yerr=[[y - y_ends[0]], [y_ends[1] - y]],
        fmt="o",
        color=COLOURS[result.name],
        markeredgecolor="black",
        capsize=3,
        label=f"{result.name}, held-out",
        zorder=3,
    )
