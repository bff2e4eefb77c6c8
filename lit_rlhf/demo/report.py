"""Say what came out: the table, whether it is a success, and texts before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .measure import Measured, bootstrap_mean

COLUMNS = {
    "gold": "gold score",
    "proxy": "proxy score",
    "kl": "KL (nats)",
    "words": "words used",
    "finished": "finished",
    "well_formed": "well-formed",
}
SHARES = ("words", "finished", "well_formed")

GAIN = 0.5  # gold points that the whole interval of the gain must pass: a third of the SFT stories' deviation
MOST_KL = 25.0  # nats a story
LEAST_WELL_FORMED = 0.9  # of the SFT policy's own share


def table(results: Sequence[Measured]) -> str:
    """Lay out a Markdown table: a row a policy, in each cell the mean and its 95 % bootstrap interval."""
    rows = [["policy", *COLUMNS.values()]]
    rows += [[result.name, *(_cell(result, column) for column in COLUMNS)] for result in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _cell(result: Measured, column: str) -> str:
    mean, low, high = bootstrap_mean(getattr(result, column))
    if column in SHARES:
        return f"{mean:.0%} [{low:.0%}, {high:.0%}]"
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Verdict:
    """Whether one policy passed, and the sentence that says why."""

    passed: bool
    sentence: str


def judge_policy(sft: Measured, tuned: Measured) -> Verdict:
    """Decide whether a policy beats SFT clearly on gold, at an affordable KL, with text that is still well-formed.

    The gain is measured prompt by prompt; the lower end of its interval must pass ``GAIN``.
    """
    mean, low, high = bootstrap_mean([after - before for before, after in zip(sft.gold, tuned.gold, strict=True)])
    kl = bootstrap_mean(tuned.kl)[0]
    before, after = (bootstrap_mean(result.well_formed)[0] for result in (sft, tuned))
    enough = after >= LEAST_WELL_FORMED * before
    faults = [
        f"the gain is not clearly above {GAIN}" if low <= GAIN else "",
        f"the KL is above {MOST_KL:.0f} nats" if kl > MOST_KL else "",
        "" if enough else f"fewer than {LEAST_WELL_FORMED:.0%} of SFT's share are well-formed",
    ]
    said = (
        f"{tuned.name}: gold {mean:+.2f} [{low:+.2f}, {high:+.2f}] over {sft.name} on {len(sft.gold)} held-out "
        f"prompts, at a KL of {kl:.1f} nats a story, {after:.0%} well-formed ({sft.name} {before:.0%})."
    )
    fault = "; ".join(filter(None, faults))
    return Verdict(not fault, f"{'FAILED' if fault else 'PASSED'} {said}{f' Why: {fault}.' if fault else ''}")


def side_by_side(results: Sequence[Measured], count: int) -> str:
    """Show what every policy wrote to the first prompts, unselected, with the gold score of each story."""
    blocks = []
    for i, prompt in enumerate(results[0].prompts[:count]):
        stories = [f"  {r.name + ':':6}[{r.gold[i]:+.2f}] {r.texts[i].strip()}" for r in results]
        blocks.append("\n".join([prompt.strip(), *stories]))
    return "\n\n".join(blocks)


def summary(results: Sequence[Measured], verdicts: Sequence[Verdict]) -> str:
    """Put the table, what its columns mean, and the verdicts together."""
    legend = (
        "Means over held-out prompts with 95 % bootstrap intervals. Gold: the judge that nothing was trained on.\n"
        "Proxy: the reward model, in standard deviations of its scores on held-out pairs. KL: to the SFT policy."
    )
    return "\n\n".join([table(results), legend, *(verdict.sentence for verdict in verdicts)])


def write(results: Sequence[Measured], verdicts: Sequence[Verdict], folder: Path) -> None:
    """Write results.md, with the stories to twenty prompts, and results.json, with every number of every prompt."""
    texts = f"```\n{side_by_side(results, 20)}\n```\n"
    (folder / "results.md").write_text(f"{summary(results, verdicts)}\n\n{texts}", encoding="utf-8")
    found = {
        "passed": all(verdict.passed for verdict in verdicts),
        "policies": [{"name": r.name, **{column: getattr(r, column) for column in COLUMNS}} for r in results],
    }
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
