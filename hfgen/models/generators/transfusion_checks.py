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
_COUNTS = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "context_length")
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
    for name in _COUNTS:
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    heads = config.num_key_value_heads or config.num_attention_heads
    if config.hidden_size % config.num_attention_heads or config.num_attention_heads % heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads="
            f"{config.num_attention_heads}, and that a multiple of num_key_value_heads={heads}."
        )
    if config.hidden_size // config.num_attention_heads % 2:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be an even multiple of num_attention_heads="
            f"{config.num_attention_heads}: rotary positions turn pairs of channels."
        )
    special = {name: config[name] for name in SPECIAL_IDS if config[name] is not None}
    # Some checkpoints of text have one token for both ends of a text.
    ids = [each for name, each in special.items() if not (name == "eos_token_id" and each == config.bos_token_id)]
    if len(set(ids)) < len(ids) or not all(0 <= each < config.vocab_size for each in ids):
        raise ValueError(f"The special ids must differ and lie in [0, {config.vocab_size - 1}], got {special}.")
    num_text = config.num_text_tokens
    if num_text is not None and not 1 <= num_text <= config.vocab_size:
        raise ValueError(f"num_text_tokens must be between 1 and vocab_size={config.vocab_size}, got {num_text}.")
    if config.image_mode == "discrete":
        _check_codes(config, special)
    else:
        _check_continuous(config)


def _check_codes(config: Any, special: dict[str, int]) -> None:
    size, first = config.codebook_size, config.code_offset
    if not size or size < 1 or first is None or not 0 <= first <= config.vocab_size - size:
        raise ValueError(
            f"Discrete images need codebook_size and code_offset with all codes below vocab_size={config.vocab_size}, "
            f"got codebook_size={size} and code_offset={first}."
        )
    if any(first <= each < first + size for each in special.values()):
        raise ValueError(f"Special ids lie among the codes [{first}, {first + size - 1}]: {special}.")


def _check_continuous(config: Any) -> None:
    if config.codebook_size is not None or config.code_offset is not None:
        raise ValueError('codebook_size and code_offset are for image_mode="discrete"; leave them out.')
    for name in ("latent_channels", "patch_size"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    if config.image_token_id is None or config.eoi_token_id is None:
        raise ValueError("Continuous images need image_token_id and eoi_token_id.")
    levels = len(config.adapter_channels)
    if config.image_adapter == "unet" and (not levels or config.patch_size != 2 ** (levels - 1)):
        raise ValueError(
            f"A U-Net with {levels} levels does not make patches of patch_size={config.patch_size}; the patch size is "
            "2 to the number of levels minus 1, and adapter_channels has one entry for each level."
        )


def check_shapes(input_ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raises ``ValueError`` for ids that are no (B, L), or others that do not belong to them."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, expected (batch, length), not empty.")
    for name, value in (("position_ids", position_ids), ("segment_ids", segment_ids)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} have shape {tuple(value.shape)}, expected that of input_ids, {tuple(input_ids.shape)}."
            )


def check_sequence(config: Any, input_ids: Tensor, position_ids: Tensor) -> bool:
    """Raises ``ValueError`` for a sequence longer than the context and ids out of range.

    Returns:
        Whether there is padding in ``input_ids``.
    """
    is_pad = input_ids == config.pad_token_id
    # One transfer from the device for all that is asked. Padding has positions, too, which are those of nothing.
    numbers = torch.stack([*input_ids.aminmax(), is_pad.sum(), position_ids.masked_fill(is_pad, 0).max()])
    low, high, padding, last = numbers.tolist()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids lie in [{low}, {high}], expected [0, {config.vocab_size - 1}]; does the text tokenizer belong "
            "to this model?"
        )
    if last >= config.context_length:
        raise ValueError(
            f"The sequence has {last + 1} tokens, but the context of the model is {config.context_length}; shorten it."
        )
    return padding > 0


def check_images(
    config: Any, input_ids: Tensor, segment_ids: Tensor | None, runs: Tensor, num_images: int, num_tokens: int
) -> None:
    """Raises ``ValueError`` unless the slots are those of the images, one after the other, between their markers.

    A sequence may end within an image or after the marker that begins one, for what is drawn there.

    Args:
        config: of the model.
        input_ids: (B, L) int64.
        segment_ids: (B, L) int64 of packed sequences, or None.
        runs: (B, L) int64, the number of the image of each slot.
        num_images, num_tokens: images of the batch, and tokens of each.
    """
    before, after = input_ids[:, :-1], input_ids[:, 1:]
    together = torch.ones_like(before, dtype=torch.bool) if segment_ids is None else _equal_neighbours(segment_ids)
    edges = runs[:, 1:] != runs[:, :-1]
    starts, ends = edges & (runs[:, 1:] > 0), edges & (runs[:, :-1] > 0)
    slots_begin = (starts & ~(together & (before == config.boi_token_id))).sum() + (runs[:, 0] > 0).sum()
    slots_end = (ends & together & (after != config.eoi_token_id)).sum()
    has_next = together & (after != config.pad_token_id)
    lone_begin = ((before == config.boi_token_id) & has_next & (runs[:, 1:] == 0)).sum()
    lone_end = ((after == config.eoi_token_id) & ~(together & (runs[:, :-1] > 0))).sum()
    lone_end = lone_end + (input_ids[:, 0] == config.eoi_token_id).sum()
    counts = torch.stack([slots_begin + slots_end, lone_begin + lone_end])
    *lengths, unmarked, lone = torch.cat([runs.flatten().bincount(minlength=1)[1:], counts]).tolist()
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
    markers = f"boi_token_id={config.boi_token_id} and eoi_token_id={config.eoi_token_id}"
    if unmarked:
        raise ValueError(f"Images in input_ids must lie between {markers}; {unmarked} of these markers are missing.")
    if lone:
        raise ValueError(f"Of the markers {markers} in input_ids, {lone} are not beside an image.")


def _equal_neighbours(ids: Tensor) -> Tensor:
    return ids[:, 1:] == ids[:, :-1]
