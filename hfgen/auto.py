"""Load anything that hfgen published by the class name in its configuration.

Both loaders take the class from hfgen's own list of public names and read weights from safetensors, so a repository
cannot make them run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from diffusers import DiffusionPipeline

import hfgen
from hfgen.downloads import loading_reason
from hfgen.models.modeling import HFGenModel, PortableConfigMixin


class PipelineIndex(PortableConfigMixin, DiffusionPipeline):
    """Reads the model_index.json of any pipeline with the checks of hfgen."""


class AutoPipeline:
    """Loads a pipeline of hfgen without naming its class."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        quantization_config: Any | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> DiffusionPipeline:
        """Load the pipeline in a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: a folder written by ``save_pretrained`` or a Hub repository ``"user/name"``.
            dtype: dtype of the weights, or one per component with ``"default"`` for the others.
            device_map: placement of the components, such as ``"balanced"``, ``"cuda"`` or ``"cpu"``.
            max_memory: memory limit per device for ``device_map``.
            variant: suffix of the weight files, such as ``"fp16"``.
            revision: branch, tag or commit of the repository.
            token: access token of the Hub, or True for the stored one.
            cache_dir: folder of downloaded files.
            local_files_only: use only what was downloaded before.
            force_download: download again what is in the cache.
            quantization_config: a ``diffusers.PipelineQuantizationConfig``.
            components: components to use instead of the saved ones; None leaves out an optional component.

        Raises:
            OSError: there is no ``model_index.json``, or it cannot be reached.
            ValueError: its ``_class_name`` is not a pipeline of hfgen.
        """
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        try:
            config = PipelineIndex.load_config(pretrained_model_name_or_path, **hub)
        except OSError as error:
            raise OSError(
                f"Could not read model_index.json of {str(pretrained_model_name_or_path)!r}, which a pipeline has. "
                f"A single model loads with hfgen.AutoModel.from_pretrained. ({loading_reason(error)})"
            ) from error
        pipeline_class = _public_class(config.get("_class_name"), DiffusionPipeline, pretrained_model_name_or_path)
        return pipeline_class.from_pretrained(
            pretrained_model_name_or_path,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            variant=variant,
            quantization_config=quantization_config,
            use_safetensors=True,
            **hub,
            **(components or {}),
        )


class AutoModel:
    """Loads a model of hfgen, a tokenizer or a generator, without naming its class."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | Mapping[str, int | str | torch.device] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        quantization_config: Any | None = None,
    ) -> HFGenModel:
        """Load the model in a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: a folder written by ``save_pretrained`` or a Hub repository ``"user/name"``.
            subfolder: name of the component if that is a pipeline, such as ``"transformer"``.
            dtype: dtype of the weights.
            device_map: placement of the modules, such as ``"auto"`` or ``"cpu"``.
            max_memory: memory limit per device for ``device_map``.
            variant: suffix of the weight files, such as ``"fp16"``.
            revision: branch, tag or commit of the repository.
            token: access token of the Hub, or True for the stored one.
            cache_dir: folder of downloaded files.
            local_files_only: use only what was downloaded before.
            force_download: download again what is in the cache.
            quantization_config: a quantization configuration of diffusers.

        Raises:
            OSError: there is no ``config.json``, or it cannot be reached.
            ValueError: its ``_class_name`` is not a model of hfgen.
        """
        hub = {
            "subfolder": subfolder,
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        try:
            config = HFGenModel.load_config(pretrained_model_name_or_path, **hub)
        except OSError as error:
            raise OSError(
                f"Could not read config.json of {str(pretrained_model_name_or_path)!r} with subfolder={subfolder!r}. "
                f"For a model inside a pipeline give the name of the component as subfolder. ({loading_reason(error)})"
            ) from error
        model_class = _public_class(config.get("_class_name"), HFGenModel, pretrained_model_name_or_path)
        return model_class.from_pretrained(
            pretrained_model_name_or_path,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            variant=variant,
            quantization_config=quantization_config,
            use_safetensors=True,
            **hub,
        )


def _public_class(name: Any, base: type, source: str | PathLike) -> type:
    """The class of hfgen that a configuration names; only public names that derive from ``base`` count."""
    if name in hfgen.__all__ and _derives(name, base):
        return getattr(hfgen, name)
    known = ", ".join(public for public in hfgen.__all__ if _derives(public, base))
    raise ValueError(
        f"{str(source)!r} names the class {name!r}, which hfgen {hfgen.__version__} does not have; it has {known}. "
        "A class of diffusers loads with diffusers itself, a newer one of hfgen after an upgrade."
    )


def _derives(name: str, base: type) -> bool:
    value = getattr(hfgen, name)
    return isinstance(value, type) and issubclass(value, base)
