"""Makes the pairs that reflow and distillation train on: noise, and what a trained flow makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from hfgen.counters import generator
from hfgen.data.flow_pairs import INFO_FILE, FlowPairs, PairsInfo, pairs_file, read_pairs_info, write_pairs_file
from hfgen.losses.reflow import straightness
from hfgen.pipelines.flow_conditions import ConditionArguments, FlowConditions, prepare_conditions
from hfgen.pipelines.flow_latents import flow_latent_shape
from hfgen.pipelines.flow_networks import TIME_UNITS
from hfgen.pipelines.rectified_flow import RectifiedFlowPipeline
from hfgen.training.batches import training_images
from hfgen.training.config import TrainingConfig
from hfgen.training.history import write_text
from hfgen.training.token_encoding import tokenizer_identity

_PAIRS_PER_FILE = 256
_NOISE, _LABEL = 0, 1
_OF_PAIRS = ("num_workers", "num_validation_images")  # flags of the data that pairs have a use for


def pair_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise (B, C, h, w) of some pairs; row i depends on (seed, index i) only."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, index, _NOISE)) for index in indices])


def pair_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Uniform classes (B,) of some pairs, likewise."""
    draws = [torch.randint(num_classes, (), generator=generator(seed, index, _LABEL)) for index in indices]
    return torch.stack(draws)


