"""What a :class:`~hfgen.models.generators.transfusion.TransfusionTransformer` refuses.

Legend: B batch, L tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE_MODES = ("continuous", "discrete")
IMAGE_ADAPTERS = ("linear", "unet")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those that do not depend on the length of the sequence
SPECIAL_IDS = tuple(f"{name}_token_id" for name in ("bos", "eos", "boi", "eoi", "pad", "image"))


def check_config(config: Any) -> None:
    """Raises ``ValueError`` unless the configuration of a model is complete and free of contradictions."""
    for name, value, known in (
        ("image_mode", config.image_mode, IMAGE_MODES),
        ("image_adapter", config.image_adapter, IMAGE_ADAPTERS),
        ("rope_type", (config.rope_scaling or {}).get("rope_type", "default"), ROPE_TYPES),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")
    heads = config.num_key_value_heads or config.num_attention_heads
    if config.hidden_size % config.num_attention_heads or config.num_attention_heads % heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads="
            f"{config.num_attention_heads}, and that a multiple of num_key_value_heads={heads}."
        )
    special = {name: config[name] for name in SPECIAL_IDS if config[name] is not None}
    ids = list(special.values())
    if len(set(ids)) < len(ids) or not all(0 <= each < config.vocab_size for each in ids):
        raise ValueError(f"The special ids must differ and lie in [0, {config.vocab_size - 1}], got {special}.")
    if config.image_mode == "discrete":
        _check_codes(config, special)
    else:
        _check_continuous(config)


def _check_codes(config: Any, special: dict[str, int]) -> None:
    size, first = config.codebook_size, config.code_offset
    if not size or first is None or not 0 <= first <= config.vocab_size - size:
        raise ValueError(
            f"Discrete images need codebook_size and code_offset with all codes below vocab_size={config.vocab_size}, "
            f"got codebook_size={size} and code_offset={first}."
        )
    if any(first <= each < first + size for each in special.values()):
        raise ValueError(f"Special ids lie among the codes [{first}, {first + size - 1}]: {special}.")


def _check_continuous(config: Any) -> None:
    if config.codebook_size is not None or config.code_offset is not None:
        raise ValueError('codebook_size and code_offset are for image_mode="discrete"; leave them out.')
    if config.image_token_id is None or config.eoi_token_id is None:
        raise ValueError("Continuous images need image_token_id and eoi_token_id.")
    levels = len(config.adapter_channels)
    if config.image_adapter == "unet" and (not levels or config.patch_size != 2 ** (levels - 1)):
        raise ValueError(
            f"A U-Net with {levels} levels does not make patches of patch_size={config.patch_size}; the patch size is "
            "2 to the number of levels minus 1, and adapter_channels has one entry for each level."
        )


def check_sequence(config: Any, input_ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> bool:
    """Raises ``ValueError`` for wrong shapes, a sequence longer than the context and ids out of range.

    Returns:
        Whether there is padding in ``input_ids``.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, expected (batch, length), not empty.")
    for name, value in (("position_ids", position_ids), ("segment_ids", segment_ids)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} have shape {tuple(value.shape)}, expected that of input_ids, {tuple(input_ids.shape)}."
            )
    if input_ids.shape[1] > config.context_length and segment_ids is None:
        raise ValueError(
            f"The sequence has {input_ids.shape[1]} tokens, but the context of the model is {config.context_length}; "
            "shorten it."
        )
    # One transfer from the device for all that is asked.
    low, high, padding = torch.stack([*input_ids.aminmax(), (input_ids == config.pad_token_id).sum()]).tolist()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids lie in [{low}, {high}], expected [0, {config.vocab_size - 1}]; does the text tokenizer belong "
            "to this model?"
        )
    return padding > 0


def check_images(config: Any, input_ids: Tensor, runs: Tensor, num_images: int, num_tokens: int) -> None:
    """Raises ``ValueError`` unless the slots are those of the images, one after the other, between their markers.

    Args:
        config: of the model.
        input_ids: (B, L) int64.
        runs: (B, L) int64, the number of the image of each slot.
        num_images, num_tokens: images of the batch, and tokens of each.
    """
    edges = runs[:, 1:] != runs[:, :-1]
    starts, ends = edges & (runs[:, 1:] > 0), edges & (runs[:, :-1] > 0)
    unmarked = (starts & (input_ids[:, :-1] != config.boi_token_id)).sum() + (runs[:, 0] > 0).sum()
    unmarked = unmarked + (ends & (input_ids[:, 1:] != config.eoi_token_id)).sum()
    *lengths, unmarked = torch.cat([runs.flatten().bincount(minlength=1)[1:], unmarked[None]]).tolist()
    if len(lengths) != num_images:
        raise ValueError(
            f"input_ids hold {len(lengths)} images (runs of image_token_id={config.image_token_id}), but latents hold "
            f"{num_images}; they must be equally many."
        )
    for index, length in enumerate(lengths):
        if length != num_tokens:
            raise ValueError(
                f"Image {index} has {length} slots in input_ids, but {num_tokens} tokens by the size of its latents "
                f"and patch_size={config.patch_size}."
            )
    if unmarked:
        raise ValueError(
            f"Images in input_ids must lie between boi_token_id={config.boi_token_id} and eoi_token_id="
            f"{config.eoi_token_id}; {unmarked} of these markers are missing."
        )
