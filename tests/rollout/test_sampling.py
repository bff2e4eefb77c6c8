"""Sampling settings: wrong ones are refused by name."""

from __future__ import annotations

import pytest

from lit_rlhf.rollout import Sampling


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_a_wrong_setting_is_named(setting, value):
    with pytest.raises(ValueError, match=rf"sampling\.{setting} is"):
        Sampling(**{setting: value})


@pytest.mark.parametrize(
    ("settings", "filtered"),
    [
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"min_new_tokens": 1}, True),
        ({"top_p": 0.9, "temperature": 0.0}, False),
    ],
)
def test_filtered_says_whether_some_tokens_are_never_drawn(settings, filtered):
    assert Sampling(**settings).filtered is filtered
    assert Sampling(**settings).greedy is (settings.get("temperature") == 0.0)
