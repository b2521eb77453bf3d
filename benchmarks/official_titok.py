"""TiTok, its generators and MaskGIT's VQGAN against the official code in one process: equal outputs, then the times.

    git clone https://github.com/bytedance/1d-tokenizer
    pip install einops omegaconf
    python benchmarks/official_titok.py 1d-tokenizer --model l32 --threads 2

The weights are random (speed does not depend on them); the converter carries them from the official model to ours.
Generators sample with the settings of their reported FID and with the same noise when their tokens are compared; while
they are timed each draws its own. The table gives medians and minima in seconds of runs that alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helping import HelpFormatter, check_clone, check_counts, run
from official_var import fill
from timing import alternate
from torch import Tensor, nn

import hfgen.pipelines.maskgit as maskgit_pipeline
from hfgen import MaskedTokenScheduler, MaskGITPipeline
from hfgen.conversion import load_original
from hfgen.counters import generator
from hfgen.sampling.masked_tokens import masked_positions

MODELS = {"l32": "titok-l32", "b64": "titok-b64", "s128": "titok-s128"}
PARTS = ("generator", "encode", "decode", "vqgan-encode", "vqgan-decode")
# Pixels in [0, 1]: rounding in another order of sums, through up to 48 transformer layers and the convolutions.
PIXEL_TOLERANCE = 1e-3
VQGAN = {
    "channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "dropout": 0.0, "hidden_channels": 128, "num_channels": 3,
    "num_res_blocks": 2, "resolution": 256, "z_channels": 256,
}  # fmt: skip


@dataclass
class Comparison:
    """Two functions without arguments that return codes or pixels, and what else must agree before."""

    official: Callable[[], Tensor]
    hfgen: Callable[[], Tensor]
    same_draws: Callable[[], tuple[Tensor, Tensor]] | None = None


class Official:
    """The modules of a clone of bytedance/1d-tokenizer."""

    def __init__(self, repository: Path, model: str):
        sys.path.insert(0, str(repository))
        # The __init__ of this package imports the losses, and they need torchvision.
        package = types.ModuleType("modeling.modules")
        package.__path__ = [str(repository / "modeling" / "modules")]
        sys.modules["modeling.modules"] = package
        omegaconf = importlib.import_module("omegaconf").OmegaConf
        self.config = omegaconf.load(repository / "configs" / "infer" / "TiTok" / f"titok_{model}.yaml")
        self.vqgan_config = omegaconf.create(VQGAN)
        self.plain_config: dict[str, Any] = omegaconf.to_container(self.config, resolve=True)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.maskgit, self.titok, self.vqgan_module = (
                importlib.import_module(f"modeling.{name}") for name in ("maskgit", "titok", "modules.maskgit_vqgan")
            )

    def generator(self) -> nn.Module:
        model_type = self.plain_config["model"]["generator"]["model_type"]
        classes = {"ViT": self.maskgit.ImageBert, "UViT": self.maskgit.UViTBert}
        return fill(classes[model_type](self.config), 0)

    def tokenizer(self) -> nn.Module:
        return fill(self.titok.TiTok(self.config), 1)

    def vqgan(self) -> nn.ModuleDict:
        module = self.vqgan_module
        return fill(
            nn.ModuleDict(
                {
                    "encoder": module.Encoder(self.vqgan_config),
                    "decoder": module.Decoder(self.vqgan_config),
                    "quantize": module.VectorQuantizer(1024, 256, 0.25),
                }
            ),
            2,
        )


class NoTokenizer:
    """Stands in for the tokenizer where only codes are wanted."""

    def __init__(self, codebook_size: int, num_tokens: int):
        self.codebook_size, self.num_tokens = codebook_size, num_tokens

    def encode(self, pixels: Tensor) -> None:
        """Not used."""

    def decode_codes(self, codes: Tensor) -> None:
        """Not used."""


def compare_generator(official: Official, preset: str, batch: int, steps: int) -> Comparison:
    theirs = official.generator()
    part = {"ImageBert": "image_bert", "UViTBert": "uvit"}[type(theirs).__name__]
    ours = load_original("titok", theirs.state_dict(), part=part, original_config=official.plain_config)
    vq_model = NoTokenizer(ours.config.num_codes, ours.num_tokens)
    pipe = MaskGITPipeline(vq_model, ours, MaskedTokenScheduler.from_preset(preset))
    pipe.set_progress_bar_config(disable=True)
    labels = [(207 + 7 * index) % 1000 for index in range(batch)]
    settings = official.plain_config["model"]["generator"]
    options = {name: settings[name] for name in ("guidance_scale", "guidance_decay", "randomize_temperature")}

    def sample_official() -> Tensor:
        condition = torch.tensor(labels)
        return theirs.generate(condition, softmax_temperature_annealing=True, num_sample_steps=steps, **options)

    def sample_ours() -> Tensor:
        return pipe(labels, num_inference_steps=steps, output_type="latent").images

    def same_draws() -> tuple[Tensor, Tensor]:
        uniforms, positions, draws = [], [], generator(3)

        def record_uniforms(tensor: Tensor, low: float, high: float) -> Tensor:
            uniforms.append(torch.rand(tensor.shape, generator=draws))
            return tensor.copy_(uniforms[-1])

        def record_positions(*inputs: Any) -> Tensor:
            positions.append(masked_positions(*inputs))
            return positions[-1]

        def recorded_noise(counts: Any, shape: tuple, *_: Any) -> Tensor:
            of_step = uniforms[2 * (len(positions) - 1) + (not shape)]  # codes (B, N, K) first, then choice (B, N)
            noise = -(-of_step.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            return noise[torch.arange(batch)[:, None], positions[-1]]

        with mock.patch.object(Tensor, "uniform_", record_uniforms):
            expected = sample_official()
        with (
            mock.patch.object(maskgit_pipeline, "masked_positions", record_positions),
            mock.patch.object(maskgit_pipeline, "gumbel_draws", recorded_noise),
        ):
            return expected, sample_ours()

    return Comparison(sample_official, sample_ours, same_draws)


def compare_tokenizer(official: Official, part: str, batch: int) -> Comparison:
    theirs = official.tokenizer()
    ours = load_original("titok", theirs.state_dict(), original_config=official.plain_config)
    if part == "encode":
        images = torch.rand(batch, 3, ours.image_size, ours.image_size, generator=generator(4))
        return Comparison(
            lambda: theirs.encode(images)[1]["min_encoding_indices"].squeeze(1),
            lambda: ours.encode(images * 2 - 1).codes,
        )
    codes = torch.randint(ours.codebook_size, (batch, ours.num_tokens), generator=generator(4))
    return Comparison(
        lambda: theirs.decode_tokens(codes[:, None]), lambda: ours.decode_codes(codes).sample * 0.5 + 0.5
    )


def compare_vqgan(official: Official, part: str, batch: int) -> Comparison:
    theirs = official.vqgan()
    ours = load_original("maskgit_vqgan", theirs.state_dict())
    if part == "vqgan-encode":
        images = torch.rand(batch, 3, 256, 256, generator=generator(4))
        return Comparison(
            lambda: theirs["quantize"](theirs["encoder"](images))[1], lambda: ours.encode(images * 2 - 1).codes
        )
    codes = torch.randint(1024, (batch, 256), generator=generator(4))
    return Comparison(
        lambda: theirs["decoder"](theirs["quantize"].get_codebook_entry(codes)),
        lambda: ours.decode_codes(codes).sample * 0.5 + 0.5,
    )


def check_equal(part: str, comparison: Comparison) -> str:
    """What was equal; ends the program if something was not."""
    same = comparison.same_draws or (lambda: (comparison.official(), comparison.hfgen()))
    expected, found = same()
    if expected.shape != found.shape:
        raise SystemExit(f"{part}: shapes {tuple(expected.shape)} and {tuple(found.shape)}; nothing was timed.")
    if expected.is_floating_point():
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if difference > PIXEL_TOLERANCE:
            raise SystemExit(f"{part}: pixels differ by {difference:.1e} of the largest; nothing was timed.")
        return f"pixels differ by {difference:.1e} of the largest"
    if not torch.equal(expected, found):
        raise SystemExit(f"{part}: {(expected != found).sum()} of {found.numel()} tokens differ; nothing was timed.")
    return f"{found.numel()} of {found.numel()} tokens equal"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("repository", type=Path, help="a clone of bytedance/1d-tokenizer; its code is run")
    parser.add_argument("--model", choices=MODELS, default="l32", help="s128 has the UViT, the others ImageBert")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="what is timed")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="sampling steps")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each, in turns")
    arguments = parser.parse_args()
    check_clone(parser, arguments.repository, "bytedance/1d-tokenizer", "modeling/titok.py")
    check_counts(parser, arguments, ("batch", "steps", "threads", "repeats"))

    torch.set_num_threads(arguments.threads)
    official = Official(arguments.repository, arguments.model)
    print(f"torch {torch.__version__}, {arguments.model}, {arguments.batch} image(s), {arguments.threads} thread(s)")
    print("| part | official, median s | min s | hfgen, median s | min s | ratio | of minima | of CPU | outputs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for part in arguments.part:
        if part == "generator":
            comparison = compare_generator(official, MODELS[arguments.model], arguments.batch, arguments.steps)
        else:
            compare = compare_vqgan if part.startswith("vqgan") else compare_tokenizer
            comparison = compare(official, part, arguments.batch)
        equal = check_equal(part, comparison)
        times = alternate({"official": comparison.official, "hfgen": comparison.hfgen}, arguments.repeats)
        theirs, ours = times["official"].summary(), times["hfgen"].summary()
        ratios = [theirs[name] / ours[name] for name in ("wall_s", "wall_min_s", "cpu_s")]
        seconds = [summary[name] for summary in (theirs, ours) for name in ("wall_s", "wall_min_s")]
        cells = [f"{value:.3f}" for value in seconds] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {part} | {' | '.join(cells)} | {equal} |", flush=True)


if __name__ == "__main__":
    run(main)
