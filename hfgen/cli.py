"""The command ``hfgen``: sample, reconstruct, convert, push, pull, systems.

Every command is a thin layer over the public interface. A wrong input ends with one line and exit code 2;
``--debug`` shows where it was raised.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import hfgen

DTYPES = ("float32", "bfloat16", "float16")

SAMPLE_EXAMPLES = """\
examples:
  hfgen sample zoo/var-shapes --labels all --format grid --output outputs/shapes
  hfgen sample zoo/var-shapes --labels "red circle,cyan cross" --num 4 --guidance-scale 2 --top-k 50 --seed 1
  hfgen sample zoo/titok-shapes --labels 0-9 --num-inference-steps 8 --guidance-scale 3 --token-temperature 1 --gif
  hfgen sample USER/TEXT-TO-IMAGE --prompt "a red circle" "a blue cross" --negative-prompt blurry --num 4 --format grid
  hfgen sample USER/TEXT-TO-IMAGE --prompts-file captions.txt --height 512 --width 768 --num-inference-steps 28
  hfgen sample USER/UNCONDITIONAL --num 16 --format grid
  hfgen sample USER/MODEL --labels 207 --num 50000 --batch-size 64 --format npz --device cuda --dtype bfloat16

Image number i is drawn from (seed, i) alone: it does not depend on the batch size or on how many are drawn.
"""
RECONSTRUCT_EXAMPLES = """\
examples:
  hfgen reconstruct zoo/var-shapes photo.png --output outputs/reconstructions
  hfgen reconstruct USER/TOKENIZER *.jpg --size 256

Writes NAME.png with the original on the left and prints the PSNR of each image, 8 bits per channel.
"""
CONVERT_EXAMPLES = """\
examples:
  hfgen convert var-d16 --output var-d16
  hfgen convert var var_d16.pth vae_ch160v4096z32.pth --output var-d16
  hfgen convert var vae_ch160v4096z32.pth --output var-vae --dtype float16
  hfgen convert titok tokenizer_titok_l32_imagenet generator_titok_l32_imagenet --output titok-l-32
  hfgen convert dit DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --output dit-xl-2
  hfgen convert sd3 sd3_medium.safetensors --vae stabilityai/stable-diffusion-3-medium-diffusers \\
      --text-encoders stabilityai/stable-diffusion-3-medium-diffusers --output sd3-medium
  hfgen convert maskgit maskgit_imagenet512_checkpoint tokenizer_imagenet512_checkpoint --output maskgit-512 \\
      --original-config vq_model.resolution=512
  hfgen convert var var_d36.pth vae_ch160v4096z32.pth --output var-d36 \\
      --original-config vae.v_patch_nums=[1,2,3,4,6,9,13,18,24,32]

Without files, official weights are downloaded by their name; `hfgen systems --weights` lists the names.
With files for all parts of a system the output is a pipeline folder, else that of a single model.
A folder as it was published may stand for its file; an official config.json beside the weights is read.
`hfgen systems` lists the systems. Nothing inside a file is run, unless --trust-pickle allows it.
"""
SYSTEMS_EXAMPLES = """\
examples:
  hfgen systems
  hfgen systems --weights
  hfgen systems --json
"""
PUSH_EXAMPLES = """\
examples:
  hfgen push runs/var USER/my-var
  hfgen push runs/var/final USER/my-var --private --revision experiment
  hfgen push runs/var USER/my-var --dtype float16 --variant fp16
  hfgen push runs/var/checkpoint-500 USER/my-var --path-in-repo checkpoint-500

DIR is a saved model or pipeline, or a training run, of which the result in DIR/final is taken. A card (README.md) that
the repository has stays as it is; without one the repository gets that of DIR, or a short one is written there.
Log in first with `hf auth login`, or set HF_TOKEN.
"""
PULL_EXAMPLES = """\
examples:
  hfgen pull USER/my-var
  hfgen pull USER/my-var --output my-var --revision experiment

