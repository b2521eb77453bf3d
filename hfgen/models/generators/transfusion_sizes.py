"""The sizes of the Transfusion paper (arXiv 2408.11039)."""

from __future__ import annotations

from typing import Any

# Layers, width, heads and the width of the MLP, which is Llama's: 8/3 of the model's in multiples of 256.
TRANSFUSION_SIZES = {
    "0.16B": (16, 768, 12, 2048),
    "0.37B": (24, 1024, 16, 2816),
    "0.76B": (24, 1536, 24, 4096),
    "1.4B": (24, 2048, 16, 5632),
    "7B": (32, 4096, 32, 11008),
}


def transfusion_presets() -> dict[str, dict[str, Any]]:
    """Arguments of ``TransfusionTransformer`` with linear layers, such as "7B", and with a U-Net, "7B-unet"."""
    linear = {
        name: {
            "num_layers": num_layers,
            "hidden_size": width,
            "num_attention_heads": num_heads,
            "intermediate_size": mlp_width,
        }
        for name, (num_layers, width, num_heads, mlp_width) in TRANSFUSION_SIZES.items()
    }
    return linear | {f"{name}-unet": sizes | {"image_adapter": "unet"} for name, sizes in linear.items()}
