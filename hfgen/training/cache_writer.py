"""Writes a token cache with any number of processes; a run that was killed continues where it stopped.

The rows are cut into blocks. A process encodes a block, writes it into the array, flushes it to the disk and only then
leaves the block's marker, which holds its labels and captions. The main process joins the markers and renames
``cache.json`` into place at the very end. Rows do not depend on the number of processes nor on where a run stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from hfgen.data.cache_format import (
    INFO_FILE,
    UNFINISHED_FOLDER,
    CacheInfo,
    Scalar,
    TokenizerIdentity,
    read_info,
    smallest_dtype,
)
from hfgen.training.batches import collate
from hfgen.training.history import write_text
from hfgen.training.output_folder import check_output_folder
from hfgen.training.token_encoding import encode_tokens

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 1024
_BLOCK_BYTES = 2**26
CHECK_FILE = "cache_check.png"
_FILES = ("codes.npy", "moments.npy", "latents.npy", "labels.npy", "captions.npy", "caption_ends.npy")


@dataclass(frozen=True)
class _Plan:
    info: CacheInfo
    block_rows: int

    def blocks(self) -> list[range]:
        rows, step = self.info.num_rows, self.block_rows
        return [range(first, min(first + step, rows)) for first in range(0, rows, step)]


def write_cache(
    dataset: Dataset,
    tokenizer: nn.Module,
    folder: Path,
    *,
    accelerator: Accelerator,
    identity: TokenizerIdentity,
    preprocessing: Mapping[str, Scalar],
    num_variants: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Encode all items of ``dataset`` into the cache ``folder``; every process calls it.

    A finished cache of the same tokenizer and data is left as it is, an unfinished one is continued.

    Args:
        dataset: map-style; ``dataset[(epoch, index)]`` has uint8 ``pixels``, a ``label`` and maybe a ``caption``.
        tokenizer: anything that :func:`~hfgen.training.token_encoding.encode_tokens` takes.
        folder: of the cache.
        accelerator: which process this is, and its device.
        identity: of the tokenizer.
        preprocessing: what decides about the pixels, to be recorded.
        num_variants: K augmented versions: those of the epochs 0 to K - 1.
        batch_size: images per encoding step.
        num_workers: data loading processes per process.
        overwrite: delete what the folder holds of a cache and begin anew.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: if the folder holds a cache of another tokenizer or other data, or something else than a cache, or
            for tokens that the cache cannot hold.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A cache needs a data set with a fixed number of rows, which a stream has not: unpack it into a folder, "
            "or name the data set of the Hub without streaming."
        )
    if num_variants < 1 or batch_size < 1:
        raise ValueError(f"num_variants is {num_variants} and batch_size {batch_size}; both must be at least 1.")
    tokenizer.to(accelerator.device).eval()
    state: list[Any] = [None, None]
    if accelerator.is_main_process:
        plan = _new_plan(dataset, tokenizer, identity, preprocessing, num_variants, batch_size)
        state = _open_folder(folder, plan, overwrite)
    plan, pending = broadcast_object_list(state)
    if pending is None:
        logger.info("%s is complete already.", folder)
        return

    mine = pending[accelerator.process_index :: accelerator.num_processes]
    logger.info(
        "%s: %d of %d blocks to do, %d on this process of %d.",
        folder, len(pending), len(plan.blocks()), len(mine), accelerator.num_processes,
    )  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_sampler=_Keys(mine, num_variants, batch_size),
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # the loader's own draw stays away from the global generator
    )
    batches = iter(loader)
    total = num_variants * sum(map(len, mine))
    with tqdm(total=total, desc=plan.info.kind, disable=not (progress and accelerator.is_main_process)) as bar:
        for block in mine:
            _write_block(folder, plan, block, batches, tokenizer, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(folder, plan)
    accelerator.wait_for_everyone()


class _Keys:
    """The ``(epoch, index)`` keys of every batch of the given blocks; a batch holds one version of its images."""

    def __init__(self, blocks: Sequence[range], num_variants: int, batch_size: int) -> None:
        self.blocks, self.num_variants, self.batch_size = blocks, num_variants, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for block in self.blocks:
            for variant in range(self.num_variants):
                for first in range(0, len(block), self.batch_size):
                    yield [(variant, index) for index in block[first : first + self.batch_size]]


def _new_plan(
    dataset: Dataset,
    tokenizer: nn.Module,
    identity: TokenizerIdentity,
    preprocessing: Mapping[str, Scalar],
    num_variants: int,
    batch_size: int,
) -> _Plan:
    pixels = collate([dataset[0, 0]])["pixels"].to(next(tokenizer.parameters()).device)
    kind, tokens = encode_tokens(tokenizer, pixels)
    codebook_size = int(tokenizer.codebook_size) if kind == "codes" else None
    info = CacheInfo(
        kind=kind,
        dtype="float16" if codebook_size is None else smallest_dtype(codebook_size),
        row_shape=tuple(tokens.shape[1:]),
        num_rows=len(dataset),
        num_variants=num_variants,
        codebook_size=codebook_size,
        num_caption_bytes=len(dataset) if dataset.has_captions else None,  # the true number is known at the end
        class_names=tuple(dataset.class_names),
        num_skipped=0,
        tokenizer=identity,
        preprocessing=preprocessing,
    )
    row_bytes = num_variants * tokens[0].numel() * np.dtype(info.dtype).itemsize
    rows = min(_BLOCK_ROWS, max(_BLOCK_BYTES // row_bytes, 1))
    return _Plan(info, max(rows // batch_size, 1) * batch_size)


def _open_folder(folder: Path, plan: _Plan, overwrite: bool) -> list[Any]:
    """The plan to follow and its blocks that are not done yet; None for the blocks of a complete cache."""
    unfinished = folder / UNFINISHED_FOLDER
    marks, parts = (INFO_FILE, f"{UNFINISHED_FOLDER}/{INFO_FILE}"), (UNFINISHED_FOLDER, CHECK_FILE, *_FILES)
    check_output_folder(folder, "cache", marks=marks, parts=parts)
    if overwrite:
        delete_cache(folder)
    path = next((path for path in (folder / INFO_FILE, unfinished / INFO_FILE) if path.is_file()), None)
    if path is not None:
        differences = _differences(read_info(path), plan.info)
        if differences:
            raise ValueError(
                f"{folder} holds another cache: {'; '.join(differences)}. Write it anew with --overwrite, or choose "
                "another folder."
            )
        if path.parent == folder:
            shutil.rmtree(unfinished, ignore_errors=True)
            return [plan, None]
        plan = replace(plan, block_rows=json.loads((unfinished / "plan.json").read_text())["block_rows"])
        return [plan, [block for block in plan.blocks() if not _marker(folder, block).is_file()]]
    unfinished.mkdir(parents=True, exist_ok=True)
    shape, dtype = plan.info.arrays()[plan.info.kind]
    np.lib.format.open_memmap(folder / f"{plan.info.kind}.npy", mode="w+", dtype=dtype, shape=shape).flush()
    write_text(unfinished / "plan.json", json.dumps({"block_rows": plan.block_rows}) + "\n")
    write_text(unfinished / INFO_FILE, plan.info.to_json())  # last: it says that the rest is there
    return [plan, plan.blocks()]


def _differences(old: CacheInfo, new: CacheInfo) -> list[str]:
    found = old.tokenizer.differences(new.tokenizer)
    for name in sorted(old.preprocessing.keys() | new.preprocessing.keys()):
        before, now = old.preprocessing.get(name), new.preprocessing.get(name)
        if before != now:
            found.append(f"its {name} is {before}, not {now}")
    for name in ("kind", "row_shape", "num_rows", "num_variants", "class_names"):
        if getattr(old, name) != getattr(new, name):
            found.append(f"its {name} is {getattr(old, name)}, not {getattr(new, name)}")
    return found


def delete_cache(folder: Path) -> None:
    """Delete the files of a cache and nothing else."""
    (folder / INFO_FILE).unlink(missing_ok=True)  # first: what is left is no cache
    shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _marker(folder: Path, block: range) -> Path:
    return folder / UNFINISHED_FOLDER / f"rows-{block.start:012d}.json"


def _write_block(
    folder: Path, plan: _Plan, block: range, batches: Iterator[dict[str, Any]], tokenizer: nn.Module, bar: tqdm
) -> None:
    info = plan.info
    shape, dtype = info.arrays()[info.kind]
    values = np.empty((len(block), *shape[1:]), dtype)
    labels: list[int] = []
    captions: list[str] = []
    skipped: set[str] = set()
    device = next(tokenizer.parameters()).device
    for variant in range(info.num_variants):
        first = 0
        while first < len(block):
            batch = next(batches)
            _, tokens = encode_tokens(tokenizer, batch["pixels"].to(device, non_blocking=True))
            values[first : first + len(tokens), variant] = _stored(tokens, info, block.start + first)
            if variant == 0:
                labels += batch["label"].tolist()
                captions += batch.get("caption", [])
                skipped.update(*batch.get("skipped", ()))
            first += len(tokens)
            bar.update(len(tokens))
    # A plain write: pages of a mapped file that two machines write on a shared disk can overwrite each other.
    path = folder / f"{info.kind}.npy"
    with path.open("r+b") as file:
        file.seek(np.lib.format.open_memmap(path, mode="r").offset + block.start * values[0].nbytes)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())
    record = {"labels": labels, "captions": captions, "skipped": sorted(skipped)}
    write_text(_marker(folder, block), json.dumps(record))


def _stored(tokens: Tensor, info: CacheInfo, first_row: int) -> np.ndarray:
    """Tokens as the array holds them; an error if that would change them beyond rounding."""
    if info.codebook_size is not None:
        low, high = int(tokens.min()), int(tokens.max())
        if not 0 <= low <= high < info.codebook_size:
            raise ValueError(f"The tokenizer gave codes from {low} to {high}, outside of its {info.codebook_size}.")
        return tokens.cpu().numpy().astype(info.dtype)
    with np.errstate(over="ignore"):
        values = tokens.float().cpu().numpy().astype(info.dtype)
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"Row {first_row + int(finite.argmin())}: the {info.kind} do not fit {info.dtype} or are not finite. "
            "Check that the tokenizer's weights are sound; a float16 tokenizer may need float32."
        )
    return values


def _finish(folder: Path, plan: _Plan) -> None:
    """Join the markers into the arrays of labels and captions, then let the cache appear."""
    info, blocks = plan.info, plan.blocks()
    labels = np.empty(info.num_rows, np.int32)
    ends = np.empty(info.num_rows, np.int64)
    skipped: set[str] = set()
    text_bytes = 0
    for block in blocks:
        record = json.loads(_marker(folder, block).read_text(encoding="utf-8"))
        labels[block.start : block.stop] = record["labels"]
        skipped.update(record["skipped"])
        for index, caption in zip(block, record["captions"]):
            text_bytes += len(caption.encode()) + 1
            ends[index] = text_bytes
    np.save(folder / "labels.npy", labels)
    if info.num_caption_bytes is not None:
        np.save(folder / "caption_ends.npy", ends)
        text = np.lib.format.open_memmap(folder / "captions.npy", mode="w+", dtype=np.uint8, shape=(text_bytes,))
        first = 0
        for block in blocks:
            record = json.loads(_marker(folder, block).read_text(encoding="utf-8"))
            encoded = "".join(f"{caption}\n" for caption in record["captions"]).encode()
            text[first : first + len(encoded)] = np.frombuffer(encoded, np.uint8)
            first += len(encoded)
        text.flush()
        info = replace(info, num_caption_bytes=text_bytes)
    if skipped:
        logger.warning("%d unreadable images were replaced by the next readable ones.", len(skipped))
    write_text(folder / INFO_FILE, replace(info, num_skipped=len(skipped)).to_json())
    shutil.rmtree(folder / UNFINISHED_FOLDER)