Without --output the files stay in the cache, where from_pretrained("USER/my-var") finds them, also offline.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        # Imported here, so that --help and wrong options answer at once.
        text = import_module(f"hfgen.commands.{options.command}").run(options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hfgen: error: {message}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``options.command`` is the chosen one."""
    parser = argparse.ArgumentParser(prog="hfgen", description="Tokenize, generate and convert images.")
    parser.add_argument("--version", action="version", version=f"hfgen {hfgen.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    sample = _command(commands, "sample", "draw images from a pipeline", SAMPLE_EXAMPLES)
    sample.add_argument("pipeline", help="folder of a saved pipeline, or USER/NAME on the Hub")
    condition = sample.add_mutually_exclusive_group()
    condition.add_argument("--labels", type=_labels,
                           help="class-conditional pipelines: 0,1,2 or 5-9 or names of classes or all")  # fmt: skip
    condition.add_argument("--prompt", nargs="+", metavar="TEXT", help="text-to-image pipelines: one or more prompts")
    condition.add_argument("--prompts-file", type=Path, metavar="FILE", help="text file with one prompt per line")
    sample.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from, with --prompt")
    sample.add_argument("--num", type=_positive, default=1, metavar="N",
                        help="images per label or prompt, or in all without one (default: 1)")  # fmt: skip
    sample.add_argument("--height", type=_positive, metavar="N", help="pixels (default: as the model was trained)")
    sample.add_argument("--width", type=_positive, metavar="N", help="pixels (default: as the model was trained)")
    sample.add_argument("--num-inference-steps", type=_positive, metavar="N", help="steps of an iterative sampler")
    sample.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance; 1 is off")
    sample.add_argument("--temperature", type=float, metavar="T", help="divides the logits")
    sample.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely codes; 0 is off")
    sample.add_argument("--top-p", type=float, metavar="P", help="then draw within probability mass P; 1 is off")
    sample.add_argument("--token-temperature", type=float, metavar="T",
                        help="masked-token pipelines: noise in the draw of codes; 0 takes the likeliest")  # fmt: skip
    sample.add_argument("--choice-temperature", type=float, metavar="T",
                        help="masked-token pipelines: noise in the choice of the codes that stay")  # fmt: skip
    sample.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    sample.add_argument("--batch-size", type=_positive, default=16, metavar="B", help="images at a time (default: 16)")
    sample.add_argument("--format", choices=("png", "grid", "npz"), default="png",
                        help="one PNG per image, one PNG with all, or an array arr_0, uint8 (N, H, W, 3) "
                        "(default: png)")  # fmt: skip
    sample.add_argument("--gif", action="store_true",
                        help="masked-token, rectified-flow and Transfusion pipelines: also an animated GIF of the "
                        "steps of each image")  # fmt: skip
    _add_output(sample, "outputs")
    _add_device(sample)

    reconstruct = _command(commands, "reconstruct", "encode and decode images", RECONSTRUCT_EXAMPLES)
    reconstruct.add_argument("tokenizer", help="folder or Hub id of a tokenizer, or of a pipeline that has one")
    reconstruct.add_argument("images", nargs="+", type=Path, help="image files")
    reconstruct.add_argument("--size", type=_positive, metavar="N",
                             help="resize the shorter side to N and crop the centre (default: the size that the "
                             "tokenizer takes; if it takes any, that of the image)")  # fmt: skip
    _add_output(reconstruct, "outputs")
    _add_device(reconstruct)

    convert = _command(commands, "convert", "official checkpoints into a folder", CONVERT_EXAMPLES)
    convert.add_argument("system", help="name of the converter, see `hfgen systems`, or maskgit_vqgan, var_vqvae "
                         "or transfusion_pytorch; without files the name of official weights, see "
                         "`hfgen systems --weights`")  # fmt: skip
    convert.add_argument("files", metavar="FILE", nargs="*", type=Path, help="official checkpoint files or folders")
    convert.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="replace a saved model or pipeline at DIR")
    convert.add_argument("--part", help="take only this part of the checkpoint, such as transformer")
    convert.add_argument("--original-config", action="append", default=[], metavar="FILE|KEY=VALUE",
                         help="official constructor arguments that the weights do not tell: a JSON or YAML file, or "
                         "KEY=VALUE, or PART.KEY=VALUE for one of several parts (may be repeated)")  # fmt: skip
    convert.add_argument("--trust-pickle", action="store_true",
                         help="run the pickle program of the files: only for files that you trust as much as a "
                         "program")  # fmt: skip
    convert.add_argument("--vae", metavar="DIR|USER/NAME",
                         help="AutoencoderKL of diffusers, or a pipeline that holds one, to decode the latents of "
                         "the pipeline that is written (dit, sit, mean_flow, sd3)")  # fmt: skip
    convert.add_argument("--text-encoders", metavar="DIR|USER/NAME",
                         help="pipeline of diffusers or hfgen whose text encoders and tokenizers the pipeline that is "
                         "written takes over (sd3)")  # fmt: skip
    convert.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the files)")
    _add_debug(convert)

    push = _command(commands, "push", "upload a model, a pipeline or a run to the Hub", PUSH_EXAMPLES)
    push.add_argument("folder", metavar="DIR", type=Path, help="folder to upload")
    push.add_argument("repo", metavar="USER/NAME", help="repository, created if it does not exist")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch, created if it does not exist (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    push.add_argument("--path-in-repo", metavar="PATH", help="folder of the repository (default: its root)")
    push.add_argument("--message", help="of the commit or the pull request")
    push.add_argument("--dtype", choices=DTYPES, help="upload the weights in this dtype (default: as in DIR)")
    push.add_argument("--variant", metavar="NAME", help="suffix of the weight files, such as fp16 with that --dtype")
    push.add_argument("--max-shard-size", metavar="SIZE", help="split the weights into files of at most this, as 5GB")
    push.add_argument("--with-pipeline-file", action="store_true",
                      help="add pipeline.py, with which plain DiffusionPipeline.from_pretrained(repo, "
                      "custom_pipeline=repo, trust_remote_code=True) loads")  # fmt: skip
    push.add_argument("--replace-card", action="store_true", help="replace the card that the repository has")
    _add_debug(push)

    pull = _command(commands, "pull", "download a repository of the Hub and check it", PULL_EXAMPLES)
    pull.add_argument("repo", metavar="USER/NAME", help="repository")
    pull.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (default: the cache)")
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    _add_debug(pull)

    systems = _command(commands, "systems", "list the published systems", SYSTEMS_EXAMPLES)
    systems.add_argument("--weights", action="store_true", help="the official weights that load by name instead")
    systems.add_argument("--json", action="store_true", help="all fields, as JSON")
    _add_debug(systems)
    return parser


def _command(commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    return parser


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="DIR", help=f"folder to write to (default: {default})"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1 or mps (default: the accelerator if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _labels(text: str) -> list[int | str] | str:
    """``0,1,5-9,red circle`` as a list of numbers and names; ``all`` as it is."""
    if text == "all":
        return text
    labels: list[int | str] = []
    for item in map(str.strip, text.split(",")):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if numbers:
            labels.extend(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        elif item:
            labels.append(item)
    if not labels:
        raise argparse.ArgumentTypeError(f"{text!r} names no class; give numbers, ranges as LOW-HIGH, or names")
    return labels
