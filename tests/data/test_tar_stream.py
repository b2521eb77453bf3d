from __future__ import annotations

import http.server
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.data import shards, web_file
from hfgen.data.rows import BrokenImageError
from hfgen.data.shards import BrokenShardError, expand_braces, list_shards
from hfgen.data.sources import load_images
from hfgen.data.tar_stream import TarImages
from support.hub_server import HubServer
from support.tars import png, write_shards, write_tar
from support.torchrun import environment

COUNTS = (4, 3, 5, 4, 2)
TOTAL = sum(COUNTS)


def stream(source, **options) -> TarImages:
    return load_images(str(source), **{"resolution": 8, "shuffle_buffer": 3, **options})


def keys(items) -> list[str]:
    return [item["name"].rpartition(" ")[2] for item in items]


def assert_equal_items(actual, expected) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert torch.equal(one["pixels"], other["pixels"])
        assert {k: v for k, v in one.items() if k != "pixels"} == {k: v for k, v in other.items() if k != "pixels"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_shards(tmp_path / "shards", COUNTS)


# ----------------------------------------------------------------------------------------------------------- items


def test_items(folder):
    data = stream(folder)
    assert data.class_names == ["class 0", "class 1", "class 2"] and data.num_classes == 3 and data.has_captions
    items = list(data)
    assert keys(items) == [f"{k:04d}" for k in range(TOTAL)]
    item = items[5]
    assert item["pixels"].dtype == torch.uint8 and item["pixels"].shape == (3, 8, 8)
    assert item["label"] == 5 % 3 and item["caption"] == "picture number 5" and item["skipped"] == ()
    assert item["index"] == (1 << 32) + 1
    assert list(data.captions()) == [f"picture number {k}" for k in range(TOTAL)]
    with pytest.raises(TypeError, match="are a stream"):
        len(data)


def test_fields_of_json(tmp_path):
    record = {"caption": "a cat", "kind": 1, "title": "tom"}
    members = {"x/a.b.json": b"", "x/a.JPG": png(0), "x/a.json": json.dumps(record).encode()}
    path = write_tar(tmp_path / "a.tar", members)
    item = next(iter(stream(path)))
    assert item["caption"] == "a cat" and item["label"] == -1
    item = next(iter(stream(path, caption_column="title", label_column="kind", num_classes=2)))
    assert item["caption"] == "tom" and item["label"] == 1
    with pytest.raises(ValueError, match=r"no 'sort' in the first sample.*'kind'"):
        stream(path, label_column="sort")
    with pytest.raises(ValueError, match="no class labels.*label_column"):
        _ = stream(path).num_classes


def test_image_column_is_an_extension(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(0), "a.seg.png": png(1)})
    plain, chosen = (next(iter(stream(path, **options)))["pixels"] for options in ({}, {"image_column": "seg.png"}))
    assert not torch.equal(plain, chosen)


def test_number_of_classes(folder, tmp_path):
    (folder / "classes.txt").unlink()
    with pytest.raises(ValueError, match="pass num_classes, or put classes.txt"):
        _ = stream(folder).num_classes
    assert stream(folder, num_classes=3).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="0002 has the label 2.*said to have 2 classes"):
        list(stream(folder, num_classes=2))
    (folder / "classes.json").write_text('["a", "b", "c"]')
    assert stream(folder).class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="num_classes is 4, but the list of classes.*has 3 names"):
        stream(folder, num_classes=4)


def test_augmentation_is_a_function_of_seed_epoch_and_sample(folder):
    options = {"crop": "random", "resize_ratio": 1.5, "flip": True}

    def by_key(seed, lanes, count):
        data = stream(folder, seed=seed, **options)
        items = [item for lane in range(lanes) for item in islice(data.stream(lane, lanes), count)]
        return {item["name"]: item["pixels"] for item in items}

    whole, dealt = by_key(0, 1, TOTAL), by_key(0, 5, 2)
    assert all(torch.equal(whole[name], pixels) for name, pixels in dealt.items())
    other = by_key(1, 1, TOTAL)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    data = stream(folder, **options)
    second = {item["name"]: item["pixels"] for item in islice(data.stream(start=TOTAL), TOTAL)}
    assert not all(torch.equal(whole[name], second[name]) for name in whole)


# ----------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_every_epoch_is_read_once_by_all_lanes_together(folder, lanes):
    """Five shards: with 2 or 3 lanes the lanes have different numbers of them in an epoch."""
    data = stream(folder)
    orders = [data._order(lane, lanes, 0) for lane in range(lanes)]
    seen = {epoch: [] for epoch in range(5)}
    for order in orders:
        for epoch, sample in order:
            if epoch == 5:
                break
            seen[epoch].append(sample.key)
    for names in seen.values():
        assert sorted(names) == [f"{k:04d}" for k in range(TOTAL)]
    assert len({tuple(names) for names in seen.values()}) == 5


