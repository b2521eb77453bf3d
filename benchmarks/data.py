"""How long a generator waits for its data: images, one file per image, and a cache of tokens.

    python benchmarks/data.py
    python benchmarks/data.py --images 5000 --workers 2 --json data.json

Makes a folder of PNG images of the built-in shapes (256 x 256, trained on at 32 x 32), encodes them with the bundled
tokenizer into a cache and into one .npy file per image, the way of LlamaGen's and MAR's scripts, and trains the same
small VAR on each. "read" is the time of loading a batch and nothing else; "wait" is the share of the training time
that the loop stood still for data, as every run logs it. With images, the tokenizer's work is part of the training
step. The codes of a batch are asserted equal for all three first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from helping import HelpFormatter, check_counts, check_output, run
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfgen import MultiScaleVQVAE, captioned_shapes
from hfgen.data.token_cache import TokenCache
from hfgen.training import CacheConfig, Trainer, batch_codes, build_cache, training_images
from hfgen.training.batches import BlockSampler, collate

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "zoo" / "var-shapes"
BATCH_SIZE = 32
LEAST_STEPS = 2  # the first record of a training is left out, and a median needs one more
IMAGE_SIDE = 256  # of the files; a run on images decodes and shrinks them


class FilePerImage(Dataset):
    """The codes of every image in a .npy file of its own."""

    def __init__(self, folder: Path, cache: TokenCache) -> None:
        self.folder, self.cache = folder, cache
        self.num_classes, self.class_names = cache.num_classes, cache.class_names
        folder.mkdir()
        for index in range(len(cache)):
            np.save(folder / f"{index}.npy", cache.tokens[index, 0])

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        codes = np.load(self.folder / f"{key[1]}.npy").astype(np.int64)
        return {"codes": torch.from_numpy(codes), "label": int(self.cache.labels[key[1]])}


def make_images(folder: Path, count: int) -> None:
    rows = captioned_shapes(count, resolution=IMAGE_SIDE)
    for index in tqdm(range(count), desc="images"):
        row = rows[index]
        target = folder / rows.features["label"].int2str(row["label"])
        target.mkdir(parents=True, exist_ok=True)
        row["image"].save(target / f"{index:06d}.png")


def read_milliseconds(data: Dataset, repeats: int) -> float:
    """Median time of a batch of random rows, in this process."""
    keys = iter(BlockSampler(len(data), BATCH_SIZE))
    times = []
    for _ in range(repeats):
        batch = next(keys)
        started = time.perf_counter()
        collate([data[key] for key in batch])
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def train(data: Dataset, tokenizer: MultiScaleVQVAE, folder: Path, steps: int, workers: int) -> list[dict]:
    """The log of a run of examples/train_var.py on ``data``."""
    sys.path.insert(0, str(ROOT / "examples"))
    from train_var import Config, VARTask

    config = Config(
        output_dir=str(folder),
        tokenizer=str(ZOO),
        max_train_steps=steps,
        batch_size=BATCH_SIZE,
        num_workers=workers,
        logging_steps=max(steps // 4, 1),
        num_validation_images=1,
        checkpointing_steps=0,
        progress=False,
    )
    trainer = Trainer(config)
    trainer.fit(VARTask(config, tokenizer, data.num_classes, data.class_names), data)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "data_wait_fraction" in record][1:]  # the first has the workers' start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help=f"rows of the data set, at least {BATCH_SIZE}")
    parser.add_argument("--steps", type=int, default=30, help=f"training steps per row, at least {LEAST_STEPS}")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="numbers of data loading processes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    check_counts(parser, options, ("images",), least=BATCH_SIZE)
    check_counts(parser, options, ("steps",), least=LEAST_STEPS)
    check_counts(parser, options, ("workers",), least=0)
    check_counts(parser, options, ("threads",))
    check_output(parser, "--json", options.json)
    torch.set_num_threads(options.threads)
    tokenizer = MultiScaleVQVAE.from_pretrained(ZOO, subfolder="vq_model")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "images", options.images)
        config = CacheConfig(
            tokenizer=str(ZOO), subfolder="vq_model", dataset=str(folder / "images"), output_dir=str(folder / "cache")
        )
        build_cache(config, tokenizer)
        cache = TokenCache(folder / "cache")
        sources = {
            "images": training_images(config),
            "file per image": FilePerImage(folder / "files", cache),
            "cache": cache,
        }
        keys = [(0, index) for index in range(BATCH_SIZE)]
        tokenizer.to(Accelerator().device)
        codes = [
            batch_codes(_on_device(collate([data[key] for key in keys]), tokenizer), tokenizer)
            for data in sources.values()
        ]
        assert all(torch.equal(other, codes[0]) for other in codes), "the three ways give different codes"

        rows = []
        for workers in options.workers:
            for name, data in sources.items():
                log = train(data, tokenizer, folder / f"run-{name}-{workers}", options.steps, workers)
                rows.append(
                    {
                        "source": name,
                        "workers": workers,
                        "read_ms": read_milliseconds(data, repeats=10),
                        "wait": statistics.median(record["data_wait_fraction"] for record in log),
                        "images_per_second": statistics.median(record["images_per_second"] for record in log),
                    }
                )
    print("| source | workers | read, ms per batch of 32 | wait | training images/s |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['source']} | {row['workers']} | {row['read_ms']:.2f} | {row['wait']:.1%} | "
            f"{row['images_per_second']:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _on_device(batch: dict, tokenizer: MultiScaleVQVAE) -> dict:
    return {name: value.to(tokenizer.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    run(main)
