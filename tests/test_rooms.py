"""The rooms of the house: imports point one way, heavy libraries stay where they belong, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_rlhf

PACKAGE = Path(lit_rlhf.__file__).parent

# What each room may import of the other rooms; every room may import itself.
BELOW_STAGES = {
    *("batch", "checkpoints", "checkpoint_parts", "ranges", "objectives", "models", "rollout", "rewards", "data")
}
ROOMS: dict[str, set[str]] = {
    "__init__": BELOW_STAGES | {"stages"},
    "batch": set(),
    "checkpoints": set(),
    "checkpoint_parts": {"checkpoints", "models"},
    "strategies": {"checkpoint_parts", "models"},
    "ranges": set(),
    "objectives": {"batch"},
    "models": {"batch", "objectives", "ranges"},
    "data": {"batch", "models", "ranges"},
    "rollout": {"batch", "objectives", "models", "ranges"},
    "rewards": {"batch", "objectives", "models"},
    "metrics": {"batch", "objectives"},
    "stages": BELOW_STAGES | {"metrics", "strategies"},
    "callbacks": {"batch", "checkpoints", "checkpoint_parts", "stages"},
    "export": BELOW_STAGES | {"stages"},
    "commands": BELOW_STAGES | {"__init__", "stages", "callbacks", "export"},
    "demo": BELOW_STAGES | {"stages", "callbacks", "export", "metrics"},
    "cli": BELOW_STAGES | {"__init__", "stages", "callbacks", "export", "commands", "demo"},
}
# Third-party libraries that only the named rooms may import.
LIBRARIES: dict[str, set[str]] = {
    "lightning": {"strategies", "stages", "data", "callbacks", "export", "commands", "demo", "cli"},
    "transformers": {"models", "rollout", "data", "demo"},
    "tokenizers": {"demo"},
    "peft": {"models"},
    "liger_kernel": {"models"},
    "datasets": {"data", "demo"},
    "wandb": {"callbacks"},
    "jsonargparse": {"commands", "cli"},
    "matplotlib": {"demo"},
    "vaderSentiment": {"rewards"},
    "requests": {"rewards"},
}
ONLY_TORCH = {"batch", "checkpoints", "objectives", "ranges"}


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in ``source``, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def faults(source: str, module: str) -> list[str]:
    """What ``module`` (``lit_rlhf.objectives.kl``) imports against the rule of its room."""
    room = [*module.split("."), "__init__"][1]
    found = []
    for line, name in imported(source, module):
        library, *rest = name.split(".")
        if library == "lit_rlhf":
            target = rest[0] if rest and rest[0] in ROOMS else "__init__"
            if target not in ROOMS[room] | {room}:
                found.append(f"{module}:{line} imports {name}: {room} may not import {target}")
        elif room in ONLY_TORCH and library != "torch" and library not in sys.stdlib_module_names:
            found.append(f"{module}:{line} imports {name}: {room} imports torch only")
        elif room not in LIBRARIES.get(library, {room}):
            found.append(f"{module}:{line} imports {name}: {library} belongs to {sorted(LIBRARIES[library])}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts), path


def test_imports_point_one_way() -> None:
    found = [fault for module, path in modules() for fault in faults(path.read_text(encoding="utf-8"), module)]
    assert not found, "\n".join(found)


def test_every_room_is_known() -> None:
    rooms = {module.split(".")[1] for module, _ in modules()}
    assert rooms <= set(ROOMS), f"a room without a rule: {rooms - set(ROOMS)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lit_rlhf.objectives.kl", "import lightning"),
        ("lit_rlhf.objectives.kl", "from numpy import array"),
        ("lit_rlhf.objectives.kl", "def late():\n    from lit_rlhf.models.causal import load_causal"),
        ("lit_rlhf.batch", "from .objectives import kl"),
        ("lit_rlhf.models.causal", "from ..stages.ppo import PPO"),
        ("lit_rlhf.stages.ppo", "from peft import LoraConfig"),
        ("lit_rlhf.rewards.rules", "from lit_rlhf import PPO"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(faults(source, module)) == 1


def test_public_names_can_be_imported() -> None:
    for name in lit_rlhf.__all__:
        assert getattr(lit_rlhf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'DPO2'"):
        _ = lit_rlhf.DPO2


def test_import_brings_no_heavy_library() -> None:
    """``import lit_rlhf`` loads nothing heavy, so it costs well under a second beyond Python itself."""
    heavy = sorted([*LIBRARIES, "torch"])
    program = (
        "import sys, time; start = time.perf_counter(); import lit_rlhf; took = time.perf_counter() - start; "
        f"print([name for name in {heavy} if name in sys.modules], took < 1)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[] True", result.stdout + result.stderr
