"""What a flow is trained to make images of: classes, or captions through a T5; and the network for each.

A condition turns a batch into inputs of the network's ``forward``, into arguments of ``RectifiedFlowPipeline``, and
judges images of the captioned shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from hfgen.evaluation.captions import judge_captions
from hfgen.evaluation.judge import judge_labels
from hfgen.models.generators.dit import DiT
from hfgen.pipelines.text_conditioning import MAX_T5_TOKENS, t5_embeddings
from hfgen.training.captions import caption_length, caption_tokenizer, first_captions
from hfgen.training.flag_sources import loading_flag
from hfgen.training.flow import FlowTrainingConfig


class FlowCondition(ABC):
    """What images are made of.

    Attributes:
        modules: what is trained beside the network, by its name in the pipeline.
        frozen: what is used as it is.
        class_names: of the pipeline; None if there are no classes.
    """

    modules: Mapping[str, nn.Module] = {}
    frozen: tuple[nn.Module, ...] = ()
    class_names: list[str] | None = None

    @abstractmethod
    def network(self, channels: int, size: int) -> nn.Module:
        """A new network for latents (B, channels, size, size)."""

    @abstractmethod
    def inputs(self, batch: Mapping[str, Any], dropped: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Arguments of the network's ``forward``.

        Args:
            batch: with ``label`` (B,) or ``caption``, a list of B texts.
            dropped: bool (B,), images without their condition.
            modules: the trained modules, or their averages.
        """

    @abstractmethod
    def parts(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Components of the pipeline beside network, scheduler and autoencoder."""

    @abstractmethod
    def call_arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call of the pipeline."""

    @abstractmethod
    def judge(self, pixels: Tensor, batch: Mapping[str, Any]) -> dict[str, float]:
        """What the judge says about images (B, 3, H, W) of captioned shapes made for a batch."""


class LabelCondition(FlowCondition):
    """Class labels for a :class:`hfgen.DiT`.

    Args:
        config: sizes of the network.
        data: a labelled data set; an image with the label -1 counts as one without a condition.

    Raises:
        ValueError: the data set has no classes.
    """

    def __init__(self, config: FlowTrainingConfig, data: Dataset) -> None:
        self.config, self.num_classes, self.class_names = config, data.num_classes, data.class_names

    def network(self, channels: int, size: int) -> DiT:
        config = self.config
        return DiT(
            sample_size=size,
            patch_size=config.patch_size,
            in_channels=channels,
            num_classes=self.num_classes,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            timestep_scale=config.timestep_scale,
            reverse_time=config.reverse_time,
        )

    def inputs(self, batch: Mapping[str, Any], dropped: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        labels = batch["label"]
        return {"class_labels": torch.where(dropped | (labels < 0), self.num_classes, labels)}

    def parts(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def call_arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"class_labels": torch.where(batch["label"] < 0, self.num_classes, batch["label"]).tolist()}

    def judge(self, pixels: Tensor, batch: Mapping[str, Any]) -> dict[str, float]:
        return judge_labels(pixels, batch["label"])


class CaptionCondition(FlowCondition):
    """Captions for ``diffusers.SD3Transformer2DModel``, through a T5 that is trained with it or stays as it is.

    The network reads the states of the tokens, zero at the padding, and their mean as the pooled vector. The condition
    is dropped by replacing the caption with the empty text, which the pipeline guides away from.

    Args:
        config: sizes, and where encoder and tokenizer come from.
        data: a data set with captions.

    Raises:
        ValueError: the data set has no captions, or the tokenizer no padding.
    """

    def __init__(self, config: FlowTrainingConfig, data: Dataset) -> None:
        self.config = config
        if not data.has_captions:
            raise ValueError(f"--dataset {config.dataset} has no captions, which --model mmdit learns from.")
        self.tokenizer = _tokenizer(config, data)
        if config.text_encoder is None:
            self.encoder = _small_t5(config, self.tokenizer)
            self.modules = {"text_encoder": self.encoder}
        else:
            with loading_flag("text_encoder", config.text_encoder):
                self.encoder = T5EncoderModel.from_pretrained(config.text_encoder, use_safetensors=True)
            self.frozen = (self.encoder,)

    def network(self, channels: int, size: int) -> SD3Transformer2DModel:
        config, text_width = self.config, self.encoder.config.d_model
        network = SD3Transformer2DModel(
            sample_size=size,
            patch_size=config.patch_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            caption_projection_dim=config.width,
            joint_attention_dim=text_width,
            pooled_projection_dim=text_width,
            pos_embed_max_size=size // config.patch_size,
            qk_norm="rms_norm",
        )
        # diffusers names the repeated blocks of most networks, not of this one; --compile and muon ask for them.
        network._repeated_blocks = ["JointTransformerBlock"]
        init_mmdit(network)
        return network

    def inputs(self, batch: Mapping[str, Any], dropped: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        captions = ["" if drop else text for text, drop in zip(batch["caption"], dropped.tolist(), strict=True)]
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(dropped.device)
        encoder = modules.get("text_encoder", self.encoder)
        states, pooled = t5_embeddings(encoder, tokens["input_ids"], tokens["attention_mask"])
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def parts(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {"text_encoder": modules.get("text_encoder", self.encoder), "tokenizer": self.tokenizer}

    def call_arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": batch["caption"]}

    def judge(self, pixels: Tensor, batch: Mapping[str, Any]) -> dict[str, float]:
        return judge_captions(pixels, batch["caption"])


CONDITIONS: Mapping[str, type[FlowCondition]] = {"dit": LabelCondition, "mmdit": CaptionCondition}


@torch.no_grad()
def init_mmdit(transformer: SD3Transformer2DModel) -> None:
    """Initialise a network in place as DiT does (arXiv 2212.09748): blocks start as the identity, the output as zero.

    diffusers leaves its layers with the defaults of torch.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(transformer.pos_embed.proj.bias)
    time_embed = transformer.time_text_embed.timestep_embedder
    for layer in (time_embed.linear_1, time_embed.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*(norm.linear for norm in (*norms, transformer.norm_out)), transformer.proj_out):
        nn.init.zeros_(layer.weight)


def _tokenizer(config: FlowTrainingConfig, data: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer, whose ``model_max_length`` is the number of tokens to train with.

    The pipeline, which it is saved with, uses it too.
    """
    captions, source = first_captions(data), config.text_tokenizer or config.text_encoder
    with loading_flag("text_tokenizer" if config.text_tokenizer else "text_encoder", source):
        tokenizer = caption_tokenizer(source, captions, vocab_size=config.vocab_size, max_length=MAX_T5_TOKENS)
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer {source} has no padding token, which captions of one length need.")
    longest = max(map(len, tokenizer(captions, verbose=False)["input_ids"]))
    tokenizer.model_max_length = caption_length(longest, config.text_tokens, MAX_T5_TOKENS)
    return tokenizer


def _small_t5(config: FlowTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """A new T5 encoder without dropout, which the network has none of either."""
    sizes = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.text_width,
        d_kv=config.text_width // config.text_heads,
        d_ff=4 * config.text_width,
        num_layers=config.text_layers,
        num_heads=config.text_heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(sizes)
