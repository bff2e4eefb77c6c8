"""RLHF as PyTorch Lightning modules: SFT, reward model, PPO and GRPO.

Names are imported when first asked for, so that ``import lit_rlhf`` costs nothing that the program does not use.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "lit_rlhf.batch": ("Examples", "Pairs", "Prompts", "Rollout"),
    "lit_rlhf.data": ("PreferenceData", "PromptData", "SFTData"),
    "lit_rlhf.models": ("Lora", "Network"),
    "lit_rlhf.rollout": ("DecodeSampler", "GenerateSampler", "Sampling"),
    "lit_rlhf.rewards": ("MissingEOS", "RewardModel", "Rewards"),
    "lit_rlhf.stages": (
        *("GRPO", "PPO", "SFT", "RewardModeling"),
        *("Advantages", "Clip", "Correction", "Entropy", "KL", "Optim", "Shaping", "Updates", "Value"),
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
