"""The nested configurations that github.com/bytedance/1d-tokenizer publishes beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path such as ``model.vq_model.token_size``.

    Some of the published files still hold OmegaConf's references to other values, as in
    ``"image_seq_len": "${model.vq_model.num_latent_tokens}"``; they are followed.

    Raises:
        ValueError: a key is lacking, by name, or references go round in a circle.
    """
    followed: list[str] = []
    while True:
        value: Any = config
        names = path.split(".")
        for depth, name in enumerate(names, start=1):
            if not isinstance(value, Mapping) or name not in value:
                lacking = ".".join(names[:depth])
                raise ValueError(
                    f"original_config lacks {lacking}, which the nested configuration of the repository has."
                )
            value = value[name]
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            return value
        followed.append(path)
        path = reference[1]
        if path in followed:
            raise ValueError(f"The references in original_config go round in a circle at {path}.")


def section(config: Mapping[str, Any], path: str, required: tuple[str, ...]) -> dict[str, Any]:
    """The values below a dotted path, which must be a mapping that has at least the names ``required``.

    Raises:
        ValueError: as for :func:`lookup`.
    """
    for name in required:
        lookup(config, f"{path}.{name}")
    return {name: lookup(config, f"{path}.{name}") for name in lookup(config, path)}
