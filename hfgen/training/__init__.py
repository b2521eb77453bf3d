"""The engine that all training scripts share; the method stays in the script."""

from hfgen.training.batches import Draws, training_images, validation_images
from hfgen.training.config import REQUIRED, TrainingConfig, flag, parse_config
from hfgen.training.flag_sources import load_model, loading_flag
from hfgen.training.script import script
from hfgen.training.task import Phase, Task, Validation, frozen, unwrap
from hfgen.training.token_encoding import batch_codes, batch_latents
from hfgen.training.tokens import CacheConfig, TokenTrainingConfig, build_cache, training_tokens
from hfgen.training.trainer import Trainer

__all__ = [
    "REQUIRED",
    "CacheConfig",
    "Draws",
    "Phase",
    "Task",
    "TokenTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "Validation",
    "batch_codes",
    "batch_latents",
    "build_cache",
    "flag",
    "frozen",
    "load_model",
    "loading_flag",
    "parse_config",
    "script",
    "training_images",
    "training_tokens",
    "unwrap",
    "validation_images",
]
