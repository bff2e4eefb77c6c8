"""VADER as a reward."""

from __future__ import annotations

import sys

import pytest

from lit_rlhf.rewards import VaderSentiment, sentiment


def test_positive_texts_score_higher() -> None:
    texts = ["It was a wonderful, happy day!", "The table is brown.", "It was a terrible, sad day.", ""]
    good, plain, bad, empty = VaderSentiment()(["p"] * 4, texts)
    assert 0.7 < good <= 1
    assert plain == empty == 0
    assert -1 <= bad < -0.5
    assert VaderSentiment(scale=-3.0)(["p"], texts[:1]) == [-3 * good]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    sentiment._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-rlhf\[sentiment\]'"):
        VaderSentiment()
