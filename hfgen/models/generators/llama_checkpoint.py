"""Reading a Llama checkpoint: its sizes as arguments of another model, and its weights into the same trunk.

Only JSON and safetensors files are read.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hfgen.models.untrusted import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_json_object

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What the trunk of transformers can have and ours does not: name -> the only value that is understood.
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def llama_folder(checkpoint: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint; one that is not on the disk is a Hub id, of which only the files read are fetched.

    Raises:
        OSError: no such folder or repository, or it has no configuration.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(checkpoint)):
            raise OSError(f"There is no folder {str(checkpoint)!r}, and it is no Hub id such as USER/NAME.")
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "model*.safetensors", _INDEX]
        folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=patterns))
    if not (folder / "config.json").is_file():
        raise OSError(f"{checkpoint} has no config.json; expected what LlamaForCausalLM.save_pretrained writes.")
    return folder


def llama_arguments(folder: Path, eos_token_id: int | None = None) -> dict[str, Any]:
    """The sizes, rotary positions and special ids in ``config.json``, by the names of ``TransfusionTransformer``.

    Args:
        folder: of the checkpoint.
        eos_token_id: the id that ends a text, if the checkpoint names several.

    Raises:
        ValueError: not a Llama, or one with parts that the trunk does not have.
    """
    config = read_json_object(folder / "config.json", MAX_CONFIG_BYTES)
    for name, value in _FIXED.items():
        found = config.get(name, None if name == "model_type" else value)
        if found != value:
            raise ValueError(f"The checkpoint in {folder} has {name} = {found!r}; only {value!r} is understood.")
    for name in _SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ValueError(
                f"config.json in {folder} has {name} = {config.get(name)!r}; expected a positive integer."
            )
    head_dim = config.get("head_dim")
    if head_dim not in (None, config["hidden_size"] // config["num_attention_heads"]):
        raise ValueError(f"The checkpoint in {folder} has head_dim = {head_dim}; expected hidden_size / heads.")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if "type" in rope:  # as it was called in earlier versions
        rope.setdefault("rope_type", rope.pop("type"))
    if eos_token_id is None:
        eos_token_id = config.get("eos_token_id")
    if not isinstance(eos_token_id, int) or not isinstance(config.get("bos_token_id"), int):
        raise ValueError(
            f"The checkpoint in {folder} has bos_token_id = {config.get('bos_token_id')!r} and eos_token_id = "
            f"{eos_token_id!r}; one id is needed of each. Name the end of a text by from_llama(..., eos_token_id=...)."
        )
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config.get("num_key_value_heads"),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(theta),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "context_length": config.get("max_position_embeddings", 2048),
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos_token_id,
    }


def extended_vocabulary(num_text: int, codebook_size: int | None = None) -> dict[str, int | None]:
    """The ids that ``TransfusionTransformer`` adds to a vocabulary of ``num_text``: of codes or of image slots."""
    ids = {"boi_token_id": num_text, "eoi_token_id": num_text + 1, "pad_token_id": num_text + 2}
    if codebook_size is None:
        return ids | {"image_token_id": num_text + 3, "vocab_size": num_text + 4}
    codes = {"code_offset": num_text + 3, "codebook_size": codebook_size, "vocab_size": num_text + 3 + codebook_size}
    return ids | codes | {"image_token_id": None}


@torch.no_grad()
def copy_trunk(folder: Path, trunk: nn.Module, head: nn.Linear, num_text: int) -> None:
    """Copy the weights of a checkpoint into a ``LlamaModel`` and its head, whose vocabulary can be larger.

    The added rows of embedding and head keep their values as offsets from the mean of the others.

    Args:
        folder: of the checkpoint.
        trunk, head: where to.
        num_text: ids of the checkpoint.

    Raises:
        OSError: the folder has no safetensors file.
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    places = {f"model.{name}": parameter for name, parameter in trunk.named_parameters()} | {_HEAD: head.weight}
    files = _files(folder)
    sources = {name: name for name in places}
    if _HEAD not in files and read_json_object(folder / "config.json", MAX_CONFIG_BYTES).get("tie_word_embeddings"):
        sources[_HEAD] = _EMBEDDING
    missing = sorted(set(sources.values()) - files.keys())
    unknown = sorted(name for name in files.keys() - places.keys() if not name.endswith("rotary_emb.inv_freq"))
    if missing or unknown:
        raise ValueError(
            f"The weights in {folder} do not fit their config.json: missing {missing[:3]}, unknown {unknown[:3]} "
            f"({len(missing)} and {len(unknown)} in all)."
        )
    for name, place in places.items():
        with safe_open(folder / files[sources[name]], "pt") as file:
            _copy(name, file.get_tensor(sources[name]), place, num_text)


def _copy(name: str, tensor: Tensor, place: Tensor, num_text: int) -> None:
    has_vocabulary = name in (_EMBEDDING, _HEAD)
    expected = (num_text, *place.shape[1:]) if has_vocabulary else tuple(place.shape)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected} by config.json.")
    if has_vocabulary:
        place[num_text:] += tensor.float().mean(dim=0).to(place.dtype)
        place = place[:num_text]
    place.copy_(tensor)


def _files(folder: Path) -> dict[str, str]:
    """Name of a tensor -> file in the folder."""
    if (folder / _INDEX).is_file():
        files = read_json_object(folder / _INDEX, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
            raise ValueError(f"{folder / _INDEX} must map names of tensors to files beside it (weight_map).")
        return files
    if not (folder / _WEIGHTS).is_file():
        raise OSError(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}. Only safetensors are read; save the checkpoint again with "
            "transformers, which writes them."
        )
    with safe_open(folder / _WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), _WEIGHTS)
