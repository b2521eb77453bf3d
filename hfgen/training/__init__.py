"""The engine that all training scripts share; the method stays in the script."""

from hfgen.training.batches import Draws, training_images, validation_images
from hfgen.training.code_cache import CachedCodes
from hfgen.training.config import REQUIRED, TrainingConfig, flag, parse_config
from hfgen.training.task import Phase, Task, Validation, frozen, unwrap
from hfgen.training.trainer import Trainer

__all__ = [
    "REQUIRED",
    "CachedCodes",
    "Draws",
    "Phase",
    "Task",
    "Trainer",
    "TrainingConfig",
    "Validation",
    "flag",
    "frozen",
    "parse_config",
    "training_images",
    "unwrap",
    "validation_images",
]
