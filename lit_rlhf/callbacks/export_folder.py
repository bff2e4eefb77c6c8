"""A fit ends with a Hugging Face folder, which the next stage's config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info


class ExportFolder(Callback):
    """Export the trained network as a Hugging Face folder when the fit ends.

    Args:
        folder: where to; ``export`` in the run's own folder if null.
        merge: merge adapters into the weights; false keeps them as an adapter folder.
    """

    def __init__(self, folder: str | None = None, merge: bool = True) -> None:
        if folder is not None and Path(folder).is_file():
            raise ValueError(f"export.folder is {folder}, which is a file: name a folder")
        self.folder, self.merge = folder, merge
        self._is_done = False

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the folder."""
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = self.folder or str(Path(trainer.log_dir or trainer.default_root_dir) / "export")
        pl_module.export(folder, merge=self.merge)
        rank_zero_info(f"exported: {folder}")
        self._is_done = True

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write it where a run was killed after its last step: started again it has nothing to train, only this."""
        if stage == "fit" and not self._is_done and trainer.ckpt_path is not None and trainer.fit_loop.skip:
            self.on_train_end(trainer, pl_module)
