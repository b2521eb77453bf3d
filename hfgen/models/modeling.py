"""The base of every hfgen model and the outputs that models return."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from hfgen.models.untrusted import MAX_CONFIG_BYTES, check_arguments, check_components, read_json_object
from hfgen.publishing import PublishMixin


@dataclass
class QuantizerOutput(BaseOutput):
    """What a quantizer returns.

    Attributes:
        latents: quantized latents in the layout of the input, with straight-through gradients.
        codes: int64 ids, (B, L) in raster order unless the quantizer says otherwise.
        loss: the sum of the weighted terms of ``losses``, a scalar.
        losses: each term before the sum, detached, for the log.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class TokenizerOutput(BaseOutput):
    """What ``encode`` of an image tokenizer returns.

    Attributes:
        latents: what ``decode`` takes: a grid (B, C, h, w) or a sequence (B, L, C).
        codes: int64 ids (B, L), or None for a continuous tokenizer.
        loss: the quantizer's loss, a scalar, or None.
        losses: the terms of ``loss`` by name.
    """

    latents: Tensor
    codes: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None


@dataclass
class DecoderOutput(BaseOutput):
    """``sample``: pixels (B, 3, H, W); the image range is [-1, 1], values are not clamped."""

    sample: Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """What ``forward`` of an image tokenizer returns: the reconstruction and what ``encode`` returns."""

    sample: Tensor
    latents: Tensor
    codes: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None


@dataclass
class GeneratorOutput(BaseOutput):
    """``logits``: (B, L, num_codes) float32."""

    logits: Tensor


class PortableConfigMixin:
    """Saves the configuration without the folder or repository that an object was loaded from.

    It goes before ``ConfigMixin`` among the base classes. What is published should not name somebody's disk, and the
    same model saved from two places should be the same files.
    """

    def to_json_string(self) -> str:
        """The configuration as JSON."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike) -> dict[str, Any]:
        return read_json_object(json_file, MAX_CONFIG_BYTES)


# Names that only some versions of transformers have -> those that all have.
_CLASS_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


class PortablePipelineMixin(PortableConfigMixin):
    """The same for a pipeline and its components, before ``DiffusionPipeline``; what its index says is checked."""

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; what is written names no place that a component was loaded from."""
        with ExitStack() as stack:
            for component in self.components.values():
                if isinstance(component, ConfigMixin):  # those of diffusers would name it
                    stack.enter_context(_without_place(component))
            super().save_pretrained(save_directory, *args, **kwargs)

    def to_json_string(self) -> str:
        """The index as JSON."""
        index = json.loads(super().to_json_string())
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers":
                index[name] = [entry[0], _CLASS_NAMES.get(entry[1], entry[1])]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike) -> dict[str, Any]:
        index = super()._dict_from_json_file(json_file)
        components, _ = cls._get_signature_keys(cls)
        check_components(index, components)
        return index


@contextmanager
def _without_place(component: ConfigMixin) -> Iterator[None]:
    """Leave where a component was loaded from out of its configuration meanwhile."""
    config = component._internal_dict
    component._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})
    try:
        yield
    finally:
        component._internal_dict = config


class HFGenModel(PublishMixin, PortableConfigMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A diffusers model that also loads official checkpoints and knows the published sizes.

    Subclasses take plain typed arguments under ``@register_to_config``. ``presets`` maps the name of a published size
    to its constructor arguments; ``original_system`` and ``original_part`` name the converter that produces the class.
    """

    config_name = "config.json"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original_system: ClassVar[str | None] = None
    original_part: ClassVar[str | None] = None

    def set_attention_backend(self, backend: str) -> None:
        """As in diffusers, for layers of diffusers and hfgen.

        Raises:
            ValueError: another backend than "native" for layers of transformers, which do not ask for it.
        """
        if backend != "native" and any(type(part).__module__.startswith("transformers.") for part in self.modules()):
            raise ValueError(
                f"The attention layers of {type(self).__name__} are those of transformers and always run PyTorch's "
                f"scaled_dot_product_attention: leave the backend at 'native', got {backend!r}."
            )
        super().set_attention_backend(backend)

    @classmethod
    def from_preset(cls, name: str) -> HFGenModel:
        """A freshly initialised model of a published size; under ``torch.device("meta")`` it takes no memory."""
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise ValueError(f"{cls.__name__} has no preset {name!r}; known are: {known}.")
        return cls(**cls.presets[name])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any):
        """As in diffusers, except that tensors which only the checkpoint or only the model has are an error.

        Raises:
            OSError: a file is missing, damaged, or a pickle that holds more than tensors.
            ValueError: the configuration or the checkpoint does not fit the class.
        """
        if kwargs.pop("output_loading_info", False):  # the caller gets the lists of them
            return super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        loaded, found = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        surplus = found["unexpected_keys"]
        if surplus and kwargs.get("quantization_config") is None:  # which adds tensors of its own
            raise ValueError(
                f"The checkpoint in {str(pretrained_model_name_or_path)!r} has {len(surplus)} tensors that its "
                f"{cls.__name__} does not have, such as {surplus[0]}: it belongs to another configuration."
            )
        if getattr(loaded, "hf_device_map", None) is None:  # a model on several devices may rest on the disk
            missing = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
            if missing:
                raise ValueError(
                    f"The checkpoint in {str(pretrained_model_name_or_path)!r} lacks {len(missing)} tensors of its "
                    f"{cls.__name__}, such as {missing[0]}: it belongs to another configuration or is incomplete."
                )
        return loaded

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """As in diffusers, after the checks of :func:`hfgen.models.untrusted.check_arguments`.

        Raises:
            ValueError: an argument of a wrong type or size; the model does not fit into memory.
        """
        known = inspect.signature(cls.__init__).parameters
        check_arguments(cls, {name: value for name, value in {**config, **kwargs}.items() if name in known})
        try:
            return super().from_config(config, return_unused_kwargs, **kwargs)
        except (MemoryError, RuntimeError) as error:  # it could be built without memory, so this is the memory
            raise ValueError(f"A {cls.__name__} of this configuration does not fit into memory: {error}") from error

    @classmethod
    def from_single_file(
        cls,
        checkpoint: str | PathLike | Mapping[str, Tensor],
        *,
        original_config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        allow_pickle: bool = False,
    ) -> HFGenModel:
        """Load a checkpoint in the layout of the official repository.

        Args:
            checkpoint: a file, a folder, or a state dict with official names.
            original_config: official constructor arguments that the shapes of the weights do not tell.
            dtype: dtype of the returned model; by default that of the checkpoint.
            allow_pickle: also read pickles that could run code; only for files that you trust.

        Returns:
            The model in evaluation mode. Missing or unknown keys are a ``ValueError`` that names them.
        """
        from hfgen.conversion import load_original

        if cls.original_system is None:
            raise ValueError(f"{cls.__name__} has no official checkpoint layout; use from_pretrained instead.")
        model = load_original(
            cls.original_system,
            checkpoint,
            part=cls.original_part,
            original_config=original_config,
            allow_pickle=allow_pickle,
        )
        if not isinstance(model, cls):
            raise ValueError(f"The checkpoint holds a {type(model).__name__}, not a {cls.__name__}.")
        return model if dtype is None else model.to(dtype)
