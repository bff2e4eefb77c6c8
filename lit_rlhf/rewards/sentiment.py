"""Sentiment of a completion by the VADER lexicon: a cheap gold judge for positive texts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@functools.lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "VaderSentiment needs the package vaderSentiment: pip install 'lit-rlhf[sentiment]'"
        ) from error
    return SentimentIntensityAnalyzer()


@dataclass
class VaderSentiment:
    """Score how positive a completion sounds: VADER's compound score, −1 to 1, times ``scale``.

    Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    English only. An empty completion scores 0.

    Args:
        scale: factor on the compound score; negative asks for negative texts.
        name: what it is logged as.

    Raises:
        ImportError: the package vaderSentiment is missing.
    """

    scale: float = 1.0
    name: str = "vader_sentiment"

    def __post_init__(self) -> None:
        _analyzer()

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
        """Compound score of each of the B completions, times ``scale``."""
        return [self.scale * _analyzer().polarity_scores(text)["compound"] for text in completions]
