"""Rewards as a user would keep them in a module of his own; named by dotted path in test_yaml.py."""

from __future__ import annotations


def shortness(prompts, completions, **columns):
    return [-float(len(completion)) for completion in completions]


async def patience(completions):
    return [1.0] * len(completions)
