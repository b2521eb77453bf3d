"""What the bundled pipelines reach, by the analytic judge of the built-in data.

    python benchmarks/quality.py var-shapes
    python benchmarks/quality.py titok-shapes --steps 8
    python benchmarks/quality.py flow-shapes --steps 25 --guidance 2
    python benchmarks/quality.py transfusion-shapes --steps 25 --guidance 2

Reconstruction is measured on images of a split that training never reads, generation on images of every class, or of
captions of that split: of one object, and of two if the pipeline learned that, where an attribute of the other object
is an error of binding. Pipelines that write are given the images of these captions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from helping import HelpFormatter, check_counts, check_output, check_saved, run
from tqdm import tqdm

from hfgen.auto import AutoPipeline
from hfgen.counters import generator
from hfgen.data.shapes import CELLS, CLASS_NAMES, SIZES, ShapesData
from hfgen.data.sources import load_images
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.caption_accuracy import caption_accuracy
from hfgen.evaluation.captions import judge_captions
from hfgen.evaluation.judge import diversity, judge_labels, judge_shapes
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.models.quantizers.usage import codebook_usage

ZOO = Path(__file__).resolve().parent.parent / "zoo"
IMAGE_SIZE = 32  # of all pipelines of the zoo


@dataclass(frozen=True)
class Bundled:
    """What a pipeline of the zoo is measured by.

    Attributes:
        pipeline: its class.
        temperature: its name for the temperature of its draws, None without such draws.
        choices: whether it chooses what stays, with a temperature of that.
        steps: whether the number of its steps can be chosen.
        captions: the sources whose captions it learned.
    """

    pipeline: str
    temperature: str | None = None
    choices: bool = False
    steps: bool = True
    captions: tuple[str, ...] = ()


PIPELINES = {
    "var-shapes": Bundled("VARPipeline", "temperature", steps=False),
    "titok-shapes": Bundled("MaskGITPipeline", "token_temperature", choices=True),
    "flow-shapes": Bundled("RectifiedFlowPipeline", captions=("shapes:single", "shapes:double")),
    "meanflow-shapes": Bundled("MeanFlowPipeline"),
    "transfusion-shapes": Bundled("TransfusionPipeline", captions=("shapes:single",)),
}
TITLES = {"shapes:single": "one object", "shapes:double": "two objects"}
READ = {
    "shapes:single": ("shape", "colour", "size", "cell", "object", "found"),
    "shapes:double": ("pair_shape", "pair_colour", "pair_size", "pair_object", "pair"),
}  # of the judge's shares


def reconstruction(pipe: DiffusionPipeline, data: ShapesData, batch_size: int) -> dict[str, float]:
    """PSNR, SSIM and L1 on unseen images, the judge's class accuracy on them, and the use of the codebook."""
    tokenizer = pipe.vq_model
    items = [data[(0, index)] for index in range(len(data))]
    pixels = to_pixels(torch.stack([item["pixels"] for item in items]))
    with torch.no_grad():
        outputs = [tokenizer(part) for part in tqdm(pixels.split(batch_size), desc="reconstruct")]
    samples, codes = (torch.cat([output[name] for output in outputs]) for name in ("sample", "codes"))
    metrics = reconstruction_metrics(samples, pixels, codes=codes, num_codes=tokenizer.codebook_size)
    metrics["judge_label"] = judge_labels(samples, torch.tensor([item["label"] for item in items]))["label"]
    if "patch_nums" in tokenizer.config:
        for side, part in zip(tokenizer.config.patch_nums, tokenizer.quantizer.split(codes)):
            metrics[f"used_fraction_{side}x{side}"] = codebook_usage(part, tokenizer.codebook_size)["used_fraction"]
    return {name: float(value) for name, value in metrics.items()}


