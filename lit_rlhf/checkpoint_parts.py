"""Checkpoints in parts: a folder to which each process writes the rows of each tensor that it holds.

::

    step=400.ckpt/
      00000-of-00002.ckpt     tensors by place, {"state_dict/policy.lm_head.weight": {"first": 0, "rows": …}}
      00001-of-00002.ckpt
      meta.ckpt               everything else; {"sharded": place} stands where a tensor was taken out

Each file is written, checked and read as `lit_rlhf.checkpoints` does it. The folder gets its name when all of it is
there. Any number of processes can go on from it: each reads the rows that it holds now.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.checkpoints import META, PARTIAL, CheckpointError, flush, read, write
from lit_rlhf.models.sharding import own_rows


class Pieces:
    """A tensor that stands in several files, in the order of its rows.

    Args:
        pieces: number of its first row, and the rows, of each.
    """

    def __init__(self, pieces: list[tuple[int, Tensor]]) -> None:
        self.pieces = sorted((first, rows) for first, rows in pieces if len(rows))

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size([sum(len(rows) for _, rows in self.pieces), *self.pieces[0][1].shape[1:]])

    def __getitem__(self, wanted: slice) -> Tensor:
        """Rows ``wanted``; only the files that hold them are looked at."""
        start, stop, _ = wanted.indices(self.shape[0])
        found = [rows[max(0, start - first) : max(0, stop - first)] for first, rows in self.pieces]
        return torch.cat(found)


def write_own(tree: Any, folder: Path, rank: int, world: int) -> Any:
    """Write this process's part of a checkpoint, into the folder under its unfinished name.

    Args:
        tree: the checkpoint: dicts and lists with tensors in them, sharded ones among them.
        folder: what the checkpoint will be called.
        rank: of this process.
        world: how many there are.

    Returns:
        The checkpoint with a note in place of each sharded tensor, for `finish`.
    """
    taken: dict[str, dict[str, Any]] = {}

    def take(value: Any, place: str) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        rows, first = own_rows(value)
        taken[place] = {"first": first, "rows": rows.detach().cpu()}
        return {"sharded": place}

    rest = each(tree, take)
    write({"state_dict": taken}, unfinished(folder) / f"{rank:05d}-of-{world:05d}.ckpt")
    return rest


def begin(folder: Path) -> None:
    """Make an empty folder under the unfinished name; one process does, before any writes its part."""
    discard(folder)
    unfinished(folder).mkdir(parents=True)


def discard(folder: Path) -> None:
    """Remove what was written under the unfinished name."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def finish(rest: dict[str, Any], folder: Path, world: int) -> None:
    """Write what is in no part and give the folder its name; one process does, after all have written theirs."""
    write({**rest, "parts": world}, unfinished(folder) / META)
    if folder.is_dir() and not folder.is_symlink():
        outdated = unfinished(folder.with_name(f"outdated-{folder.name}"))  # `sweep` knows it
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(folder, outdated)
        os.replace(unfinished(folder), folder)
        shutil.rmtree(outdated, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)
        os.replace(unfinished(folder), folder)
    flush(folder.parent)


def unfinished(folder: Path) -> Path:
    """What a folder is called until all of it is there."""
    return folder.with_name(f".{folder.name}{PARTIAL}")


def is_in_parts(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint in parts."""
    return (Path(path) / META).is_file()


def read_parts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint in parts: all files are checked, the parts mapped; a sharded tensor is a `Pieces`.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    folder = Path(folder)
    meta = read(folder / META)
    world = meta.pop("parts")
    names = [folder / f"{rank:05d}-of-{world:05d}.ckpt" for rank in range(world)]
    if missing := [path.name for path in names if not path.is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: copy the whole folder, every process wrote a part")
    parts = [read(path, mmap=True)["state_dict"] for path in names]

    def put_back(value: Any, place: str) -> Any:
        if not (isinstance(value, dict) and set(value) == {"sharded"}):
            return value
        return Pieces([(part[value["sharded"]]["first"], part[value["sharded"]]["rows"]) for part in parts])

    found: dict[str, Any] = each(meta, put_back)
    return found


def read_any(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, a file or a folder of parts, every tensor whole.

    Args:
        path: of the checkpoint.
        mmap: as in `read`.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or holds objects.
    """
    if not is_in_parts(path):
        return read(path, mmap=mmap)
    found: dict[str, Any] = each(read_parts(path), lambda value, _: value[:] if isinstance(value, Pieces) else value)
    return found


def map_any(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a checkpoint, a file or a folder of parts, and map it into memory; what is in parts is `Pieces`.

    Args:
        path: of the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or holds objects.
    """
    return read_parts(path) if is_in_parts(path) else read(path, mmap=True)


def each(tree: Any, change: Callable[[Any, str], Any], place: str = "") -> Any:
    """The same dicts and lists, with every value, or dict that is one, as ``change(value, place)`` gives it."""
    changed = change(tree, place)
    if changed is not tree:
        return changed
    if isinstance(tree, dict):
        return {key: each(value, change, f"{place}/{key}".lstrip("/")) for key, value in tree.items()}
    if isinstance(tree, list):
        return [each(value, change, f"{place}/{i}") for i, value in enumerate(tree)]
    return tree
