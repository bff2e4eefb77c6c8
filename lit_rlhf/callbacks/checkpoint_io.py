"""How every checkpoint of a run is written and read, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.checkpoint_parts import read_any
from lit_rlhf.checkpoints import write


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoint files, made safe against kills, full disks and foreign files.

    Lightning writes into the system's temporary folder and moves the file, which is a copy where that is another
    disk, flushes nothing and needs the checkpoint in memory twice more. ``Checkpoint`` puts this in its place; a
    Trainer without ``Checkpoint`` takes it as ``Trainer(plugins=[SafeCheckpointIO()])``. Addresses of object stores
    (``s3://…``) stay Lightning's.
    """

    def __init__(self) -> None:
        self._failures: list[str] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one, whole or not at all.

        Raises:
            OSError: it cannot be written, and nobody is forgiving.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write(checkpoint, path)
        except OSError as error:
            self.report(path, error)

    def report(self, path: Any, error: OSError) -> None:
        """Note a save that failed, or raise its error where nobody is forgiving."""
        if self._failures is None:
            raise error
        self._failures.append(f"{path}: {error.strerror or error} (errno {error.errno})")

    @contextmanager
    def forgiving(self) -> Iterator[list[str]]:
        """Within, a save that fails is noted in the list, so that all processes meet at the barrier after it."""
        self._failures = []
        try:
            yield self._failures
        finally:
            self._failures = None

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one: checked, and tensors and plain values only, unless ``weights_only=False`` asks for the rest.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: damaged, foreign or no checkpoint.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only is not False)
        return read_any(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one; where that is refused, say so and go on."""
        try:
            super().remove_checkpoint(path)
        except OSError as error:
            rank_zero_warn(f"the old checkpoint {path} cannot be removed: {error}")
