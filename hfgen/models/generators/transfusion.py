"""Transfusion: one transformer for sequences of texts and images (Zhou et al., arXiv 2408.11039).

The trunk is the Llama of transformers. With ``image_mode="continuous"``, the paper's, images are patches of noisy
latents, of which the network predicts noise or velocity; with ``"discrete"`` they are codes of noisy latents, which it
predicts like words.

Legend: B batch, L tokens of a sequence, D width, V vocabulary; N images, C latent channels, n tokens of an image.

What the paper leaves open is fixed so: the numbers of a patch are ordered (row, column, channel); the time is a
sinusoid, cosines first, and two linear layers; positions count every token, those of images included; begin and end
markers are not part of the bidirectional block of their image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.generators.llama_checkpoint import copy_trunk, extended_vocabulary, llama_arguments, llama_folder
from hfgen.models.generators.transfusion_checks import check_config, check_images, check_sequence, check_shapes
from hfgen.models.generators.transfusion_sizes import transfusion_presets
from hfgen.models.layers.image_adapters import (
    ImageEmbeddings,
    LinearImageIn,
    LinearImageOut,
    UNetImageIn,
    UNetImageOut,
)
from hfgen.models.layers.llama_trunk import TrunkCache, make_trunk, run_trunk
from hfgen.models.layers.sequence_mask import image_runs, segment_positions, sequence_mask
from hfgen.models.modeling import HFGenModel
from hfgen.models.untrusted import check_arguments


@dataclass
class TransfusionOutput(BaseOutput):
    """What the training pass returns.

    Attributes:
        logits: (B, L, V) float32; those at position i are of token i + 1.
        sample: (N, C, H, W), the prediction for the noisy latents; None without latents.
    """

    logits: Tensor
    sample: Tensor | None = None


class TransfusionTransformer(HFGenModel):
    """The Transfusion transformer.

    Sequences are ids in which the slots of a continuous image hold ``image_token_id``, as many as it has tokens, and
    in which discrete images are their codes plus ``code_offset``. An image is preceded by ``boi_token_id`` and, in
    continuous mode, followed by ``eoi_token_id``.

    ``forward`` is the training pass. Samplers put :meth:`embed_text` or :meth:`embed_images`, :meth:`run` and
    :meth:`text_logits` or :meth:`read_images` together and own the cache.

    Args:
        vocab_size: V: text, special ids and codes.
        hidden_size, intermediate_size, num_layers, num_attention_heads, num_key_value_heads, rms_norm_eps: of Llama;
            ``num_key_value_heads`` is ``num_attention_heads`` by default.
        rope_theta, rope_scaling: of the rotary positions; ``rope_scaling`` holds Llama's further parameters, such as
            ``{"rope_type": "llama3", "factor": 8.0, ...}``.
        context_length: the longest sequence.
        image_mode: "continuous" or "discrete".
        latent_channels: C of continuous images.
        patch_size: side of the patch of latents that is one token.
        image_adapter: "linear", or "unet" for the down and up blocks of a U-Net.
        adapter_channels: of the levels of the U-Net, fine to coarse; ``patch_size`` is 2 to the number of its
            downsamplings. The default has the paper's 0.27 billion parameters.
        bidirectional_images: the tokens of a continuous image attend all of it; False is the paper's ablation.
        has_modality_embedding: add a learned vector for text or image to every token; discrete mode always does.
        time_frequency_dim: width of the sinusoid of a timestep.
        codebook_size: codes of discrete images.
        code_offset: id of the first code.
        fixed_timestep: the timestep of discrete images, which are all equally noisy.
        bos_token_id, pad_token_id: special ids.
        boi_token_id: begins an image; in discrete mode the "end of text" that codes follow.
        eos_token_id, eoi_token_id: end a text and an image; a discrete model can do without.
        image_token_id: the slots of continuous images.
        num_text_tokens: ids of the text tokenizer, the first ones, if some after them are without a meaning, as in a
            vocabulary that was padded; by default all but special ids and codes.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "ResnetBlock2D"]
    _repeated_blocks = ["LlamaDecoderLayer"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]
    _skip_keys = ["cache"]

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = transfusion_presets()

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 32004,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        context_length: int = 4096,
        image_mode: Literal["continuous", "discrete"] = "continuous",
        latent_channels: int = 8,
        patch_size: int = 2,
        image_adapter: Literal["linear", "unet"] = "linear",
        adapter_channels: Sequence[int] = (608, 1216),
        bidirectional_images: bool = True,
        has_modality_embedding: bool = False,
        time_frequency_dim: int = 256,
        codebook_size: int | None = None,
        code_offset: int | None = None,
        fixed_timestep: int = 100,
        bos_token_id: int = 1,
        eos_token_id: int | None = 2,
        boi_token_id: int = 32000,
        eoi_token_id: int | None = 32001,
        pad_token_id: int = 32002,
        image_token_id: int | None = 32003,
        num_text_tokens: int | None = None,
    ):
        super().__init__()
        check_config(self.config)
        self.model = make_trunk(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            context_length=context_length,
            rms_norm_eps=rms_norm_eps,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
        )
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        time_dim = hidden_size
        if image_mode == "continuous" and image_adapter == "linear":
            time_dim = patch_size**2 * latent_channels
            self.image_in = LinearImageIn(latent_channels, patch_size, hidden_size)
            self.image_out = LinearImageOut(latent_channels, patch_size, hidden_size)
        elif image_mode == "continuous":
            time_dim = 4 * adapter_channels[0]
            self.image_in = UNetImageIn(latent_channels, adapter_channels, hidden_size, time_dim)
            self.image_out = UNetImageOut(latent_channels, adapter_channels, hidden_size, time_dim)
        self.time_embedding = TimestepEmbedding(time_frequency_dim, time_dim)
        self.has_modalities = has_modality_embedding or image_mode == "discrete"
        if self.has_modalities:
            self.modality_embedding = nn.Embedding(2, hidden_size)
            nn.init.normal_(self.modality_embedding.weight, std=0.02)
        self.gradient_checkpointing = False

    @classmethod
    def from_llama(
        cls,
        checkpoint: str | PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        context_length: int | None = None,
        image_mode: Literal["continuous", "discrete"] = "continuous",
        latent_channels: int = 8,
        patch_size: int = 2,
        image_adapter: Literal["linear", "unet"] = "linear",
        adapter_channels: Sequence[int] = (608, 1216),
        bidirectional_images: bool = True,
        codebook_size: int | None = None,
        fixed_timestep: int = 100,
        eos_token_id: int | None = None,
        num_text_tokens: int | None = None,
    ) -> TransfusionTransformer:
        """A model whose trunk, embeddings and head are those of a Llama; the rest is freshly initialised.

        The vocabulary is extended by the markers of images, padding, image slots and codes. Their rows start around
        the mean of the others. Only ``config.json`` and safetensors files are read.

        Args:
            checkpoint: a folder or the Hub id of a ``LlamaForCausalLM``.
            revision: of a Hub repository.
            dtype: of the model; float32 by default.
            context_length: the longest sequence, by default that of the checkpoint.
            image_mode, latent_channels, patch_size, image_adapter, adapter_channels: see the class.
            bidirectional_images, codebook_size, fixed_timestep: see the class.
            eos_token_id: which id ends a text, if the checkpoint names several.
            num_text_tokens: ids of its tokenizer, if its vocabulary was padded to more.

        Raises:
            OSError: files are missing.
            ValueError: the checkpoint is no Llama, has parts that the class does not have, or lacks tensors.
        """
        folder = llama_folder(checkpoint, revision)
        arguments = llama_arguments(folder, eos_token_id)
        num_text = arguments["vocab_size"]
        arguments |= extended_vocabulary(num_text, codebook_size)
        if context_length is not None:
            arguments["context_length"] = context_length
        arguments |= {"image_mode": image_mode, "latent_channels": latent_channels, "patch_size": patch_size}
        arguments |= {"image_adapter": image_adapter, "adapter_channels": adapter_channels}
        arguments |= {"bidirectional_images": bidirectional_images, "fixed_timestep": fixed_timestep}
        arguments |= {"num_text_tokens": num_text_tokens}
        check_arguments(cls, arguments)
        model = cls(**arguments)
        model = model if dtype is None else model.to(dtype)
        copy_trunk(folder, model.model, model.lm_head, num_text)
        return model.eval()

    @property
    def is_discrete(self) -> bool:
        """Whether images are codes."""
        return self.config.image_mode == "discrete"

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Boolean, of the shape of ``input_ids``: the ids of codes of discrete images."""
        first = self.config.code_offset
        return (input_ids >= first) & (input_ids < first + self.config.codebook_size)

    @apply_forward_hook
    def embed_text(self, input_ids: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The inputs of the trunk for text, markers and discrete images. The values of the ids are not checked.

        Args:
            input_ids: (B, T) int64.
            timesteps: (N,), discrete mode only: of the images, in order of appearance, if not ``fixed_timestep``.

        Returns:
            (B, T, D).
        """
        return self._embed_text(input_ids, timesteps)

    @apply_forward_hook
    def embed_images(self, latents: Tensor, timesteps: Tensor) -> ImageEmbeddings:
        """The inputs of the trunk for continuous images.

        Args:
            latents: (N, C, H, W), noisy, or clean at timestep 0.
            timesteps: (N,) int or float.

        Returns:
            ``hidden_states`` (N, n, D) for :meth:`run`, and what :meth:`read_images` needs.
        """
        return self._embed_images(latents, timesteps)

    @apply_forward_hook
    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache: TrunkCache | None = None,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """The trunk on new tokens (B, T, D), after those in the cache -> (B, T, D), after the final norm.

        The arguments are those of :func:`hfgen.models.layers.llama_trunk.run_trunk`. The tokens of a whole image need
        ``causal=False`` and no mask.
        """
        return run_trunk(self.model, inputs_embeds, position_ids, cache, mask, causal)

    @apply_forward_hook
    def read_images(self, hidden_states: Tensor, embedded: ImageEmbeddings) -> Tensor:
        """The prediction (N, C, H, W) from (N, n, D) and what :meth:`embed_images` returned for these images."""
        return self.image_out(hidden_states, embedded)

    @apply_forward_hook
    def text_logits(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return self.lm_head(hidden_states).float()

    def forward(
        self,
        input_ids: Tensor,
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransfusionOutput | tuple[Tensor, ...]:
        """Logits of all tokens and the prediction for all images.

        Args:
            input_ids: (B, L) int64.
            latents: (N, C, H, W), continuous mode only: noisy latents in order of appearance over the flattened
                batch. With N = 0, for a batch without images, every parameter still gets a gradient, as distributed
                training needs.
            timesteps: (N,) int or float of the images, in continuous mode; in discrete mode the default is
                ``fixed_timestep``.
            position_ids: (B, L) int64; by default 0, 1, ... in every segment.
            segment_ids: (B, L) int64, for packed sequences: tokens attend only tokens with the same id, which lie
                side by side.

        Returns:
            ``logits`` (B, L, V) float32 and ``sample`` (N, C, H, W) in the dtype of the model.

        Raises:
            ValueError: ids out of range; a sequence longer than the context; slots and markers of images that do not
                fit the latents; latents of other channels or with sides that the patches do not divide; timesteps of
                another number.
        """
        if self.is_discrete and latents is not None:
            raise ValueError("The images of a discrete model are codes in input_ids; leave the latents out.")
        check_shapes(input_ids, position_ids, segment_ids)
        if position_ids is None:
            position_ids = segment_positions(torch.zeros_like(input_ids) if segment_ids is None else segment_ids)
        has_padding = check_sequence(self.config, input_ids, position_ids)
        embeds, embedded, num_images = self._embed_text(input_ids, timesteps, segment_ids), None, 0
        if not self.is_discrete:
            runs = image_runs(input_ids == self.config.image_token_id, segment_ids)
            if latents is not None:
                num_images = len(latents)
                embedded = self._embed_images(*_at_least_one(latents, timesteps))
            num_tokens = 0 if embedded is None else embedded.hidden_states.shape[1]
            check_images(self.config, input_ids, segment_ids, runs, num_images, num_tokens)
        if num_images:
            images = embedded.hidden_states.flatten(0, 1).to(embeds.dtype)
            slots = runs.flatten().nonzero().squeeze(1)  # (N n,), found before the work of the trunk is queued
            embeds = embeds.flatten(0, 1).index_copy(0, slots, images).view_as(embeds)
        blocks = runs if num_images and self.config.bidirectional_images else None
        mask = None  # plain causal attention, for which there are faster kernels
        if has_padding or segment_ids is not None or blocks is not None:
            mask = sequence_mask(input_ids == self.config.pad_token_id, blocks, segment_ids)
        hidden_states = run_trunk(self.model, embeds, position_ids, mask=mask)
        sample = None
        if num_images:
            images = hidden_states.flatten(0, 1)[slots].view_as(embedded.hidden_states)
            sample = self.image_out(images, embedded)
        elif embedded is not None:
            sample = self.image_out(embedded.hidden_states, embedded)[:0]
        output = TransfusionOutput(self.lm_head(hidden_states).float(), sample)
        return output if return_dict else output.to_tuple()

    # FSDP gathers the weights for the methods above; the pass of forward, which has them, calls those below.

    def _embed_text(
        self, input_ids: Tensor, timesteps: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        embeds = self.model.embed_tokens(input_ids)
        if not self.is_discrete:
            return embeds + self.modality_embedding(torch.zeros_like(input_ids)) if self.has_modalities else embeds
        is_code = self.is_code(input_ids)
        embeds = embeds + self.modality_embedding(is_code.long())
        if timesteps is None:
            fixed = torch.full((1,), self.config.fixed_timestep, device=input_ids.device)
            return embeds + is_code[..., None] * self._embed_time(fixed)
        runs = image_runs(is_code, segment_ids)
        num_images = int(runs.max())
        if timesteps.shape != (num_images,):
            raise ValueError(
                f"timesteps have shape {tuple(timesteps.shape)}, but the codes in input_ids are {num_images} images."
            )
        return embeds + is_code[..., None] * self._embed_time(timesteps)[(runs - 1).clamp(min=0)]

    def _embed_images(self, latents: Tensor, timesteps: Tensor | None) -> ImageEmbeddings:
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected (images, {channels}, H, W).")
        if timesteps is None or timesteps.shape != latents.shape[:1]:
            got = "none" if timesteps is None else f"shape {tuple(timesteps.shape)}"
            raise ValueError(f"timesteps must be one for each of the {len(latents)} images, got {got}.")
        embedded = self.image_in(latents.to(self.dtype), self._embed_time(timesteps))
        if self.has_modalities:
            modality = self.modality_embedding(torch.ones(1, 1, dtype=torch.int64, device=latents.device))
            embedded = replace(embedded, hidden_states=embedded.hidden_states + modality)
        return embedded

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        """(N,) -> (N, T); the waves are computed in float32."""
        channels = self.config.time_frequency_dim
        waves = get_timestep_embedding(timesteps, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embedding(waves.to(self.dtype))


def _at_least_one(latents: Tensor, timesteps: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """No images become one, so that their layers run; its results are dropped."""
    if len(latents):
        return latents, timesteps
    return latents.new_zeros(1, *latents.shape[1:]), torch.zeros(1, device=latents.device)
