"""The new transformer of a Transfusion run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfgen.models.generators.transfusion import TransfusionTransformer
from hfgen.training.flag_sources import loading_flag
from hfgen.training.transfusion import TransfusionTrainingConfig
from hfgen.training.transfusion_images import ContinuousImages, DiscreteImages
from hfgen.training.transfusion_text import SequenceWriter


def new_transformer(
    config: TransfusionTrainingConfig, images: ContinuousImages | DiscreteImages, writer: SequenceWriter
) -> TransfusionTransformer:
    """The transformer of a run: a new one, or one that starts from ``--llama``."""
    arguments = images.transformer_arguments()
    if config.llama is not None:
        return _from_llama(config, arguments, writer)
    mlp_width = config.mlp_width or -(-8 * config.width // 96) * 32
    ids, first_free = writer.format, writer.first_free_id
    discrete = config.image_mode == "discrete"
    transformer = TransfusionTransformer(
        vocab_size=first_free + (images.codebook_size if discrete else 1),
        hidden_size=config.width,
        intermediate_size=mlp_width,
        num_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        context_length=config.context_length,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        boi_token_id=ids.boi,
        eoi_token_id=ids.eoi,
        pad_token_id=ids.pad,
        image_token_id=None if discrete else first_free,
        num_text_tokens=len(writer.tokenizer),
        code_offset=first_free if discrete else None,
        **arguments,
    )
    init_trunk(transformer)
    return transformer


@torch.no_grad()
def init_trunk(transformer: TransfusionTransformer) -> None:
    """Initialise the trunk in place so that it learns at any width.

    Llama's standard deviation of 0.02 fits a width of some thousands: there it is about fan_in^-0.5, which keeps the
    size of activations. Narrow networks need that rule itself. The layers that add to the residual stream start at
    zero, so that blocks start as the identity: noisy patches then reach the output as they are, and a prediction of
    what is in them is learned from the first step on.
    """
    for layer in transformer.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def _from_llama(
    config: TransfusionTrainingConfig, arguments: dict[str, Any], writer: SequenceWriter
) -> TransfusionTransformer:
    with loading_flag("llama", config.llama):
        transformer = TransfusionTransformer.from_llama(
            config.llama,
            context_length=config.context_length,
            eos_token_id=writer.format.eos,
            num_text_tokens=len(writer.tokenizer),
            **arguments,
        )
    return transformer.train()
