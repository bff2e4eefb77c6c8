"""Which checkpoint ``--ckpt_path`` means."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.checkpoints import CheckpointError, last_good, newest, read, sweep


def folders_of(trainer: Trainer) -> list[Path]:
    """Where the checkpoints of this run and of those before it under the same root are.

    Args:
        trainer: as configured; each run has a folder ``version_N`` of its own.
    """
    given = [
        Path(one.dirpath) for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.dirpath
    ]
    if given:
        return given
    logger = trainer.loggers[0] if trainer.loggers else None
    root = Path(trainer.default_root_dir)
    if logger is not None and logger.save_dir is not None:
        root = Path(logger.save_dir) / str(logger.name or "")
    return [root / "checkpoints", *sorted(root.glob("version_*/checkpoints"))]


def to_resume_from(asked: str | None, folders: Iterable[Path]) -> str | None:
    """The file to load: checked, so that a damaged one is known before anything is loaded.

    ``last`` is the newest checkpoint of any run under this root that can be read, and nothing where there is none, so
    that the first start and every later one are the same command.

    Args:
        asked: ``--ckpt_path``.
        folders: where this run's checkpoints are looked for.

    Raises:
        CheckpointError: the named file cannot be read, or none can.
        FileNotFoundError: no such file.
    """
    if asked is None or asked in ("best", "hpc") or "://" in asked or asked.startswith("registry:"):
        return asked
    path = Path(asked)
    if (path / ".metadata").is_file():  # a sharded one: its strategy reads it
        return asked
    if asked != "last" and path.name != "last.ckpt":
        return _named(path)
    if asked == "last":
        folders = list(folders)
        files = newest(folders)
        sweep(folders)
    else:  # the link, what it points to
        files = [file for file in dict.fromkeys([path.resolve(), *newest([path.parent])]) if file.is_file()]
    good, wrong = last_good(files)
    if good is None and wrong:
        raise CheckpointError(f"none of {len(wrong)} checkpoint(s) can be read: {'; '.join(wrong)}")
    if good is None and asked != "last":
        raise FileNotFoundError(f"checkpoint {asked} is not there, and no other in its folder")
    if good is None:
        rank_zero_info(f"ckpt_path=last: no checkpoint yet in {', '.join(map(str, folders))}; starting anew")
        return None
    for text in wrong:
        rank_zero_warn(f"{text}. Going back to the last good checkpoint, {good}")
    return str(good)


def _named(path: Path) -> str:
    try:
        read(path, mmap=True)
    except CheckpointError as error:
        good, _ = last_good(file for file in newest([path.parent]) if file != path)
        hint = f"the newest good one beside it: --ckpt_path {good}" if good else "there is no good one beside it"
        raise CheckpointError(f"{error}\n  {hint}") from None
    return str(path)
