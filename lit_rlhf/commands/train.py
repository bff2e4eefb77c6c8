"""fit, validate, test and predict: LightningCLI with this project's defaults."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

import lit_rlhf.data
import lit_rlhf.stages  # noqa: F401 - classes that were imported can be named without their module
from lit_rlhf.callbacks import (
    Checkpoint,
    ConfigWins,
    ExportFolder,
    Predictions,
    Preemption,
    Progress,
    RankWatch,
    SafeWandbLogger,
    SampleTable,
    SavedConfig,
    Tables,
    Throughput,
)
from lit_rlhf.commands.configs import resolve_configs
from lit_rlhf.commands.parser import FriendlyParser, check_groups
from lit_rlhf.commands.resume import folders_of, to_resume_from
from lit_rlhf.models import without_weights

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 1,  # in RL a step is a whole rollout
    "num_sanity_val_steps": 0,  # validation in RL generates text: minutes before the first step
    "inference_mode": False,  # its tensors cannot be used in sharded networks
    "callbacks": [ConfigWins(), Predictions(), Tables(), Throughput()],
}
# Sections of their own: a second YAML's trainer.callbacks replaces the first one's, these stay.
SECTIONS: dict[str, type[Callback]] = {
    "ranks": RankWatch,
    "checkpoint": Checkpoint,
    "preemption": Preemption,
    "progress": Progress,
    "samples": SampleTable,
    "export": ExportFolder,
}
SECTION_DEFAULTS = {
    "checkpoint.every_n_train_steps": 100,
    "checkpoint.save_last": "link",
    "checkpoint.filename": "{step}",  # an epoch says little in RL
}
# What Lightning says of every run of this kind, true or not, and nobody can act on.
NOISE = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*is not resumable.*",
    ".*callbacks used to create the checkpoint need to be provided.*",  # their intervals may change
    ".*The dirpath has changed from.*",
    ".*in eval mode at the start of training.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


class TrainParser(FriendlyParser, LightningArgumentParser):
    """Lightning's parser with short errors."""


class CLI(LightningCLI):
    """LightningCLI that keeps the user's config on resume and always writes a CSV log."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a section for each callback that no run should lose."""
        for name, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, name)
        parser.set_defaults(SECTION_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; Lightning's own method warns about arguments that are given as a list."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Do nothing, so that the user's config wins over a checkpoint's hyperparameters."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Have a checkpoint that is to be loaded looked at first."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        asked = kwargs.get("ckpt_path")
        if asked is None and subcommand == "fit" and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            asked = "last"  # SLURM started this job again
        kwargs["ckpt_path"] = to_resume_from(asked, folders_of(self.trainer))
        return kwargs

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            self._parser(self.subcommand).error(f"seed_everything: {error}", error)

    def instantiate_classes(self) -> None:
        """Build stage, data and Trainer; a setting that one of them refuses is the user's to change."""
        try:
            for section in ("model", "data"):
                given = self._get(self.config, section)
                if given is None:  # that one is missing, the parser says
                    continue
                check_groups(section, given.class_path, vars(given.get("init_args") or {}))
            with without_weights() if self._shards() else nullcontext():
                super().instantiate_classes()
        except ValueError as error:
            self._parser(self.subcommand).error(str(error), error)

    def _shards(self) -> bool:
        """Whether the strategy will shard the networks: then no process loads one whole."""
        strategy = self._get(self.config, "trainer.strategy")
        kind = getattr(strategy, "class_path", strategy)
        return isinstance(kind, str) and kind.rpartition(".")[2] in ("fsdp2", "FSDP2Strategy")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with a CSV log, first among the loggers: its folder is the run's."""
        settings = self._get(self.config_init, "trainer")
        if Path(settings.default_root_dir).is_file():
            raise ValueError(f"trainer.default_root_dir is {settings.default_root_dir}, which is a file: name a folder")
        try:
            return super().instantiate_trainer(logger=loggers(settings.logger, settings.default_root_dir), **kwargs)
        except TypeError as error:  # Lightning's word for some wrong values
            raise ValueError(f"trainer: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the sections that the Trainer's own switches, or the user's callbacks, stand against."""
        own = config.get("callbacks") or []
        given = own if isinstance(own, list) else [own]
        if config.get("enable_checkpointing") is False:
            callbacks = [one for one in callbacks if not isinstance(one, ModelCheckpoint)]
        if config.get("enable_progress_bar") is False or any(isinstance(one, ProgressBar) for one in given):
            callbacks = [one for one in callbacks if not isinstance(one, ProgressBar)]
        return super()._instantiate_trainer(config, callbacks)


def loggers(chosen: Logger | list[Logger] | bool | None, folder: str) -> list[Logger] | bool:
    """The loggers of a run: a CSV log and whatever was asked for; none only where ``false`` was asked for.

    W&B's is one that cannot end the run.

    Args:
        chosen: ``trainer.logger`` as configured.
        folder: ``trainer.default_root_dir``; each run gets a folder ``version_N`` in it.
    """
    if chosen is False:
        return False
    others = chosen if isinstance(chosen, list) else [chosen] if isinstance(chosen, Logger) else []
    others = [SafeWandbLogger.of(one) if type(one) is WandbLogger else one for one in others]
    if any(isinstance(logger, CSVLogger) for logger in others):
        return sorted(others, key=lambda logger: not isinstance(logger, CSVLogger))
    return [CSVLogger(folder, name="", flush_logs_every_n_steps=10), *others]


def train(args: list[str]) -> None:
    """Run fit, validate, test or predict.

    Args:
        args: the command and its arguments.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    CLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SavedConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=42,
        parser_class=TrainParser,
        auto_configure_optimizers=False,  # a stage builds its own
        load_from_checkpoint_support=False,  # a stage saves its arguments itself, as plain values
        parser_kwargs={"prog": "lit-rlhf"},
        args=resolve_configs(args),
    )
