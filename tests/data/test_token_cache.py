"""Reading caches: rows, versions, worker processes, the Hub, and files that nobody should trust."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from hfgen.data.cache_format import TokenizerIdentity, read_info, smallest_dtype
from hfgen.data.cache_hub import open_cache
from hfgen.data.token_cache import TokenCache
from support.caches import CLASS_NAMES, make_cache
from support.hub_server import HubServer

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_cache(tmp_path / "cache")


def test_items(folder):
    cache = TokenCache(folder)
    assert len(cache) == 6 and cache.num_classes == 3 and cache.class_names == list(CLASS_NAMES)
    item = cache[3, 4]  # epoch 3 shows version 1 of 2
    assert item["codes"].dtype == torch.int64
    assert item["codes"].tolist() == [450, 451, 452, 453, 454]
    assert (item["label"], item["index"], item["caption"]) == (1, 4, "r\u00f6w 4")
    assert cache[4]["codes"].tolist() == cache[2, 4]["codes"].tolist() == [400, 401, 402, 403, 404]
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"index {index} is outside of 0..5"):
            cache[0, index]


def test_a_cache_without_captions_and_classes(tmp_path):
    folder = make_cache(tmp_path / "cache", captions=False)
    np.save(folder / "labels.npy", np.full(6, -1, np.int32))
    info = read_info(folder / "cache.json")
    (folder / "cache.json").write_text(replace(info, class_names=()).to_json())
    cache = TokenCache(folder)
    assert not cache.has_captions and cache[0].keys() == {"codes", "label", "index"} and cache[0]["label"] == -1
    with pytest.raises(ValueError, match="has no class labels"):
        _ = cache.num_classes


def test_moments_come_as_they_are_stored(tmp_path, folder):
    moments = np.random.default_rng(0).normal(size=(6, 2, 8, 4, 4)).astype(np.float16)
    np.save(folder / "moments.npy", moments)
    _edit(folder, kind="moments", dtype="float16", row_shape=[8, 4, 4], codebook_size=None)
    value = TokenCache(folder)[1, 5]["moments"]
    assert value.dtype == torch.float16
    np.testing.assert_array_equal(value.numpy(), moments[5, 1])
    value.zero_()  # a copy: the file is not written


def test_worker_processes_map_the_files_themselves(folder):
    cache = TokenCache(folder)
    assert len(pickle.dumps(cache)) < 5000
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    loader = DataLoader(cache, sampler=keys, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    codes = torch.cat([batch["codes"] for batch in loader])
    assert torch.equal(codes, torch.stack([cache[key]["codes"] for key in keys]))


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_codes_take_the_smallest_dtype(size, dtype):
    assert smallest_dtype(size) == dtype


def test_tokenizers_are_told_apart():
    cached = TokenizerIdentity("VQ", {"num_codes": 8, "width": 4}, "aa", "runs/final")
    assert cached.differences(replace(cached, name="elsewhere")) == []
    assert "is a Other" in cached.differences(replace(cached, class_name="Other"))[0]
    differences = cached.differences(replace(cached, config={"num_codes": 9}, weights="bb"))
    assert [text.split(" is ")[0] for text in differences[:2]] == [
        "the tokenizer's num_codes",
        "the tokenizer's width",
    ]
    assert "weights are bb, the cache was made by aa (runs/final)" in differences[2]


def test_folders_that_are_no_cache(tmp_path, folder):
    with pytest.raises(ValueError, match="is not a cache: it has no cache.json"):
        TokenCache(tmp_path)
    (folder / "cache.json").unlink()
    (folder / "unfinished").mkdir()
    with pytest.raises(ValueError, match="unfinished: run the command that writes it again, and it continues"):
        TokenCache(folder)
    with pytest.raises(ValueError, match="is not a folder: expected a cache, or the id"):
        open_cache("./nothing")


# ------------------------------------------------------------------------------------------------ hostile files


def _edit(folder: Path, **changes) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 10**30}, "num_rows is 1000"),
        ({"num_rows": -6}, "num_rows is -6"),
        ({"num_rows": 6.0}, "num_rows is 6.0"),
        ({"num_rows": True}, "num_rows is True"),
        ({"num_rows": 7}, "describes uint16 of shape .7, 2, 5."),
        ({"num_variants": 0}, "num_variants is 0"),
        ({"row_shape": [2**20, 2**20]}, "product of row_shape is 1099511627776"),
        ({"row_shape": []}, "one to four sizes"),
        ({"row_shape": [-5]}, "row_shape is -5"),
        ({"row_shape": ["5"]}, "row_shape is '5'"),
        ({"kind": "../../labels"}, "kind is '../../labels'"),
        ({"kind": ["codes"]}, "kind is"),
        ({"dtype": "object"}, "dtype is 'object'"),
        ({"dtype": {}}, "dtype is"),
        ({"codebook_size": 10**9}, "codebook_size is 1000000000"),
        ({"num_caption_bytes": 2}, "num_caption_bytes is 2"),
        ({"class_names": "cat"}, "class_names is not a list"),
        ({"class_names": ["cat"]}, "labels from 0 to 2, but there are 1 classes"),
        ({"preprocessing": {"dataset": ["x"]}}, "preprocessing is not"),
        ({"tokenizer": "x"}, "tokenizer is 'x'"),
        ({"tokenizer": {"class_name": "x"}}, "tokenizer lacks"),
        ({"format_version": 2}, "format_version is 2, and this hfgen reads version 1"),
        ({"files": ["/etc/passwd"]}, "the unknown .'files'."),
    ],
    ids=str,
)
def test_hostile_descriptions(folder, changes, message):
    _edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        TokenCache(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100000, "is not JSON"),
        ("\x00", "is not JSON"),
        ("[]", "it holds a list"),
        (" " * (2**24 + 1), "more than the 16777216"),
    ],
    ids=["nested", "binary", "list", "huge"],
)
def test_damaged_descriptions(folder, text, message):
    (folder / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TokenCache(folder)


class _Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "x"))


def _header(shape: object) -> bytes:
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        _header((6, 2, 5)) + b"\x00" * 30,  # cut off
        _header((10**18, 2, 5)),
        _header((-6, 2, 5)),
        _header((2**70,)),
        _header("(" * 5000),
        _header("[" + "-" * 9000 + "1]"),
        _header("__import__('pathlib').Path('exploded').touch()"),
        b"PK\x03\x04" + b"\x00" * 100,
        pickle.dumps(_Bomb()),
    ],
    ids=["empty", "magic", "cut off", "absurd", "negative", "overflow", "nested", "deep", "call", "zip", "pickle"],
)
def test_hostile_arrays(folder, content, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "codes.npy").write_bytes(content)
    with pytest.raises(ValueError, match="codes.npy"):
        TokenCache(folder)
    assert not (folder / "exploded").exists()


def test_pickled_arrays_are_not_loaded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    np.save(folder / "codes.npy", np.array([_Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="codes.npy"):
        TokenCache(folder)
    assert not (folder / "exploded").exists()


def test_damaged_rows_are_named(folder):
    codes = np.load(folder / "codes.npy")
    codes[3, 1, 2] = 1000
    np.save(folder / "codes.npy", codes)
    ends = np.load(folder / "caption_ends.npy")
    ends[1] = 10**12
    np.save(folder / "caption_ends.npy", ends)
    cache = TokenCache(folder)
    with pytest.raises(ValueError, match="row 3 has codes from 350 to 1000, the codebook has 1000"):
        cache[1, 3]
    with pytest.raises(ValueError, match="caption_ends.npy is damaged at row 1"):
        cache[0, 1]


def test_a_missing_array_is_named(folder):
    (folder / "labels.npy").unlink()
    with pytest.raises(ValueError, match="labels.npy cannot be read.*--overwrite writes it again"):
        TokenCache(folder)


# -------------------------------------------------------------------------------------------------------- the Hub

CLIENT = """
import json, sys, datasets, numpy as np
from hfgen.data import cache_hub
stage, folder = sys.argv[1:]
if stage == "push":
    cache_hub._SHARD_BYTES = 80  # four rows of two versions of five codes
    for _ in range(2):
        cache_hub.push_cache(folder, "tester/codes", progress=False)
else:
    cache, expected = cache_hub.open_cache("tester/codes"), cache_hub.open_cache(folder)
    again = cache_hub.open_cache("tester/codes")
    rows = datasets.load_dataset("tester/codes", split="train")
    errors = {}
    for name in ("tester/missing", "tester/hostile", "tester/short", "../../nothing"):
        try:
            cache_hub.open_cache(name)
        except ValueError as error:
            errors[name] = str(error)
    print(json.dumps({
        "equal": cache.info == expected.info and all(
            str(cache[epoch, index]) == str(expected[epoch, index]) for epoch in range(2) for index in range(6)
        ),
        "kept": cache.folder == again.folder != expected.folder,
        "row": {**rows[4], "features": str(rows.features)},
        "errors": errors,
    }))
"""


def _client(hub: HubServer, stage: str, folder: Path, home: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, stage, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", **hub.environment(str(home))},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_caches_are_published_as_data_sets(tmp_path, folder):
    with HubServer() as hub:
        _client(hub, "push", folder, tmp_path / "home-push")
        repository = hub.repositories["datasets/tester/codes"]
        files = repository.commits[repository.refs["main"]]
        assert len(repository.commits) == 2  # the empty one and the first push: the second changed nothing
        shards = [f"data/train-{number:05d}-of-00002.parquet" for number in range(2)]
        assert files.keys() - {".gitattributes"} == {"README.md", "cache.json", *shards}
        assert b"--cache tester/codes" in files["README.md"] and b"tester/tokenizer" in files["README.md"]

        short = shutil.copy(files_to(tmp_path / "shard.parquet", files[shards[0]]), tmp_path / "short.parquet")
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(short).drop_columns("codes"), short)
        hostile = {**files, shards[0]: Path(short).read_bytes()}
        for name, content in (("hostile", hostile), ("short", {k: v for k, v in files.items() if k != shards[0]})):
            hub.repositories[f"datasets/tester/{name}"] = other = type(repository)()
            other.commit("main", other.refs["main"], content)
        report = json.loads(_client(hub, "pull", folder, tmp_path / "home-pull"))
    assert report["equal"] and report["kept"]
    assert report["row"]["codes"] == [[400, 401, 402, 403, 404], [450, 451, 452, 453, 454]]
    assert (report["row"]["label"], report["row"]["caption"]) == (1, "r\u00f6w 4")
    assert "ClassLabel(names=['cat', 'dog', 'owl'])" in report["row"]["features"]
    assert "uint16" in report["row"]["features"]
    errors = report["errors"]
    assert "neither a folder nor a data set on the Hub" in errors["tester/missing"]
    assert "has no column 'codes'" in errors["tester/hostile"]
    assert "have 2 rows, cache.json says 6" in errors["tester/short"]
    assert "expected a cache, or the id" in errors["../../nothing"]


def files_to(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
