"""Prompts to the condition of a text-to-image network: a sequence of states and one pooled vector.

The encoders are those of Stable Diffusion 3 (arXiv 2403.03206) and Flux, CLIP and T5 of transformers, or a single T5
that was trained together with the image network. Nothing here turns off gradients.

Legend: B prompts, N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

logger = logging.getLogger(__name__)

MAX_T5_TOKENS = 256  # of SD3 and Flux schnell; the tokenizers of T5 allow more

ClipEncoder = CLIPTextModel | CLIPTextModelWithProjection
TextEncoder = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def encode_prompts(
    encoders: Sequence[TextEncoder],
    prompts: Sequence[str],
    *,
    context_width: int,
    clip_context: bool = True,
    max_sequence_length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode prompts with one or several encoders.

    - T5 alone: its last states, zero at the padding, and their mean over the tokens as the pooled vector.
    - CLIP alone: the last states but one of all of them, side by side, filled up to ``context_width`` with zeros; the
      pooled vectors side by side.
    - CLIP and T5: as CLIP alone, then the tokens of T5. As in SD3 and Flux, T5 also sees the padding.

    Args:
        encoders: pairs of an encoder and its tokenizer; at most one T5. The order is that of SD3.
        prompts: B texts.
        context_width: D, the width that the network takes.
        clip_context: False leaves the states of CLIP out, of which only the pooled vector remains (Flux).
        max_sequence_length: tokens of T5; None is what its tokenizer allows, at most 256
            (Flux dev was trained with 512).
        device: where the encoders run; None is where they are.

    Returns:
        States (B, N, D) and pooled vectors (B, P).

    Raises:
        ValueError: a ``max_sequence_length`` below 1.

    A prompt that is too long is cut with a warning that has what was left out.
    """
    if max_sequence_length is not None and max_sequence_length < 1:
        raise ValueError(f"max_sequence_length must be at least 1 token, got {max_sequence_length}.")
    states, pooled = [], []
    clips = [(encoder, tokenizer) for encoder, tokenizer in encoders if isinstance(encoder, ClipEncoder)]
    for encoder, tokenizer in clips:
        tokens = tokenize(tokenizer, prompts, tokenizer.model_max_length)
        output = encoder(tokens["input_ids"].to(device or encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds if isinstance(encoder, CLIPTextModelWithProjection) else output.pooler_output)
    context = []
    if clip_context and states:
        side_by_side = torch.cat(states, dim=-1)
        context.append(F.pad(side_by_side, (0, context_width - side_by_side.shape[-1])))
    for encoder, tokenizer in encoders:
        if isinstance(encoder, T5EncoderModel):
            length = max_sequence_length or min(tokenizer.model_max_length, MAX_T5_TOKENS)
            tokens = tokenize(tokenizer, prompts, length).to(device or encoder.device)
            if clips:
                context.append(encoder(tokens["input_ids"]).last_hidden_state)
            else:
                last, mean = t5_embeddings(encoder, tokens["input_ids"], tokens["attention_mask"])
                context.append(last)
                pooled.append(mean)
    return torch.cat(context, dim=1), torch.cat(pooled, dim=-1)


def t5_embeddings(encoder: T5EncoderModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The condition that a single T5 makes, also in training.

    Args:
        encoder: its gradients flow.
        input_ids: (B, N) int64.
        attention_mask: (B, N), 1 for tokens and 0 for padding; every row has a token.

    Returns:
        The last states (B, N, D), zero at the padding, and their mean over the tokens (B, D).
    """
    states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    states = states * mask
    return states, states.sum(dim=1) / mask.sum(dim=1)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int):
    """Prompts as ``input_ids`` and ``attention_mask``, both (B, max_length); what is cut off is told in a warning."""
    prompts = list(prompts)
    for ids in tokenizer(prompts, verbose=False)["input_ids"]:
        if len(ids) > max_length:
            logger.warning(
                "A prompt of %d tokens was cut to the %d that the text encoder takes; left out: %r",
                len(ids),
                max_length,
                tokenizer.decode(ids[max_length - 1 : -1]),
            )
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )


def check_encoders(
    encoders: Sequence[TextEncoder], context_width: int, pooled_width: int, *, clip_context: bool = True
) -> None:
    """Check that encoders make what a network takes.

    Raises:
        ValueError: an encoder of another kind or without a tokenizer, two T5, or other widths.
    """
    if not encoders:
        return
    clip_width = t5_width = pooled = 0
    for encoder, tokenizer in encoders:
        if tokenizer is None:
            raise ValueError(f"The {type(encoder).__name__} has no tokenizer; give each text encoder its own.")
        if isinstance(encoder, ClipEncoder):
            clip_width += encoder.config.hidden_size
            projected = isinstance(encoder, CLIPTextModelWithProjection)
            pooled += encoder.config.projection_dim if projected else encoder.config.hidden_size
        elif isinstance(encoder, T5EncoderModel) and not t5_width:
            t5_width = encoder.config.d_model
        else:
            raise ValueError(
                f"A {type(encoder).__name__} does not fit in: text encoders are CLIPTextModel, "
                "CLIPTextModelWithProjection and one T5EncoderModel."
            )
    pooled = pooled or t5_width
    if pooled != pooled_width:
        raise ValueError(f"The text encoders give {pooled} pooled features; the transformer takes {pooled_width}.")
    if t5_width not in (0, context_width) or (clip_context and clip_width > context_width):
        raise ValueError(
            f"The text encoders give states of width {max(t5_width, clip_width)}; the transformer takes "
            f"{context_width}."
        )
    if not t5_width and not clip_context:
        raise ValueError("The transformer reads the states of a T5, which is not among the text encoders.")
