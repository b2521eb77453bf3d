"""A tiny instance of every public class, for the suites that all classes pass.

A new public class needs an entry here: ``tests/contracts/test_exports.py`` fails without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import hfgen
from hfgen.counters import generator
from support import text_encoders

PATCH_NUMS = (1, 2, 4)
NUM_TOKENS = sum(side**2 for side in PATCH_NUMS)


@dataclass(frozen=True)
class ModelCase:
    """A model and what can be asked of it.

    Attributes:
        arguments: of the constructor; nothing random in training mode.
        inputs: batch size -> arguments of ``forward``; the first rows do not depend on the batch size.
        smooth: a float output that depends continuously on the weights, of (model, forward's inputs): no codes on
            the way, so that it can be compared over dtypes.
        entry_points: for each public method beside ``forward`` that runs weights, a call of (model, inputs).
        float32_outputs: outputs that are float32 whatever the dtype of the model.
        lora_targets: modules that adapters are trained for; those of attention unless the model has none.
    """

    arguments: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]
    smooth: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    entry_points: Mapping[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = field(default_factory=dict)
    float32_outputs: frozenset[str] = frozenset({"loss"})
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class QuantizerCase:
    """A quantizer; ``latents``: batch size -> its input."""

    arguments: Mapping[str, Any]
    latents: Callable[[int], Tensor]


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline.

    Attributes:
        components: constructor argument -> name of a public model.
        arguments: the other arguments of the constructor, which a pipeline can do without.
        condition: number of images -> arguments of ``__call__`` that ask for so many different images.
        single: arguments of ``__call__`` for the first of these conditions, not in a list.
        steps: sampling steps of a call.
        changeable: tensors that a callback may replace.
        read_directly: parts of components whose weights a call reads without the component's hooks, as
            ``"component.part"``; the pipeline itself brings them to its device.
        schedulers: constructor argument -> name of a public scheduler, or of one of diffusers.
        changes: constructor argument -> what differs in the model's arguments from those of its own case.
        tokenizers: constructor argument -> function that makes a text tokenizer.
        settings: those of ``arguments`` without which a call needs more arguments.
    """

    components: Mapping[str, str]
    arguments: Mapping[str, Any]
    condition: Callable[[int], dict[str, Any]]
    single: Mapping[str, Any]
    steps: int
    changeable: tuple[str, ...]
    read_directly: tuple[str, ...] = ()
    schedulers: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Callable[[], PreTrainedTokenizerBase]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def draws(*shape: int) -> Tensor:
    """Standard normal numbers; row i depends on i only."""
    return torch.stack([torch.randn(shape[1:], generator=generator(row)) for row in range(shape[0])])


def labels(batch: int, num_classes: int) -> Tensor:
    return torch.arange(batch) % num_classes


# The sizes of a masked-token generator for the tiny MaskGITVQGAN.
MASKED_SIZES = {
    "num_codes": 16,
    "num_tokens": 16,
    "num_classes": 5,
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "class_dropout": 0.0,
}


def masked_inputs(batch: int) -> dict[str, Tensor]:
    """Codes of which every third is masked."""
    codes = torch.stack([torch.randint(16, (16,), generator=generator(row)) for row in range(batch)])
    codes[:, ::3] = 16
    return {"codes": codes, "class_labels": labels(batch, 6)}


# Text, then the special ids; an image has four tokens.
TRANSFUSION_IDS = {
    "vocab_size": 16,
    "bos_token_id": 10,
    "eos_token_id": 11,
    "boi_token_id": 12,
    "eoi_token_id": 13,
    "pad_token_id": 14,
    "image_token_id": 15,
}


def transfusion_inputs(batch: int) -> dict[str, Tensor]:
    """Two words, an image and a word; padding at the end."""
    words = torch.stack([torch.randint(10, (3,), generator=generator(row)) for row in range(batch)])
    ids = torch.tensor([10, 0, 0, 12, 15, 15, 15, 15, 13, 0, 11, 14]).repeat(batch, 1)
    ids[:, [1, 2, 9]] = words
    return {"input_ids": ids, "latents": draws(batch, 2, 4, 4), "timesteps": torch.linspace(900, 300, 4)[:batch]}


def transfusion_flow_inputs(batch: int) -> dict[str, Tensor]:
    """Two words, an image with its grid in words and one word; padding at the end."""
    words = torch.stack([torch.randint(10, (3,), generator=generator(row)) for row in range(batch)])
    ids = torch.tensor([10, 0, 0, 15, 66, 60, 66, 13, -2, -2, -2, -2, 14, 0, 11, -1]).repeat(batch, 1)
    ids[:, [1, 2, 13]] = words
    return {"input_ids": ids, "latents": draws(batch, 3, 2, 2), "timesteps": torch.linspace(900, 300, 4)[:batch]}


def _transfusion_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return torch.cat([output.logits.flatten(1), output.sample.flatten(1).float()], dim=1)


def _vqvae_latents(batch: int) -> Tensor:
    return draws(batch, 8, 4, 4)


MODELS: dict[str, ModelCase] = {
    "DiT": ModelCase(
        arguments={
            "sample_size": 8,
            "in_channels": 3,
            "num_classes": 5,
            "num_layers": 2,
            "width": 16,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "has_duration": True,
        },
        inputs=lambda batch: {
            "hidden_states": draws(batch, 3, 8, 8),
            "timestep": torch.linspace(1, 0.5, 4)[:batch],
            "class_labels": labels(batch, 6),
            "duration": torch.linspace(0.25, 0.5, 4)[:batch],
        },
        smooth=lambda model, inputs: model(**inputs).sample,
    ),
    "ImageBert": ModelCase(
        arguments={**MASKED_SIZES, "dropout": 0.0, "attention_dropout": 0.0},
        inputs=lambda batch: masked_inputs(batch),
        smooth=lambda model, inputs: model(**inputs).logits,
        entry_points={"forward_positions": lambda model, inputs: _first_positions(model, inputs)},
        float32_outputs=frozenset({"logits"}),
        lora_targets=("query", "key", "value"),  # BERT is that of transformers
    ),
    "MaskGITTransformer": ModelCase(
        arguments={**MASKED_SIZES, "unconditional_class": True, "dropout": 0.0},
        inputs=lambda batch: masked_inputs(batch),
        smooth=lambda model, inputs: model(**inputs).logits,
        entry_points={
            "forward_positions": lambda model, inputs: _first_positions(model, inputs),
            "forward_vocabulary": lambda model, inputs: model.forward_vocabulary(**inputs),
        },
        float32_outputs=frozenset({"logits"}),
        lora_targets=("query", "key", "value"),
    ),
    "MaskGITVQGAN": ModelCase(
        arguments={
            "num_codes": 16,
            "latent_channels": 8,
            "base_channels": 4,
            "channel_multipliers": (1, 2),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "image_size": 8,
        },
        inputs=lambda batch: {"pixels": draws(batch, 3, 8, 8).clamp(-1, 1)},
        smooth=lambda model, inputs: model.decode(_vqvae_latents(len(inputs["pixels"]))).sample,
        entry_points={
            "encode": lambda model, inputs: model.encode(**inputs),
            "features": lambda model, inputs: model.features(**inputs),
            "decode": lambda model, inputs: model.decode(_vqvae_latents(1)),
            "decode_codes": lambda model, inputs: model.decode_codes(torch.zeros(1, 16, dtype=torch.long)),
        },
        lora_targets=("conv1", "conv2"),
    ),
    "MultiScaleVQVAE": ModelCase(
        arguments={
            "num_codes": 16,
            "latent_channels": 8,
            "base_channels": 8,
            "channel_multipliers": (1, 2),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "patch_nums": PATCH_NUMS,
            "num_residual_convs": 2,
        },
        inputs=lambda batch: {"pixels": draws(batch, 3, 8, 8).clamp(-1, 1)},
        smooth=lambda model, inputs: model.decode(_vqvae_latents(len(inputs["pixels"]))).sample,
        entry_points={
            "encode": lambda model, inputs: model.encode(**inputs),
            "decode": lambda model, inputs: model.decode(_vqvae_latents(1)),
            "decode_codes": lambda model, inputs: model.decode_codes(torch.zeros(1, NUM_TOKENS, dtype=torch.long)),
            "decode_codes_per_scale": lambda model, inputs: model.decode_codes_per_scale(
                torch.zeros(1, NUM_TOKENS, dtype=torch.long)
            ),
        },
    ),
    "NCSNpp": ModelCase(
        arguments={
            "sample_size": 8,
            "base_channels": 8,
            "channel_multipliers": (1, 2),
            "layers_per_block": 1,
            "time_embedding": "fourier",
            "resampling": "fir",
            "pyramid": True,
            "divide_by_time": True,
            "dropout": 0.0,
        },
        inputs=lambda batch: {
            "hidden_states": draws(batch, 3, 8, 8),
            "timestep": torch.linspace(900, 100, 4)[:batch],
        },
        smooth=lambda model, inputs: model(**inputs).sample,
    ),
    "NoisyLatentQuantizer": ModelCase(
        arguments={"num_codes": 512, "latent_channels": 8, "quantizer_type": "linear"},
        inputs=lambda batch: {"latents": draws(batch, 8, 4, 4)},
        smooth=lambda model, inputs: model.probabilities(**inputs),
        entry_points={
            "encode": lambda model, inputs: model.encode(**inputs),
            "probabilities": lambda model, inputs: model.probabilities(**inputs),
            "decode": lambda model, inputs: model.decode(torch.zeros(1, 16, dtype=torch.long)),
        },
        lora_targets=("projection",),
    ),
    "TiTok": ModelCase(
        arguments={
            "image_size": 8,
            "encoder_patch_size": 4,
            "decoder_patch_size": 2,
            "num_latent_tokens": 4,
            "latent_channels": 6,
            "num_codes": 16,
            "encoder_width": 16,
            "encoder_layers": 2,
            "encoder_heads": 2,
            "decoder_width": 24,
            "decoder_layers": 1,
            "decoder_heads": 2,
        },
        inputs=lambda batch: {"pixels": draws(batch, 3, 8, 8).clamp(-1, 1)},
        smooth=lambda model, inputs: model.decode(draws(len(inputs["pixels"]), 4, 6)).sample,
        entry_points={
            "encode": lambda model, inputs: model.encode(**inputs),
            "features": lambda model, inputs: model.features(**inputs),
            "decode": lambda model, inputs: model.decode(draws(1, 4, 6)),
            "decode_codes": lambda model, inputs: model.decode_codes(torch.zeros(1, 4, dtype=torch.long)),
        },
    ),
    "TransfusionFlowTransformer": ModelCase(
        arguments={
            "num_text_tokens": 10,
            "latent_channels": (3,),
            "has_positions": (True,),
            "num_layers": 2,
            "width": 16,
            "num_heads": 2,
            "head_dim": 8,
            "ff_dim": 24,
        },
        inputs=transfusion_flow_inputs,
        smooth=_transfusion_outputs,
        entry_points={
            "new_cache": lambda model, inputs: model.new_cache(1, 16),
            "extend": lambda model, inputs: model.extend(
                model.layout(inputs["input_ids"]), None, inputs["latents"], inputs["timesteps"]
            ),
        },
        float32_outputs=frozenset({"logits"}),
    ),
    "TransfusionTransformer": ModelCase(
        arguments={
            **TRANSFUSION_IDS,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "context_length": 32,
            "latent_channels": 2,
            "time_frequency_dim": 16,
            "has_modality_embedding": True,
        },
        inputs=transfusion_inputs,
        smooth=_transfusion_outputs,
        entry_points={
            "embed_text": lambda model, inputs: model.embed_text(inputs["input_ids"]),
            "embed_images": lambda model, inputs: model.embed_images(inputs["latents"], inputs["timesteps"]),
            "run": lambda model, inputs: model.run(draws(1, 3, 32), torch.arange(3)[None]),
            "read_images": lambda model, inputs: model.read_images(
                draws(1, 4, 32), model.embed_images(inputs["latents"], inputs["timesteps"])
            ),
            "text_logits": lambda model, inputs: model.text_logits(draws(1, 3, 32)),
        },
        float32_outputs=frozenset({"logits"}),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "UViTBert": ModelCase(
        arguments=MASKED_SIZES,
        inputs=lambda batch: masked_inputs(batch),
        smooth=lambda model, inputs: model(**inputs).logits,
        entry_points={"forward_positions": lambda model, inputs: _first_positions(model, inputs)},
        float32_outputs=frozenset({"logits"}),
    ),
    "VARTransformer": ModelCase(
        arguments={
            "num_codes": 16,
            "code_dim": 8,
            "num_classes": 5,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "mlp_ratio": 2.0,
            "patch_nums": PATCH_NUMS,
            "class_dropout": 0.0,
        },
        inputs=lambda batch: {"latents": draws(batch, NUM_TOKENS - 1, 8), "class_labels": labels(batch, 5)},
        smooth=lambda model, inputs: model(**inputs).logits,
        entry_points={
            "new_cache": lambda model, inputs: model.new_cache(inputs["class_labels"]),
            "forward_scale": lambda model, inputs: _first_scale(model, inputs["class_labels"]),
        },
        float32_outputs=frozenset({"logits"}),
    ),
}

QUANTIZERS: dict[str, QuantizerCase] = {
    "ClusteringVectorQuantizer": QuantizerCase(
        arguments={"num_codes": 16, "code_dim": 8}, latents=lambda batch: draws(batch, 16, 8)
    ),
    "EntropyVectorQuantizer": QuantizerCase(
        arguments={"num_codes": 16, "code_dim": 8}, latents=lambda batch: draws(batch, 16, 8)
    ),
    "LinearQuantizer": QuantizerCase(
        arguments={"num_codes": 16, "code_dim": 8}, latents=lambda batch: draws(batch, 16, 8)
    ),
    "MultiScaleResidualQuantizer": QuantizerCase(
        arguments={"num_codes": 16, "code_dim": 8, "patch_nums": PATCH_NUMS, "num_residual_convs": 2},
        latents=_vqvae_latents,
    ),
    "VectorQuantizer": QuantizerCase(
        arguments={"num_codes": 16, "code_dim": 8}, latents=lambda batch: draws(batch, 16, 8)
    ),
}

SCHEDULERS: dict[str, Mapping[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.5},
    "InterpolantSDEScheduler": {"num_inference_steps": 4},
    "MaskedTokenScheduler": {"num_inference_steps": 4, "guidance_scale": 2.0, "guidance_schedule": "linear"},
    "RespacedDDPMScheduler": {"respacing": "4", "clip_sample": True},
}

PIPELINES: dict[str, PipelineCase] = {
    "ImageDiffusionPipeline": PipelineCase(
        components={"transformer": "DiT"},
        changes={"transformer": {"out_channels": 6, "has_duration": False}},
        schedulers={"scheduler": "RespacedDDPMScheduler"},
        arguments={
            "class_names": ["red", "green", "blue", "cyan", "pink"],
            "guidance_channels": 2,
            "prediction_type": "epsilon",
        },
        condition=lambda count: {"class_labels": labels(count, 5).tolist()},
        single={"class_labels": 0},
        steps=4,
        changeable=("latents",),
    ),
    "MaskGITPipeline": PipelineCase(
        components={"vq_model": "MaskGITVQGAN", "transformer": "MaskGITTransformer"},
        schedulers={"scheduler": "MaskedTokenScheduler"},
        arguments={"class_names": ["red", "green", "blue", "cyan", "pink"]},
        condition=lambda count: {"class_labels": labels(count, 5).tolist()},
        single={"class_labels": 0},
        steps=4,
        changeable=(),  # what replaces codes must be codes, which tests/pipelines/test_maskgit.py does
    ),
    "MeanFlowPipeline": PipelineCase(
        components={"transformer": "DiT"},
        arguments={"class_names": ["red", "green", "blue", "cyan", "pink"]},
        condition=lambda count: {"class_labels": labels(count, 5).tolist()},
        single={"class_labels": 0},
        steps=1,
        changeable=("latents",),
    ),
    "RectifiedFlowPipeline": PipelineCase(
        components={"transformer": "DiT"},
        changes={"transformer": {"has_duration": False}},
        schedulers={"scheduler": "FlowMatchEulerDiscreteScheduler"},
        arguments={"class_names": ["red", "green", "blue", "cyan", "pink"], "guidance_channels": 2},
        condition=lambda count: {"class_labels": labels(count, 5).tolist()},
        single={"class_labels": 0},
        steps=28,
        changeable=("latents",),
    ),
    "TransfusionPipeline": PipelineCase(
        components={"transformer": "TransfusionTransformer"},
        changes={
            "transformer": {
                "vocab_size": 37,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "boi_token_id": 34,
                "eoi_token_id": 35,
                "pad_token_id": 0,
                "image_token_id": 36,
                "context_length": 64,
                "latent_channels": 3,
            }
        },
        schedulers={"scheduler": "FlowMatchEulerDiscreteScheduler"},
        tokenizers={"tokenizer": text_encoders.tokenizer},
        arguments={"class_names": ["a red circle", "a blue cross"], "image_size": 8},
        settings={"image_size": 8},
        condition=lambda count: {"prompt": text_encoders.CAPTIONS[:count]},
        single={"prompt": text_encoders.CAPTIONS[0]},
        steps=50,
        changeable=("latents",),
    ),
    "VARPipeline": PipelineCase(
        components={"vq_model": "MultiScaleVQVAE", "transformer": "VARTransformer"},
        arguments={"class_names": ["red", "green", "blue", "cyan", "pink"]},
        condition=lambda count: {"class_labels": labels(count, 5).tolist()},
        single={"class_labels": 0},
        steps=len(PATCH_NUMS),
        changeable=("f_hat",),
        read_directly=("vq_model.quantizer",),
    ),
}


def build_model(name: str, **changes: Any) -> nn.Module:
    """The tiny model in evaluation mode; no parameter keeps an initial value that hides a path, such as zero."""
    return _randomize(getattr(hfgen, name), {**MODELS[name].arguments, **changes})


def build_quantizer(name: str, **changes: Any) -> nn.Module:
    """The tiny quantizer in evaluation mode."""
    return _randomize(getattr(hfgen, name), {**QUANTIZERS[name].arguments, **changes})


def build_pipeline(name: str, **arguments: Any):
    """The tiny pipeline, with its progress bar off; ``arguments`` are those that it can do without."""
    components = {
        argument: build_model(model, **PIPELINES[name].changes.get(argument, {}))
        for argument, model in PIPELINES[name].components.items()
    }
    for argument, scheduler in PIPELINES[name].schedulers.items():
        library = hfgen if scheduler in hfgen.__all__ else diffusers
        components[argument] = getattr(library, scheduler)(**SCHEDULERS[scheduler])
    for argument, make in PIPELINES[name].tokenizers.items():
        components[argument] = make()
    pipeline = getattr(hfgen, name)(**components, **{**PIPELINES[name].settings, **arguments})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _first_positions(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.forward_positions(**inputs, positions=torch.zeros(len(inputs["codes"]), 1, dtype=torch.long))


def _first_scale(model: nn.Module, class_labels: Tensor) -> Tensor:
    cache, condition = model.new_cache(class_labels)
    return model.forward_scale(None, condition, cache, 0, len(class_labels))


@torch.no_grad()
def _randomize(model_class: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(**arguments).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(*name.encode()))
        parameter.add_(0.2 * noise)
    return model