def pair_arguments(pipeline: RectifiedFlowPipeline, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch of pairs was made for, as an argument of the pipeline; empty for an unconditional flow."""
    column = {"class_labels": "label", "prompt": "caption", None: None}[pipeline.network.takes]
    return {} if column is None else {pipeline.network.takes: batch[column]}


@torch.no_grad()
def pair_conditions(pipeline: RectifiedFlowPipeline, batch: Mapping[str, Any], *, guided: bool) -> FlowConditions:
    """The inputs of the network for a batch of pairs, with the unconditional half if ``guided``."""
    return prepare_conditions(
        ConditionArguments(**pair_arguments(pipeline, batch)),
        pipeline.network,
        pipeline.text_encoders,
        pipeline.class_names,
        num_images=1,
        guided=guided and pipeline.network.takes is not None,
        device=pipeline.transformer.device,
    )


def flow_straightness(
    pipeline: RectifiedFlowPipeline, batch: Mapping[str, Any], *, guidance_scale: float, num_steps: int
) -> float:
    """The mean straightness, per element, of the paths from the noise of a batch of pairs; 0 if they are straight."""
    conditions = pair_conditions(pipeline, batch, guided=guidance_scale != 1)
    network, noise = pipeline.network, batch["noise"].to(pipeline.transformer.device)

    def velocity(points: Tensor, sigma: float) -> Tensor:
        return conditions.velocity(network, points, TIME_UNITS * sigma, guidance_scale)

    return straightness(velocity, noise, num_steps).mean().item() / noise[0].numel()


def first_captions(config: TrainingConfig, count: int) -> list[str]:
    """The captions of the first ``count`` images of the data set that a run names, or of all.

    Raises:
        ValueError: the data set has no captions, or no fixed order.
    """
    data = training_images(config)
    if isinstance(data, IterableDataset) or not data.has_captions:
        raise ValueError(
            f"--dataset {config.dataset} has no list of captions, which a flow that reads text needs: name a data set "
            "with captions that is not streamed."
        )
    return [data[0, index]["caption"] for index in range(min(count, len(data)))]


def check_data_flags(config: TrainingConfig, pipeline: RectifiedFlowPipeline) -> None:
    """Refuse flags of a data set for a flow that reads no text, whose pairs need none.

    Raises:
        ValueError: one of them differs from its default.
    """
    if pipeline.network.takes == "prompt":
        return
    fields = [field for field in dataclasses.fields(config) if field.metadata["group"] == "data"]
    given = [field.name for field in fields if getattr(config, field.name) != field.default]
    given = [name for name in given if name not in _OF_PAIRS]
    if given:
        reads = {"class_labels": "takes random classes", None: "takes no condition"}[pipeline.network.takes]
        flags = ", ".join(f"--{name} {getattr(config, name)}" for name in given)
        raise ValueError(f"{flags}: this flow {reads} and no data set is read; leave out what describes one.")


def make_pairs(
    pipeline: RectifiedFlowPipeline,
    folder: str | Path,
    *,
    num_pairs: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
    captions: Sequence[str] = (),
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> FlowPairs:
    """Write the pairs of a flow into a folder and open them; every process calls it.

    A class-conditional flow gets uniform classes, one that reads text the ``captions`` in turn. Files that are there
    already are kept, so that a run that was killed continues; the pairs do not depend on the number of processes.

    Args:
        pipeline: the flow, on the device of the process; its scheduler makes the steps.
        folder: of the pairs.
        num_pairs: how many.
        num_inference_steps: of the scheduler.
        guidance_scale: w, 1 is off. What learns from the pairs needs no guidance.
        accelerator: which process this is.
        captions: prompts.
        batch_size: pairs per call of the pipeline.
        seed: of the noise and the classes.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: the folder holds pairs of another flow or other settings, there are no captions for a flow that
            reads text, or the scheduler draws noise of its own.
    """
    network, scheduler, folder = pipeline.network, pipeline.scheduler, Path(folder)
    deterministic = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    if not deterministic or scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"Noise and image belong together only along the flow itself, which {type(scheduler).__name__} does not "
            "follow: give the pipeline a FlowMatchEulerDiscreteScheduler without stochastic_sampling."
        )
    if network.takes == "prompt" and not captions:
        raise ValueError("This flow reads text, but there are no captions: name a data set that has some.")
    identity = tokenizer_identity(pipeline.transformer, "")
    info = PairsInfo(
        num_pairs=num_pairs,
        pairs_per_file=_PAIRS_PER_FILE,
        shape=flow_latent_shape(network, pipeline.vae),
        has_captions=network.takes == "prompt",
        source={
            "network": identity.class_name,
            "weights": identity.weights,
            "scheduler": type(scheduler).__name__,
            "shift": float(scheduler.config.shift),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": float(guidance_scale),
            "guidance_channels": network.guidance_channels or network.channels,
            "seed": seed,
            "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest() if captions else "none",
        },
    )
    pending = [_open_folder(folder, info) if accelerator.is_main_process else None]
    blocks = [info.blocks()[number] for number in broadcast_object_list(pending)[0]]
    mine = blocks[accelerator.process_index :: accelerator.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=sum(map(len, mine)), desc="pairs", disable=not (progress and accelerator.is_main_process)) as bar:
        for block in mine:
            labels = torch.full((len(block),), -1)
            if network.takes == "class_labels":
                labels = pair_labels(seed, block, network.num_classes)
            texts = [captions[index % len(captions)] for index in block] if info.has_captions else None
            noise, samples = pair_noise(seed, block, info.shape), []
            for first in range(0, len(block), batch_size):
                part = slice(first, first + batch_size)
                arguments = pair_arguments(pipeline, {"label": labels[part], "caption": texts and texts[part]})
                samples.append(
                    pipeline(
                        **(arguments or {"num_images_per_prompt": len(noise[part])}),
                        latents=noise[part].to(accelerator.device),
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale if network.takes else 1.0,
                        output_type="latent",
                    ).images.cpu()
                )
                bar.update(len(samples[-1]))
            write_pairs_file(pairs_file(folder, info, block), noise, torch.cat(samples).float(), labels, texts)
    accelerator.wait_for_everyone()
    return FlowPairs(folder)


def _open_folder(folder: Path, info: PairsInfo) -> list[int]:
    """The numbers of the files that are not there yet."""
    if (folder / INFO_FILE).is_file():
        differences = read_pairs_info(folder).differences(info)
        if differences:
            raise ValueError(f"{folder} holds other pairs: {'; '.join(differences)}. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / INFO_FILE, info.to_json())
    blocks = info.blocks()
    return [number for number, block in enumerate(blocks) if not pairs_file(folder, info, block).is_file()]
