"""Speed: the optimised path against a plain one that does the same work naively, equal tokens asserted first.

    python benchmarks/sampling.py --system var
    python benchmarks/sampling.py --system var --size var-d16 --batch 1 --threads 2 --dtype float32 bfloat16
    python benchmarks/sampling.py --system maskgit --size titok-l32
    python benchmarks/sampling.py --system titok --size titok-b-64
    python benchmarks/sampling.py --system rectified_flow --size s
    python benchmarks/sampling.py --system transfusion --size 0.16B

Systems: var and maskgit sample whole images, titok encodes and decodes them; rectified_flow compares the pipelines
for flows and diffusion with those of diffusers for SD3 and DiT, which are the plain path there; transfusion draws
images after texts of several lengths, and writes text, where the plain path is transformers' Llama. Both paths run
alternately in one process. The table gives seconds per call (median of --repeats), their ratio, also that of the CPU
time, which other work on the machine disturbs less, images (of text, tokens) per second, and for the transformer the
floating-point rate as a share of what a large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import speed_maskgit
import speed_rectified_flow
import speed_titok
import speed_transfusion
import speed_var
import torch
from comparison import COLUMNS, measure
from helping import HelpFormatter, check_counts, check_output, run

SYSTEMS = {
    "var": speed_var,
    "maskgit": speed_maskgit,
    "titok": speed_titok,
    "rectified_flow": speed_rectified_flow,
    "transfusion": speed_transfusion,
}


def check_device(parser: argparse.ArgumentParser, name: str) -> None:
    """End the program if PyTorch has no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name} is no device that is timed; give cpu, cuda or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        parser.error(f"--device {name} is not here: PyTorch {torch.__version__} finds {count} of CUDA; give cpu.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, default="var", help="what is timed")
    sizes = "; ".join(f"{name}: {', '.join(system.SIZES)}" for name, system in SYSTEMS.items())
    parser.add_argument("--size", help=f"of the model, the first of its system by default. {sizes}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="images per call")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="CPU threads")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"],
                        help="of the weights")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each path, in turns")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    system = SYSTEMS[arguments.system]
    size = arguments.size or next(iter(system.SIZES))
    if size not in system.SIZES:
        parser.error(f"--size {size} is none of {arguments.system}; choose one of {', '.join(system.SIZES)}")
    check_counts(parser, arguments, ("batch", "threads", "repeats"))
    check_device(parser, arguments.device)
    check_output(parser, "--json", arguments.json)

    rows = []
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {size}, deterministic, guidance on")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for dtype in arguments.dtype:
        model = system.load(size, getattr(torch, dtype), arguments.device)
        for threads in arguments.threads:
            for batch in arguments.batch:
                for comparison in system.compare(model, batch):
                    row = measure(comparison, threads, arguments.repeats, arguments.device)
                    rows.append(row)
                    cells = [form.format(row[name]) for name, form in COLUMNS.items()]
                    print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
