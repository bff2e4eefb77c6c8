"""A few seconds of the fuzzing that ``benchmarks/faults/fuzz.py`` does for longer."""

from __future__ import annotations

import lightning  # noqa: F401  before any test captures stderr: its log handler keeps the stream it finds
import pytest
from hostile.fuzz import TARGETS, Fuzz

ROUNDS = {"row": 200, "file": 200, "folder": 15, "config": 8}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"), seed=0)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_mutated_loads_or_is_refused_in_words(target: str, fuzz: Fuzz) -> None:
    fuzz.run(ROUNDS[target], target)
    assert not fuzz.faults, "\n".join(fuzz.faults)
    assert fuzz.counts[target, "loaded"] + fuzz.counts[target, "refused"] == ROUNDS[target]
    assert fuzz.counts[target, "refused"] > ROUNDS[target] // 4, "next to nothing was malformed"


def test_an_error_without_our_words_is_a_fault(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise KeyError("text")

    monkeypatch.setattr(fuzz, "_row", broken)
    fuzz.run(1, "row")
    assert "KeyError" in fuzz.faults.pop()