def test_lanes_take_turns_with_the_longer_share(folder):
    """In the sequence of all epochs' shards the lanes differ by one shard at most."""
    data = stream(folder)
    shares = np.array([[len(data._lane_shards(epoch, lane, 2)) for lane in range(2)] for epoch in range(4)])
    assert shares.tolist() == [[3, 2], [2, 3], [3, 2], [2, 3]]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_later_start_is_the_rest_of_the_stream(folder, lanes):
    data = stream(folder, crop="random", resize_ratio=1.5)
    straight = list(islice(data.stream(0, lanes), 45))
    for start in (0, 1, 7, TOTAL // lanes, TOTAL, 30, 41):
        for used in (data, stream(folder, crop="random", resize_ratio=1.5)):  # one knows the shards, one does not
            assert_equal_items(list(islice(used.stream(0, lanes, start), 45 - start)), straight[start:])


def test_known_epochs_are_skipped_without_reading(folder, monkeypatch):
    data = stream(folder)
    list(islice(data.stream(), TOTAL + 1))
    opened = []
    monkeypatch.setattr(shards, "open_file", lambda name: opened.append(name) or open(name, "rb"))
    next(data.stream(start=1000 * TOTAL))
    assert len(opened) <= len(COUNTS)


def test_shuffle_buffer(folder):
    ordered = keys(islice(stream(folder, shuffle_buffer=1).stream(), TOTAL))
    assert sorted(ordered) == [f"{k:04d}" for k in range(TOTAL)]
    steps = np.diff(np.array(ordered, dtype=int))
    assert (steps == 1).sum() >= TOTAL - len(COUNTS)
    mixed = keys(islice(stream(folder, shuffle_buffer=4).stream(), TOTAL))
    assert sorted(mixed) == sorted(ordered) and mixed != ordered
    # A sample can wait for long, but never comes more than a buffer too early.
    assert all(ordered.index(key) - place < 4 for place, key in enumerate(mixed))
    assert keys(islice(stream(folder, shuffle_buffer=4, seed=1).stream(), TOTAL)) != mixed


def test_too_few_shards(folder):
    with pytest.raises(ValueError, match="are 5, which cannot feed 6 lanes"):
        next(stream(folder).stream(0, 6))


# ----------------------------------------------------------------------------------------------------------- names


def test_names_of_shards(folder, tmp_path, monkeypatch):
    names = [str(folder / f"{k:02d}.tar") for k in range(5)]
    assert (
        list_shards(str(folder)) == list_shards(f"{folder}/*.tar") == list_shards(f"{folder}/{{00..04}}.tar") == names
    )
    assert list_shards(f"{folder}/{{03,01}}.tar") == [names[3], names[1]]
    monkeypatch.chdir(folder)
    assert list_shards("0[12].tar") == ["01.tar", "02.tar"]
    assert expand_braces("{a,b}-{8..10}") == ["a-8", "a-9", "a-10", "b-8", "b-9", "b-10"]
    assert expand_braces("{098..100}") == ["098", "099", "100"]
    splits = tmp_path / "splits"
    write_shards(splits / "train")
    write_shards(splits / "validation", (1,))
    assert len(stream(splits).shards) == 5 and len(stream(splits, split="validation").shards) == 1
    for source, options, message in (
        (f"{folder}/{{00..05}}.tar", {}, r"no tar file '.*05\.tar'"),
        (f"{folder}/no*.tar", {}, "no tar file matches"),
        (f"{folder}/{{4..1}}.tar", {}, "empty range"),
        (folder, {"split": "test"}, "no split 'test'"),
        (f"{folder}/*.tar", {"split": "test"}, "only a folder of tar files"),
        ("https://example.org/*.tar", {}, "a web server cannot list files"),
        ("hf://datasets/a/b/c.tar.gz", {}, "not a tar file"),
        (folder, {"limit": 3}, "limit is 3.*no such option"),
        (folder, {"shuffle_buffer": 0}, "shuffle_buffer is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(source, **options)


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        stream(write_tar(tmp_path / "a.tar", {"README.md": b"hello"}))
    path = write_tar(tmp_path / "b.tar", {f"{k}.png": b"no" for k in range(3)})
    with pytest.raises(BrokenImageError, match="1000 samples in a row cannot be read"):
        next(stream(path).stream())


# ------------------------------------------------------------------------------------------------- broken members


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Seven samples, of which 1 (no image), 2 (bad image), 4 (bad label) and 5 (a label only) cannot be shown."""
    members = {}
    for k in range(7):
        if k != 5:
            members[f"{k}.png"] = b"no image" if k in (1, 2) else png(k)
        members[f"{k}.cls"] = b"seven" if k == 4 else b"0"
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "classes.txt").write_text("one\n")
    return tmp_path


def test_broken_samples_are_named_skipped_and_counted(damaged, caplog):
    data = stream(damaged, shuffle_buffer=1)
    with caplog.at_level(logging.WARNING):
        items = list(islice(data.stream(), 14))
    assert keys(items) == ["0", "3", "3", "3", "6", "6", "6"] * 2
    assert [len(item["skipped"]) for item in items] == [0, 2, 1, 0, 2, 1, 0] * 2
    assert items[1]["skipped"] == (f"{damaged}/a.tar: 1", f"{damaged}/a.tar: 2")
    for reason in ("1.png: cannot identify", "4: its label is 'seven'", "5: it has no image"):
        assert caplog.text.count(reason) == 1
    assert keys(data) == ["0", "3", "6"]
    for start in range(14):
        fresh = stream(damaged, shuffle_buffer=1)
        assert_equal_items(list(islice(fresh.stream(start=start), 14 - start)), items[start:])


def test_strict(damaged):
    items = stream(damaged, shuffle_buffer=1, strict=True).stream()
    next(items)
    with pytest.raises(BrokenImageError, match=r"a\.tar: 1\.png.*strict=False"):
        next(items)


# --------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("keep", ["header", "body", "no end mark", "half a header"])
def test_a_cut_off_tar_is_named(tmp_path, keep):
    path = write_tar(tmp_path / "a.tar", {f"{k}.png": png(k) for k in range(3)})
    with tarfile.open(path) as archive:
        last = archive.getmembers()[2]
    sizes = {
        "header": last.offset + 512,
        "body": last.offset_data + 100,
        "no end mark": last.offset_data + -(-last.size // 512) * 512,
        "half a header": last.offset + 100,
    }
    os.truncate(path, sizes[keep])
    with pytest.raises(
        BrokenShardError, match=r"cannot read the tar file .*a\.tar: it (ends after|has) \d+ bytes.*cut off"
    ):
        list(stream(path))


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{k}.png": png(k) for k in range(3)})
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[1].offset
    _overwrite(path, offset, b"x" * 200)
    with pytest.raises(BrokenShardError, match=f"header at byte {offset} is damaged"):
        list(stream(path))
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(BrokenShardError, match="invalid header"):
        stream(path)
    path.write_bytes(b"")
    with pytest.raises(BrokenShardError, match="empty file"):
        stream(path)


def test_joined_tars_do_not_lose_the_second(tmp_path):
    paths = [write_tar(tmp_path / f"{k}.tar", {f"{k}.png": png(k)}) for k in range(2)]
    paths[0].write_bytes(b"".join(path.read_bytes() for path in paths))
    with pytest.raises(BrokenShardError, match="joined must be split"):
        list(stream(paths[0]))


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, format: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, max(size, 0)
    data = bytearray(info.tobuf(format))
    if size < 0:
        data[124:136] = (256**12 + size).to_bytes(12, "big")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_header("b.png", 10**15), r"it has \d+ bytes, but a header reaches to 1000000"),
        (_header("b.png", -1024), "has the size -1024|invalid"),
        (_header("././@LongLink", 10**12, tarfile.GNUTYPE_LONGNAME), "a header asks for 10000000+"),
        (_header("././@PaxHeader", 10**12, tarfile.XHDTYPE), "a header asks for 10000000+"),
        (_header("././@PaxHeader", -512, tarfile.XHDTYPE), "a header asks for -512|invalid"),
        (_header("././@PaxHeader", 0, tarfile.XGLTYPE) * 3000, "nested too deeply|invalid header"),
    ],
    ids=["size", "negative size", "long name", "pax", "negative pax", "pax chain"],
)
def test_absurd_headers(tmp_path, data, message):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(0)})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[0]
    end = member.offset_data + -(-member.size // 512) * 512
    path.write_bytes(whole[:end] + data + bytes(1024))
    with pytest.raises(BrokenShardError, match=message):
        list(stream(path))


def test_names_and_kinds_of_members_do_no_harm(tmp_path):
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
    device = tarfile.TarInfo("c.png")
    device.type = tarfile.CHRTYPE
    hard = tarfile.TarInfo("d.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/passwd"
    members = {
        "../../escape.png": png(0), "/absolute.png": png(1), "b": link, "c": device, "d": hard, ".hidden.png": png(2),
        "._e.png": b"", "e/e.png": png(3),
    }  # fmt: skip
    path = write_tar(tmp_path / "deep" / "folder" / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    assert keys(stream(path)) == ["../../escape", "absolute", "e/e"]
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path / "escape.png").exists()


def test_large_members_and_bombs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 5000)
    monkeypatch.setattr(shards.MemberReader.read, "__defaults__", (5000,))
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, format="PNG")  # fifty kilobytes that decode to gigabytes
    deep = b"[" * 100000 + b"]" * 100000
    members = {
        "0.png": png(0), "0.json": b"{}", "1.png": bytes(6000), "2.png": buffer.getvalue()[:4000],
        "3.png": png(3), "3.json": deep, "4.png": png(4), "4.json": b'{"text": 3}', "5.png": png(5), "5.json": b"[]",
    }  # fmt: skip
    members["0.json"] = b'{"text": "fine"}'
    data = stream(write_tar(tmp_path / "a.tar", members))
    with caplog.at_level(logging.WARNING):
        assert keys(data) == ["0"]
    for reason in (
        "1.png: it has 6000 bytes", "2.png: Image size (400000000 pixels)", "3.json", "4: its caption is 3",
        "5.json: expected an object",
    ):  # fmt: skip
        assert reason in caplog.text


# ----------------------------------------------------------------------------------------------------- remote files


def test_remote_streams_equal_local_ones(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/stream/{path.name}", path.read_bytes())
    try:
        local, remote = stream(folder), stream("memory://stream/*.tar")
        assert remote.class_names == local.class_names and len(remote.shards) == 5
        for lane in range(2):
            assert [
                (item["label"], item["caption"], item["index"], item["pixels"].tolist())
                for item in islice(remote.stream(lane, 2, 3), 20)
            ] == [
                (item["label"], item["caption"], item["index"], item["pixels"].tolist())
                for item in islice(local.stream(lane, 2, 3), 20)
            ]
    finally:
        memory.rm("/stream", recursive=True)


HUB_CLIENT = """
import sys
from huggingface_hub import HfApi
from hfgen.data.sources import load_images
api = HfApi()
api.create_repo("tester/tars", repo_type="dataset")
api.upload_folder(repo_id="tester/tars", repo_type="dataset", folder_path=sys.argv[1])
remote = load_images("hf://datasets/tester/tars/*.tar", resolution=8)
local = load_images(sys.argv[1], resolution=8)
assert remote.class_names == local.class_names and len(remote.shards) == 5
same = [a["pixels"].equal(b["pixels"]) and a["caption"] == b["caption"] for a, b in zip(remote, local, strict=True)]
assert len(same) == 18 and all(same)
try:
    load_images("hf://datasets/tester/tars/99.tar", resolution=8)
except ValueError as error:
    assert "cannot read the tar file hf://datasets/tester/tars/99.tar" in str(error), error
else:
    raise AssertionError("a missing shard was opened")
"""


def test_streams_from_the_hub(folder, tmp_path):
    with HubServer() as server:
        child = {**environment(), **server.environment(str(tmp_path / "home"))}
        command = [sys.executable, "-c", HUB_CLIENT, str(folder)]
        result = subprocess.run(command, env=child, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        downloads = [request for request in server.requests if "/resolve/" in request and ".tar" in request]
        assert downloads


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder, closes every connection after ``limit`` bytes, and can continue inside of a file."""

    folder, limit, ranges = None, 3000, True

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first : first + self.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(web_file, "RETRY_SECONDS", (0, 0, 0))
    monkeypatch.setattr(_Handler, "folder", folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_web_streams_survive_broken_connections(server, folder, caplog):
    data = stream(f"{server}/{{00..04}}.tar")
    assert data.class_names == ["class 0", "class 1", "class 2"]
    expected = [item["pixels"] for item in stream(folder)]
    with caplog.at_level(logging.WARNING):
        assert all(map(torch.equal, (item["pixels"] for item in data), expected))
    assert "closed" in caplog.text and "trying again" in caplog.text


def test_web_streams_name_what_is_missing(server, monkeypatch):
    with pytest.raises(BrokenShardError, match="09.tar: HTTP Error 404"):
        stream(f"{server}/09.tar")
    monkeypatch.setattr(_Handler, "ranges", False)
    with pytest.raises(BrokenShardError, match="cannot continue inside of a file"):
        list(stream(f"{server}/02.tar"))


def test_streams_travel_to_workers(folder):
    data = pickle.loads(pickle.dumps(stream(folder)))
    assert_equal_items(list(islice(data.stream(), 20)), list(islice(stream(folder).stream(), 20)))
