"""Arguments of a flow pipeline that say what to make, as the inputs of its network, with and without the condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfgen.pipelines.class_labels import ClassLabels, class_ids
from hfgen.pipelines.flow_networks import Condition, FlowNetwork, LabelFlowNetwork, PromptFlowNetwork
from hfgen.pipelines.latents import guide_channels
from hfgen.pipelines.text_conditioning import TextEncoder, encode_prompts

Texts = str | Sequence[str]


@dataclass(frozen=True)
class FlowConditions:
    """What the network gets beside latents and time, made once per call.

    Attributes:
        batch_size: B images.
        condition: inputs of B rows.
        guided: inputs of 2 B rows, first those without the condition; None where guidance needs no second half.
    """

    batch_size: int
    condition: Condition
    guided: Condition | None = None

    def expand(self, batch_size: int) -> FlowConditions:
        """The same for ``batch_size`` images, of one condition or as many.

        Raises:
            ValueError: another number of conditions.
        """
        if self.batch_size not in (1, batch_size):
            raise ValueError(f"There are {self.batch_size} conditions for {batch_size} images; give one or one each.")
        times = batch_size // self.batch_size
        condition, guided = (
            None if inputs is None else {name: value.repeat_interleave(times, dim=0) for name, value in inputs.items()}
            for inputs in (self.condition, self.guided)
        )
        return FlowConditions(batch_size, condition, guided)

    def velocity(self, network: FlowNetwork, latents: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        """(B, C, h, w) float32, guided; with a scale of 1 only the conditional half is computed."""
        if self.guided is None or guidance_scale == 1:
            return network.velocity(latents, timestep, self.condition, guidance_scale)
        both = network.velocity(torch.cat([latents, latents]), timestep, self.guided, guidance_scale)
        unconditional, conditional = both.chunk(2)
        return guide_channels(conditional, unconditional, guidance_scale, network.guidance_channels)


@dataclass(frozen=True)
class ConditionArguments:
    """The arguments of a call of :class:`hfgen.RectifiedFlowPipeline` that say what to make."""

    prompt: Texts | None = None
    class_labels: ClassLabels | None = None
    negative_prompt: Texts | None = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    max_sequence_length: int | None = None


def prepare_conditions(
    arguments: ConditionArguments,
    network: FlowNetwork,
    encoders: Sequence[TextEncoder],
    class_names: Sequence[str] | None,
    *,
    num_images: int,
    guided: bool,
    device: torch.device,
) -> FlowConditions:
    """The inputs of the network for the arguments of a call.

    Args:
        arguments: prompts, labels or embeddings.
        network: what takes them.
        encoders: of prompts.
        class_names: name of each class, None if there are none.
        num_images: images of each prompt or label.
        guided: whether some pass needs the unconditional half.
        device: of the result.

    Raises:
        ValueError: nothing, too much, or something that the network does not take was asked for.
    """
    _check_kind(arguments, network)
    guided = guided and not network.embeds_guidance
    if isinstance(network, LabelFlowNetwork):
        ids = class_ids(arguments.class_labels, class_names, network.num_classes, unconditional=True)
        labels = torch.tensor(ids, device=device)
        condition, null = {"class_labels": labels}, {"class_labels": torch.full_like(labels, network.num_classes)}
    elif isinstance(network, PromptFlowNetwork):
        condition = _prompt_condition(arguments, network, encoders, device)
        null = _negative_condition(arguments, network, encoders, device, condition) if guided else condition
    elif guided:
        raise ValueError(f"A {type(network.transformer).__name__} has no condition to guide: use guidance_scale=1.")
    else:
        return FlowConditions(num_images, {})
    condition, null = (
        {name: value.repeat_interleave(num_images, dim=0) for name, value in inputs.items()}
        for inputs in (condition, null)
    )
    both = {name: torch.cat([null[name], value]) for name, value in condition.items()}
    batch_size = len(next(iter(condition.values())))
    return FlowConditions(batch_size, condition, both if guided else None)


def _check_kind(arguments: ConditionArguments, network: FlowNetwork) -> None:
    """Exactly the one argument that the network takes."""
    given = {
        "prompt": arguments.prompt is not None,
        "prompt_embeds": arguments.prompt_embeds is not None,
        "class_labels": arguments.class_labels is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    wanted = {"prompt": ("prompt", "prompt_embeds"), "class_labels": ("class_labels",), None: ()}[network.takes]
    wrong = [name for name in names if name not in wanted]
    transformer = type(network.transformer).__name__
    if wrong:
        raise ValueError(f"Got {wrong[0]}, but a {transformer} takes {' or '.join(wanted) or 'no condition'}.")
    if len(names) > 1:
        raise ValueError(f"Got {' and '.join(names)}; give one of them.")
    if wanted and not names:
        hint = " (the number of classes is the label of an unconditional image)" if "class_labels" in wanted else ""
        raise ValueError(f"Give {' or '.join(wanted)}: a {transformer} needs a condition{hint}.")
    negative = arguments.negative_prompt is not None or arguments.negative_prompt_embeds is not None
    if negative and network.takes != "prompt":
        raise ValueError(f"A negative prompt is for networks that read text; a {transformer} does not.")
    if negative and network.embeds_guidance:
        raise ValueError("The guidance scale is an input of this network, which a negative prompt cannot change.")


def _prompt_condition(
    arguments: ConditionArguments, network: PromptFlowNetwork, encoders: Sequence[TextEncoder], device: torch.device
) -> Condition:
    if arguments.prompt is None:
        return _given_embeds("", arguments.prompt_embeds, arguments.pooled_prompt_embeds, network, device)
    return _encode(arguments.prompt, arguments, network, encoders, device)


def _negative_condition(
    arguments: ConditionArguments,
    network: PromptFlowNetwork,
    encoders: Sequence[TextEncoder],
    device: torch.device,
    like: Condition,
) -> Condition:
    """The inputs without the condition, with the rows and the number of tokens of ``like``."""
    if arguments.negative_prompt_embeds is not None:
        if arguments.negative_prompt is not None:
            raise ValueError("Got negative_prompt and negative_prompt_embeds; give one of them.")
        embeds, pooled = arguments.negative_prompt_embeds, arguments.negative_pooled_prompt_embeds
        null = _given_embeds("negative_", embeds, pooled, network, device)
    elif encoders:
        null = _encode(arguments.negative_prompt or "", arguments, network, encoders, device)
    else:
        raise ValueError(
            "The pipeline has no text encoder: for guidance give negative_prompt_embeds and "
            "negative_pooled_prompt_embeds, or turn it off with guidance_scale=1."
        )
    for name, value in like.items():
        if len(null[name]) not in (1, len(value)) or null[name].shape[1:] != value.shape[1:]:
            raise ValueError(
                f"The negative prompts have shape {tuple(null[name].shape)} as {name}, the prompts "
                f"{tuple(value.shape)}; give one negative prompt or one per prompt, of the same length."
            )
    return {name: value.expand(like[name].shape) for name, value in null.items()}


def _given_embeds(
    prefix: str, context: Tensor, pooled: Tensor | None, network: PromptFlowNetwork, device: torch.device
) -> Condition:
    if pooled is None:
        raise ValueError(f"{prefix}prompt_embeds come with {prefix}pooled_prompt_embeds; give both.")
    fits = context.ndim == 3 and context.shape[-1] == network.context_width
    if not fits or pooled.shape != (len(context), network.pooled_width):
        raise ValueError(
            f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds have shapes {tuple(context.shape)} and "
            f"{tuple(pooled.shape)}; expected (batch, tokens, {network.context_width}) and (batch, "
            f"{network.pooled_width})."
        )
    return network.condition(context.to(device), pooled.to(device))


def _encode(
    texts: Texts,
    arguments: ConditionArguments,
    network: PromptFlowNetwork,
    encoders: Sequence[TextEncoder],
    device: torch.device,
) -> Condition:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not encoders:
        raise ValueError("The pipeline has no text encoder: give prompt_embeds and pooled_prompt_embeds.")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"A prompt is a text or a list of at least one, got {texts!r}.")
    context, pooled = encode_prompts(
        encoders,
        texts,
        context_width=network.context_width,
        clip_context=network.clip_context,
        max_sequence_length=arguments.max_sequence_length,
        device=device,
    )
    return network.condition(context, pooled)
