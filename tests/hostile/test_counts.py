"""The table in docs/reliability.md counts the cases that there are."""

from __future__ import annotations

from pathlib import Path

from hostile.configs import SETTINGS, TEXTS
from hostile.files import FILES
from hostile.folders import FOLDERS
from hostile.rows import ROWS

import lit_rlhf

PAGE = Path(lit_rlhf.__file__).parent.parent / "docs" / "reliability.md"


def counted() -> list[str]:
    """The rows of the table: class of input, cases, errors, dropped and counted, read whole."""
    rows, files = [[case.ends for case in table] for table in (ROWS, FILES)]
    classes = {
        "rows": rows,
        "files and folders of rows": files,
        "model folders": ["error"] * len(FOLDERS),
        "config files": ["error"] * len(TEXTS),
        "settings": ["error"] * len(SETTINGS),
    }
    ends = ("error", "dropped", "read")
    lines = [[name, len(found), *(found.count(end) for end in ends)] for name, found in classes.items()]
    lines.append(["all", *(sum(column) for column in zip(*[line[1:] for line in lines], strict=True))])
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def test_the_page_counts_what_there_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for line in counted():
        assert line in page, f"docs/reliability.md lacks {line}"


def test_names_are_told_apart_and_there_are_enough() -> None:
    names = [(type(case).__name__, case.name) for case in (*ROWS, *FILES, *FOLDERS, *TEXTS)]
    names += [(case.stage, case.args) for case in SETTINGS]
    assert len(set(names)) == len(names) >= 110
