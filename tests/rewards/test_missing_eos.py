"""The score of a response that never ended."""

from __future__ import annotations

import pytest
import torch

from lit_rlhf.rewards import MissingEOS

SCORES = torch.tensor([2.0, -3.0, 0.5, float("-inf")])
ENDED = torch.tensor([True, False, False, False])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2.0, -1.0, -1.0, -1.0]),
        ({"penalty": 3.0}, [2.0, -3.0, -3.0, -3.0]),
        ({"how": "subtract"}, [2.0, -4.0, -0.5, float("-inf")]),
        ({"penalty": 0.0, "how": "subtract"}, SCORES.tolist()),
    ],
)
def test_only_unfinished_responses_are_punished(settings: dict, expected: list[float]) -> None:
    before = SCORES.clone()
    assert MissingEOS(**settings).apply(SCORES, ENDED).tolist() == expected
    assert torch.equal(SCORES, before)


@pytest.mark.parametrize("settings", [{"penalty": -1.0}, {"penalty": float("nan")}, {"how": "add"}])
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="MissingEOS: "):
        MissingEOS(**settings)
