"""The YAML files that come with the package: where they are, and how a bare name finds one."""

from __future__ import annotations

from pathlib import Path

import lit_rlhf
from lit_rlhf.ranges import SettingError


def config_folder() -> Path:
    """Folder of the shipped configs: inside an installed package, beside it in a checkout."""
    package = Path(lit_rlhf.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def resolve_configs(args: list[str]) -> list[str]:
    """Point ``--config NAME`` at the shipped file of that name, unless a file of that name is here.

    Args:
        args: command-line arguments.
    """
    resolved = list(args)
    for i, arg in enumerate(args):
        flag, _, name = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        at = i if name else i + 1
        if at < len(args):
            name = name or args[at]
            shipped = config_folder() / name
            _check_text(Path(name))
            if not Path(name).exists() and shipped.is_file():
                resolved[at] = f"{flag}={shipped}" if at == i else str(shipped)
    return resolved


def _check_text(path: Path) -> None:
    try:
        if path.is_file():
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"config {path}: expected YAML as UTF-8 text ({error}); save it as UTF-8") from None


def configs() -> None:
    """List the configs that come with the package, and the folder they are in."""
    folder = config_folder()
    print(folder)
    for path in sorted(folder.glob("*.yaml")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"  {path.name:<22} {title}")
