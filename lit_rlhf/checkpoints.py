"""Checkpoint files: written whole or not at all, known when damaged, read without running anything in them.

The file is what ``torch.save`` writes, a zip archive, and every member of an archive carries its CRC-32. ``torch.load``
does not look at it; ``read`` does. So the checksum needs no second file, which a kill could part from the first, and
checkpoints that Lightning or torch wrote are checked as well.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

META = "meta.ckpt"  # in the folder of a checkpoint that was written in parts
PARTIAL = ".partial"  # ends the name under which a file is written before it gets its own
GLOBAL = re.compile(r"GLOBAL (\S+)")


class CheckpointError(Exception):
    """What is wrong with a checkpoint, and what to do."""


def write(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint so that a kill, a crash or a full disk at any moment leaves what stood at ``path`` before.

    It is written beside its place, flushed to the disk and renamed, and then the folder is flushed.

    Args:
        checkpoint: what ``torch.save`` can write.
        path: where to; a link there is replaced, and what it points to stays.

    Raises:
        OSError: no space, no permission, …; nothing new is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # torch's writer may answer the system's error with one of its own, about the file's place.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    flush(path.parent)


def link(target: str | os.PathLike[str], place: str | os.PathLike[str]) -> None:
    """Make ``place`` a relative link to ``target`` in one step: at every moment there is a link, the old or the new.

    Args:
        target: the file that is meant.
        place: the link; a copy where the system has no links.

    Raises:
        OSError: no space, no permission, ….
    """
    target, place = Path(target), Path(place)
    partial = place.with_name(f".{place.name}{PARTIAL}")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    try:
        partial.symlink_to(os.path.relpath(target, place.parent))
    except OSError:  # Windows wants a permission for links
        shutil.copy(target, partial)
    if place.is_dir() and not place.is_symlink():  # a sharded checkpoint's copy
        shutil.rmtree(place)
    os.replace(partial, place)
    flush(place.parent)


def flush(folder: Path) -> None:
    """Have the disk remember the names in a folder; some systems cannot be asked."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: every byte's checksum first, then tensors and plain values, no other objects.

    Args:
        path: the file.
        mmap: map the file in place of reading it, to look at a part of it.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: cut short, changed, no checkpoint, or one that holds objects, which could run code.
    """
    path = Path(path)
    if not path.is_file():
        what = f"is a folder without {META}: none in parts, or not all of one" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"checkpoint {path} {what}")
    about = path.stat()
    if fault := _fault(str(path.resolve()), about.st_mtime_ns, about.st_size):
        raise CheckpointError(f"{path} {fault}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        names = ", ".join(dict.fromkeys(GLOBAL.findall(str(error)))) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and plain values ({names}). Opening such a file can run code of whoever "
            "made it, so it is refused; the stages of lit_rlhf write none."
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise CheckpointError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    return found


@lru_cache(maxsize=1024)  # a file a process
def _fault(path: str, changed: int, size: int) -> str:
    """What is wrong with the bytes of a file; empty if nothing. ``changed`` and ``size`` tell its versions apart."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
            return f"is damaged: the checksum of {member} is wrong" if member else ""
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"is damaged: {error}"
    with open(path, "rb") as file:
        begins_as_one = file.read(2) == b"PK"
    if begins_as_one or not size:
        return f"is cut short: it ends after {size} bytes, before its table of contents"
    return "is no checkpoint that torch.save wrote; a plain pickle can run code when opened, and is not opened"


def newest(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The checkpoints in some folders, those written last first; links and what a kill left unfinished are none.

    Args:
        folders: where to look; one that is not there holds none.
    """
    found = [path for folder in folders for path in Path(folder).glob("*.ckpt") if not path.is_symlink()]
    whole = [path for path in found if path.is_file() or (path / META).is_file()]
    return sorted(whole, key=lambda path: -path.stat().st_mtime_ns)


def sweep(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Remove what killed runs left half written; what was touched within the hour may be under way in a live one.

    Args:
        folders: where checkpoints are.
    """
    for folder in folders:
        for partial in Path(folder).glob(f".*.ckpt{PARTIAL}"):
            with contextlib.suppress(OSError):
                if time.time() - partial.lstat().st_mtime > 3600:
                    shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()


def last_good(files: Iterable[Path], read_one: Callable[[Path], Any]) -> tuple[Path | None, list[str]]:
    """The first checkpoint that can be read, and what is wrong with those before it.

    Args:
        files: newest first.
        read_one: reads one.
    """
    wrong = []
    for path in files:
        try:
            read_one(path)
        except CheckpointError as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong
