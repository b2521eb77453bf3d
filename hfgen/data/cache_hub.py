"""Caches as data sets of the Hub: parquet files that ``datasets.load_dataset`` reads, beside their ``cache.json``."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from hfgen.data.cache_format import INFO_FILE, CacheInfo, read_info
from hfgen.data.token_cache import TokenCache

logger = logging.getLogger(__name__)

_SHARD_BYTES = 2**28
_BATCH_ROWS = 1024

_CARD = """\
# Image {kind} of {dataset}

{num_rows} images{variants} as {kind} of {tokenizer}, written by hfgen. Train a generator on them with

```sh
accelerate launch examples/train_var.py --tokenizer TOKENIZER --cache {repo_id} --output_dir runs/generator
```

or any other of hfgen's training scripts that fits such tokens; a tokenizer with other weights is refused. To look at
the rows:

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="train")
```

| column | value |
|---|---|
| `{kind}` | {dtype}, {shape}: augmented versions first |
| `label` | class, -1 for none |
{caption_row}
`cache.json` has the tokenizer's configuration and all settings of the preprocessing.
"""


def open_cache(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> TokenCache:
    """The cache in a folder or, downloaded once, in a data set of the Hub.

    Raises:
        ValueError: if there is none, or if it is damaged.
    """
    if Path(source).expanduser().is_dir():
        return TokenCache(Path(source).expanduser())
    if str(source).startswith(("/", "./", "../", "~")):
        raise ValueError(f"{source} is not a folder: expected a cache, or the id USER/NAME of one on the Hub.")
    return TokenCache(download_cache(str(source), revision=revision, token=token))


def push_cache(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> str:
    """Publish a cache as a data set in one commit; an existing card stays as it is.

    Args:
        folder: a complete cache.
        repo_id: ``"USER/NAME"``; it is created if there is none.
        private: of a new repository; by default what the organisation prefers.
        create_pr: open a pull request instead of a commit on the main branch.
        token: access token of the Hub, or True for the stored one.
        progress: show a progress bar while the parquet files are written.

    Returns:
        Address of the commit or pull request.
    """
    cache = TokenCache(folder)
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hfgen-cache-") as temporary:
        _write_parquet(cache, Path(temporary) / "data", progress=progress)
        shutil.copyfile(cache.folder / INFO_FILE, Path(temporary) / INFO_FILE)
        if not api.file_exists(repo_id, "README.md", repo_type="dataset"):
            _make_card(cache.info, repo_id).save(Path(temporary) / "README.md")
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=temporary,
            commit_message=f"Upload {len(cache)} rows of {cache.info.kind}",
            create_pr=create_pr,
            delete_patterns="data/*.parquet",  # shards of an earlier push that are not written anew
        )
    return commit.pr_url or commit.commit_url


def download_cache(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The cache folder of a data set that :func:`push_cache` made, kept below ``HF_HOME`` for each commit.

    Raises:
        ValueError: if the repository holds no cache, or parquet files that do not fit its ``cache.json``.
    """
    hub = {"repo_id": repo_id, "repo_type": "dataset", "token": token}
    try:
        info_path = Path(huggingface_hub.hf_hub_download(filename=INFO_FILE, revision=revision, **hub))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repo_id!r} is neither a folder nor a data set on the Hub with a {INFO_FILE} (revision {revision!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    commit = info_path.parent.name
    target = Path(huggingface_hub.constants.HF_HOME) / "hfgen" / "caches" / repo_id.replace("/", "--") / commit
    if (target / INFO_FILE).is_file():
        return target
    info = read_info(info_path)
    snapshot = huggingface_hub.snapshot_download(revision=commit, allow_patterns="data/*.parquet", **hub)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{commit}.", suffix=".tmp", dir=target.parent))
    try:
        _read_parquet(sorted((Path(snapshot) / "data").glob("*.parquet")), info, temporary)
        shutil.copyfile(info_path, temporary / INFO_FILE)
        TokenCache(temporary)
        os.rename(temporary, target)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if (target / INFO_FILE).is_file():  # another process was faster
            return target
        raise ValueError(f"The data set {repo_id} at {commit} is no sound cache: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("%s at %s: %d rows in %s.", repo_id, commit, info.num_rows, target)
    return target


def _features(info: CacheInfo) -> datasets.Features:
    """One row per image; the sizes are part of the types."""
    tokens = datasets.Value(info.dtype)
    for size in (*reversed(info.row_shape), info.num_variants):
        tokens = datasets.List(tokens, length=size)
    names = list(info.class_names)
    columns = {info.kind: tokens, "label": datasets.ClassLabel(names=names) if names else datasets.Value("int64")}
    if info.num_caption_bytes is not None:
        columns["caption"] = datasets.Value("string")
    return datasets.Features(columns)


def _write_parquet(cache: TokenCache, folder: Path, *, progress: bool) -> None:
    folder.mkdir()
    tokens, labels, schema = cache.tokens, cache.labels, _features(cache.info).arrow_schema
    rows = min(max(_SHARD_BYTES // tokens[0].nbytes, 1), len(cache))
    starts = range(0, len(cache), rows)
    for number, first in enumerate(tqdm(starts, desc="parquet files", disable=not progress)):
        last = min(first + rows, len(cache))
        column = pyarrow.array(tokens[first:last].reshape(-1))
        for size in reversed(tokens.shape[1:]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, size)
        columns = [column, pyarrow.array(labels[first:last].astype(np.int64))]
        if cache.has_captions:
            columns.append(pyarrow.array([cache.caption(index) for index in range(first, last)], pyarrow.string()))
        pyarrow.parquet.write_table(
            pyarrow.Table.from_arrays(columns, schema=schema),
            folder / f"train-{number:05d}-of-{len(starts):05d}.parquet",
            row_group_size=_BATCH_ROWS,
        )


def _read_parquet(files: list[Path], info: CacheInfo, folder: Path) -> None:
    """Fill the arrays of a cache in ``folder``; a ``ValueError`` or an error of arrow if the files do not fit."""
    expected = _features(info).arrow_schema
    num_rows = 0
    for path in files:  # before anything of the size that cache.json claims is allocated
        metadata, schema = pyarrow.parquet.read_metadata(path), pyarrow.parquet.read_schema(path)
        for field in expected:
            if field.name not in schema.names or schema.field(field.name).type != field.type:
                raise ValueError(f"{path.name} has no column {field.name!r} of type {field.type}")
        num_rows += metadata.num_rows
    if num_rows != info.num_rows:
        raise ValueError(f"its {len(files)} parquet files have {num_rows} rows, {INFO_FILE} says {info.num_rows}")
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in info.arrays().items()
    }
    row = text = 0
    for batch in _batches(files, expected.names):
        last = row + batch.num_rows
        column = batch.column(info.kind)
        while pyarrow.types.is_fixed_size_list(column.type):
            column = column.flatten()
        arrays[info.kind][row:last] = column.to_numpy().reshape(batch.num_rows, info.num_variants, *info.row_shape)
        arrays["labels"][row:last] = batch.column("label").to_numpy()
        if info.num_caption_bytes is not None:
            for index, caption in enumerate(batch.column("caption").to_pylist(), start=row):
                encoded = np.frombuffer(f"{caption}\n".encode(), np.uint8)
                arrays["captions"][text : text + len(encoded)] = encoded
                text += len(encoded)
                arrays["caption_ends"][index] = text
        row = last
    for array in arrays.values():
        array.flush()


def _batches(files: list[Path], columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    for path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)


def _make_card(info: CacheInfo, repo_id: str) -> huggingface_hub.DatasetCard:
    data = huggingface_hub.DatasetCardData(
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        tags=["hfgen", "image-tokens"],
        task_categories=["unconditional-image-generation"],
    )
    text = _CARD.format(
        repo_id=repo_id,
        kind=info.kind,
        dtype=info.dtype,
        dataset=info.preprocessing.get("dataset", "images"),
        tokenizer=info.tokenizer.name or f"a {info.tokenizer.class_name}",
        num_rows=info.num_rows,
        variants="" if info.num_variants == 1 else f" in {info.num_variants} augmented versions each",
        shape=" x ".join(map(str, (info.num_variants, *info.row_shape))),
        caption_row="" if info.num_caption_bytes is None else "| `caption` | text |\n",
    )
    return huggingface_hub.DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
