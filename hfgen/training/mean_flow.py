"""The settings of examples/train_mean_flow.py, and the data that they name (MeanFlow, arXiv 2505.13447)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hfgen.data.flow_pairs import FlowPairs
from hfgen.training.config import flag
from hfgen.training.latents import LatentTrainingConfig


@dataclass(kw_only=True)
class MeanFlowTrainingConfig(LatentTrainingConfig):
    """The settings of a run that trains a MeanFlow. The help text of each field is its documentation."""

    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices", group="optimisation")

    patch_size: int = flag(4, "side of a patch of pixels or latents", least=1)
    num_layers: int = flag(4, "transformer blocks", least=1)
    width: int = flag(128, "width of the model", least=1)
    num_heads: int = flag(4, "attention heads", least=1)
    class_dropout: float = flag(0.1, "probability of training an image without its class")

    loss: Literal["mean_flow", "trajectory_matching"] = flag("mean_flow", "MeanFlow, or the end of the trajectory")
    time_density: Literal["logit_normal", "uniform"] = flag("logit_normal", "density of both times of an interval")
    logit_mean: float = flag(-0.4, "mean of the normal distribution under logit_normal; below 0 favours data")
    logit_std: float = flag(1.0, "its standard deviation")
    equal_share: float = flag(0.75, "share of a batch whose interval is a point: plain flow matching")
    omega: float = flag(1.0, "guidance in training: weight of the velocity of the data")
    kappa: float = flag(0.5, "and of the model's own prediction for the class; 1 and 0 are no guidance")
    guidance_interval: tuple[float, ...] = flag((0.0, 1.0), "first and last time with guidance; 1 is noise")
    norm_power: float = flag(1.0, "power p of the adaptive weight; 0 is the plain squared error")
    norm_eps: float = flag(0.01, "what is added to the squared error in that weight")
    trajectory_steps: int = flag(1, "Euler steps of --loss trajectory_matching", least=1)
    pairs: str | None = flag(
        None, "folder of pairs of noise and image to train on, made by examples/reflow.py for the classes of --dataset"
    )
    num_inference_steps: int = flag(1, "steps of the validation samples", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("class_dropout", "equal_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be between 0 and 1.")
        if not (self.omega > 0 and 0 <= self.kappa < 1):
            raise ValueError(f"--omega is {self.omega} and --kappa {self.kappa}; expected above 0 and in [0, 1).")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"--guidance_interval is {interval}; expected two times in [0, 1] such as 0,0.8.")
        if not (self.logit_std > 0 and self.norm_power >= 0 and self.norm_eps > 0):
            raise ValueError(
                f"--logit_std is {self.logit_std}, --norm_power {self.norm_power} and --norm_eps {self.norm_eps}; "
                "they must be positive, --norm_power may be 0."
            )
        guided = self.loss == "mean_flow" and not math.isclose(self.omega + self.kappa, 1)
        if guided and self.class_dropout == 0:
            raise ValueError(
                "--class_dropout 0 trains no unconditional class, which guidance compares with: give --omega 1 "
                "--kappa 0, or others with a sum of 1."
            )


def questionable_settings(config: MeanFlowTrainingConfig) -> list[str]:
    """What is allowed but spoils the result."""
    trajectory, steps = config.loss == "trajectory_matching", config.trajectory_steps
    findings = {
        "--loss trajectory_matching with noise and data paired at random has its minimum at the mean of the data, so "
        "all samples of a class collapse to one blurred image: give --pairs, or use --loss mean_flow": (
            trajectory and config.pairs is None
        ),
        f"the model learns to sample in the {steps} steps of --trajectory_steps, not in the "
        f"{config.num_inference_steps} of --num_inference_steps": trajectory and config.num_inference_steps != steps,
    }
    return [message for message, applies in findings.items() if applies]


def class_pairs(folder: str, sample_shape: tuple[int, int]) -> FlowPairs:
    """The pairs of a class-conditional flow.

    Args:
        folder: written by examples/reflow.py.
        sample_shape: channels and side of what the run trains on.

    Raises:
        ValueError: pairs without classes or of another shape.
    """
    pairs, (channels, side) = FlowPairs(folder), sample_shape
    if pairs[0]["label"] < 0:
        raise ValueError(f"--pairs {folder} has no classes: make them with a class-conditional flow.")
    if tuple(pairs.info.shape) != (channels, side, side):
        raise ValueError(
            f"--pairs {folder} has samples of shape {tuple(pairs.info.shape)}, this run of {(channels, side, side)}: "
            "give the --resolution and --vae of the flow that made them."
        )
    return pairs
