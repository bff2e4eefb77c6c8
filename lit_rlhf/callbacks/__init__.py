"""What watches a run: progress, speed, sample texts, checkpoints, the saved config, the exported folder.

Each also works in a Trainer that a user builds himself: ``Trainer(callbacks=[SampleTable(), ExportFolder("out")])``.
"""

from lit_rlhf.callbacks.checkpoint import Checkpoint
from lit_rlhf.callbacks.checkpoint_io import SafeCheckpointIO
from lit_rlhf.callbacks.config_wins import ConfigWins
from lit_rlhf.callbacks.export_folder import ExportFolder
from lit_rlhf.callbacks.predictions import Predictions
from lit_rlhf.callbacks.preemption import Preemption
from lit_rlhf.callbacks.progress import Progress
from lit_rlhf.callbacks.rank_watch import RankError, RankWatch
from lit_rlhf.callbacks.samples import SampleTable
from lit_rlhf.callbacks.saved_config import SavedConfig
from lit_rlhf.callbacks.tables import Tables
from lit_rlhf.callbacks.throughput import Throughput
from lit_rlhf.callbacks.wandb_logger import SafeWandbLogger

__all__ = [
    "Checkpoint",
    "ConfigWins",
    "ExportFolder",
    "Predictions",
    "Preemption",
    "Progress",
    "RankError",
    "RankWatch",
    "SafeCheckpointIO",
    "SafeWandbLogger",
    "SampleTable",
    "SavedConfig",
    "Tables",
    "Throughput",
]
