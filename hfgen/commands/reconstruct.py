"""``hfgen reconstruct``: encode and decode images."""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from tqdm import tqdm

from hfgen.commands.shared import check_folder, load_tokenizer, torch_device, torch_dtype
from hfgen.data.rows import decode_image
from hfgen.data.transforms import center_crop, resize_shorter_side, to_pixels, to_tensor, to_uint8
from hfgen.evaluation.reconstruction import psnr
from hfgen.images import make_strip, save_png
from hfgen.pipelines.latents import downsample_factor


def run(options: argparse.Namespace) -> str:
    """One picture per image, the original on the left, and the PSNR between the two."""
    check_folder(options.output)
    tokenizer = load_tokenizer(options.tokenizer, torch_dtype(options.dtype)).to(torch_device(options.device))
    targets = [options.output / f"{path.stem}.png" for path in options.images]
    if len(set(targets)) < len(targets):
        raise ValueError("Two images have the same name without suffix, so one picture would replace the other.")
    # A tokenizer that takes images of one size says so; a fully convolutional one takes multiples of its factor.
    size = options.size or getattr(tokenizer, "image_size", None)
    if options.size is not None:
        check_size(options.size, tokenizer)
    lines, ratios = [], []
    for path, target in zip(tqdm(options.images, unit="image", desc="reconstructing"), targets):
        image = decode_image(path, str(path))
        if size is None:
            factor = downsample_factor(tokenizer)
            if min(image.size) < factor:
                raise ValueError(
                    f"{path} has {image.width}x{image.height} pixels, fewer than the {factor} of a code of this "
                    "tokenizer; give --size."
                )
            image = crop_to_multiple(image, factor)
        else:
            image = center_crop(resize_shorter_side(image, size), size)
        original = to_tensor(image)[None]
        with torch.inference_mode():
            sample = tokenizer(to_pixels(original).to(tokenizer.device, tokenizer.dtype)).sample
        if sample is None:
            raise ValueError(f"{options.tokenizer} draws no images: a TiTok of stage 1 only predicts proxy codes.")
        reconstruction = to_uint8(sample).cpu()
        save_png(make_strip(torch.cat([original, reconstruction]), padding=0), target)
        ratios.append(psnr(reconstruction, original, data_range=255).item())
        lines.append(f"{target}: PSNR {ratios[-1]:.2f} dB")
    if len(ratios) > 1:
        lines.append(f"mean PSNR of {len(ratios)} images: {sum(ratios) / len(ratios):.2f} dB")
    return "\n".join(lines)


def check_size(size: int, tokenizer: torch.nn.Module) -> None:
    """Raise a ``ValueError`` for a size in pixels that an autoencoder does not divide; those of hfgen check theirs."""
    if hasattr(tokenizer, "image_size"):
        return
    factor = downsample_factor(tokenizer)
    if size % factor:
        raise ValueError(f"--size is {size}; this tokenizer takes multiples of {factor}.")


def crop_to_multiple(image: Image.Image, factor: int) -> Image.Image:
    """The centre of an image, with sides that ``factor`` divides."""
    width, height = (side // factor * factor for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