def generation(
    pipe: DiffusionPipeline,
    guidance_scale: float,
    settings: dict[str, float],
    per_class: int,
    batch_size: int,
    seed: int,
) -> tuple[dict, dict]:
    """Judge accuracy of the requested class, and how evenly size and cell are spread."""
    labels = torch.arange(len(CLASS_NAMES)).repeat_interleave(per_class)
    images = []
    for part in tqdm(torch.arange(len(labels)).split(batch_size), desc=f"guidance {guidance_scale:g}"):
        images.append(
            pipe(
                labels[part].tolist(),
                guidance_scale=guidance_scale,
                **settings,
                generator=[generator(seed, index) for index in part.tolist()],
                output_type="pt",
            ).images
        )
    pixels = torch.cat(images) * 2 - 1
    accuracy = judge_labels(pixels, labels)
    reading = judge_shapes(pixels)
    right = reading.label == labels
    accuracy["worst_class"] = min(right[labels == label].float().mean().item() for label in labels.unique())
    return accuracy, diversity(reading)


def text_generation(
    pipe: DiffusionPipeline,
    guidance_scale: float,
    settings: dict,
    sources: tuple[str, ...],
    count: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """The judge's shares of :func:`judge_captions` for ``count`` captions of each source."""
    captions = [caption for source in sources for caption in unseen(source, count, "caption")]
    images = []
    for part in tqdm(torch.arange(len(captions)).split(batch_size), desc=f"guidance {guidance_scale:g}"):
        images.append(
            pipe(
                [captions[index] for index in part.tolist()],
                guidance_scale=guidance_scale,
                **settings,
                generator=[generator(seed, index) for index in part.tolist()],
                output_type="pt",
            ).images
        )
    return judge_captions(torch.cat(images) * 2 - 1, captions)


def captioning(pipe: DiffusionPipeline, sources: tuple[str, ...], count: int, batch_size: int) -> dict[str, float]:
    """The shares of :func:`caption_accuracy` of captions written for unseen images, the likeliest tokens."""
    written, captions = [], []
    for source in sources:
        pixels = to_pixels(torch.stack(unseen(source, count, "pixels")))
        captions += unseen(source, count, "caption")
        for part in tqdm(pixels.split(batch_size), desc="caption"):
            written += pipe.caption(part).texts
    return caption_accuracy(written, captions)


def unseen(source: str, count: int, column: str) -> list:
    """One column of the first rows of the split that training never reads."""
    data = load_images(source, resolution=IMAGE_SIZE, split="test", limit=count)
    return [data[(0, index)][column] for index in range(count)]


def print_table(header: tuple[str, ...], rows: dict[str, list[float]]) -> None:
    """Shares in per cent, a row for each guidance scale."""
    print("| guidance | " + " | ".join(header) + " |")
    print("|---" * (len(header) + 1) + "|")
    for scale, row in rows.items():
        print(f"| {scale} | " + " | ".join(f"{value:.1%}" for value in row) + " |")


def measure_classes(pipe: DiffusionPipeline, arguments: argparse.Namespace, settings: dict) -> dict:
    """Measure and print what a class-conditional pipeline reaches."""
    results, rows, spread = {}, {}, {}
    for scale in arguments.guidance:
        accuracy, spread = generation(pipe, scale, settings, arguments.per_class, arguments.batch_size, arguments.seed)
        results[f"{scale:g}"] = accuracy | spread
        rows[f"{scale:g}"] = [accuracy[name] for name in ("label", "worst_class", "shape", "colour", "found")]
    made = f"{arguments.per_class} images of each of {len(CLASS_NAMES)} classes"
    if PIPELINES[arguments.name].temperature is not None:
        made += f", temperature {arguments.temperature:g}"
    print(f"Generation, {made}, judge accuracy:")
    print_table(("class", "worst class", "shape", "colour", "object found"), rows)
    print(f"Spread at guidance {arguments.guidance[-1]:g} (even: {1 / len(SIZES):.1%} and {1 / len(CELLS):.1%}):")
    for name, shares in (("size", spread["sizes"]), ("cell", spread["cells"])):
        print(f"  {name}: " + ", ".join(f"{key} {share:.1%}" for key, share in shares.items()))
    print(
        f"  normalised entropy: size {spread['size_entropy']:.3f}, cell {spread['cell_entropy']:.3f}, "
        f"class {spread['label_entropy']:.3f}"
    )
    return {"generation": results}


def measure_captions(pipe: DiffusionPipeline, arguments: argparse.Namespace, settings: dict) -> dict:
    """Measure and print what a pipeline with prompts reaches, and one that also writes."""
    sources, count = PIPELINES[arguments.name].captions, arguments.captions
    results: dict = {"generation": {}}
    for scale in arguments.guidance:
        results["generation"][f"{scale:g}"] = text_generation(
            pipe, scale, settings, sources, count, arguments.batch_size, arguments.seed
        )
    for source in sources:
        print(f"Generation from captions of {count} unseen images of {TITLES[source]}, judge accuracy:")
        header = tuple({"cell": "position", "object": "all of these"}.get(name, name) for name in READ[source])
        header = tuple(name.removeprefix("pair_") if name != "pair" else "both objects" for name in header)
        print_table(
            header, {scale: [row[name] for name in READ[source]] for scale, row in results["generation"].items()}
        )
    if hasattr(pipe, "caption"):
        results["captioning"] = captioning(pipe, sources, count, arguments.batch_size)
        each = " and as many of ".join(f"{count} unseen images of {TITLES[source]}" for source in sources)
        print(f"Captions written for {each}, attributes right:")
        for name, value in results["captioning"].items():
            print(f"  {name:24s} {value:.1%}")
    return results


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program if an argument is out of range, or none of this pipeline."""
    bundled = PIPELINES[arguments.name]
    taken = {
        "temperature": bundled.temperature is not None, "choice_temperature": bundled.choices, "steps": bundled.steps,
    }  # fmt: skip
    for name, takes in taken.items():
        if getattr(arguments, name) is not None and not takes:
            known = ", ".join(f"--{each}" for each, has in taken.items() if has)
            parser.error(f"--{name} is nothing that {arguments.name} has; of these it takes {known} only.")
    check_counts(parser, arguments, ("images", "per_class", "captions", "batch_size", "steps"))
    if arguments.temperature is not None and arguments.temperature <= 0:
        parser.error(f"--temperature is {arguments.temperature:g}; it must be above 0.")
    check_counts(parser, arguments, ("choice_temperature",), least=0)
    if arguments.path is not None:
        check_saved(parser, "--path", arguments.path, "model_index.json", bundled.pipeline)
    check_output(parser, "--json", arguments.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("name", choices=sorted(PIPELINES), help="pipeline of the zoo")
    parser.add_argument("--images", type=int, default=1000, help="unseen images to reconstruct")
    parser.add_argument("--per_class", type=int, default=50, help="images to generate of each class")
    parser.add_argument(
        "--captions", type=int, default=500, help="captions of one and, if learned, of two objects to generate from"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="guidance scales")
    parser.add_argument("--temperature", type=float, help="of tokens: divides the guided logits of draws (default: 1)")
    parser.add_argument("--choice_temperature", type=float, help="titok-shapes: noise of the choice of what stays")
    parser.add_argument("--steps", type=int, help="sampling steps; by default those of the pipeline")
    parser.add_argument("--batch_size", type=int, default=100, help="images per call")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the draws")
    parser.add_argument("--path", type=Path, help="measure this pipeline folder instead of the bundled one")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    check_arguments(parser, arguments)

    pipe = AutoPipeline.from_pretrained(arguments.path or ZOO / arguments.name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if arguments.name == "titok-shapes" and (arguments.steps or 0) > pipe.vq_model.num_tokens:
        parser.error(f"--steps is {arguments.steps}; it must be at most the {pipe.vq_model.num_tokens} tokens.")
    more = {"choice_temperature": arguments.choice_temperature, "num_inference_steps": arguments.steps}
    if PIPELINES[arguments.name].temperature is not None:
        arguments.temperature = 1.0 if arguments.temperature is None else arguments.temperature
        more[PIPELINES[arguments.name].temperature] = arguments.temperature
    settings = {name: value for name, value in more.items() if value is not None}
    if arguments.name == "var-shapes":
        settings |= {"top_k": 0, "top_p": 1.0}
    results: dict = {}
    if "vq_model" in pipe.components:
        data = load_images("shapes", resolution=pipe.vq_model.image_size, split="test", limit=arguments.images)
        results["reconstruction"] = reconstruction(pipe, data, arguments.batch_size)
        print(f"Reconstruction of {len(data)} unseen images:")
        for name, value in results["reconstruction"].items():
            print(f"  {name:24s} {value:.4f}")
    measure = measure_captions if "tokenizer" in pipe.components else measure_classes
    results |= measure(pipe, arguments, settings)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
