"""Python code that comes with a model: named in the log before it is run."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("lit_rlhf")


def announce_code(name: str, revision: str | None, config: dict[str, Any], what: str) -> None:
    """Say whose code is about to run, if a config names any.

    Args:
        name: folder or hub id.
        revision: branch, tag or commit.
        config: the JSON that names classes in its ``auto_map``.
        what: "model" or "tokenizer".
    """
    named = config.get("auto_map")
    if not named:
        return
    values = named.values() if isinstance(named, dict) else [named]
    classes = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value]) if one]
    where = f"revision {revision}" if revision else "no revision pinned: set network.revision to a commit"
    log.warning(
        "trust_remote_code: running Python code that comes with the %s %s (%s): %s",
        *(what, name, where, ", ".join(map(str, classes))),
    )
