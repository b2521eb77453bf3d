"""Images and lists of images that were made to harm: each is named in an error, in little memory."""

from __future__ import annotations

import json
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import IterableDataset

from hfgen.data.rows import MAX_PIXELS, BrokenImageError, decode_image
from hfgen.data.sources import load_images
from support.bounded import assert_refused
from support.tars import png, write_tar

GREY, RGB = 0, 2  # colour types of PNG


def png_of_zeros(width: int, height: int, colour: int) -> bytes:
    """A valid PNG of kilobytes for any size; the pixels are all zero."""
    channels = {GREY: 1, RGB: 3}[colour]
    compressor = zlib.compressobj(9)
    rows = bytes((1 + width * channels) * 64)
    packed = b"".join(compressor.compress(rows) for _ in range(height // 64)) + compressor.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """177 million pixels, which Pillow would decode with a warning, in 180 kilobytes."""
    data = png_of_zeros(13312, 13312, GREY)
    assert len(data) < 2**18
    return data


def test_a_bomb_is_refused_before_it_is_decoded(bomb):
    assert_refused(lambda: decode_image(bomb, "bomb.png"), "bomb.png: 13312 x 13312 pixels", megabytes=100)


def test_a_header_alone_is_enough():
    claimed = bytearray(png(0))
    claimed[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    claimed[29:33] = struct.pack(">I", zlib.crc32(bytes(claimed[12:29])))
    assert_refused(lambda: decode_image(bytes(claimed), "bomb.png"), "bomb.png", megabytes=100)


def test_the_limit_leaves_room_for_cameras():
    assert 8000 * 8000 < MAX_PIXELS < Image.MAX_IMAGE_PIXELS


def test_bombs_in_every_source(tmp_path, bomb):
    folder = tmp_path / "folder" / "class"
    folder.mkdir(parents=True)
    (folder / "bomb.png").write_bytes(bomb)
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "bomb.png").write_bytes(bomb)
    (listed / "metadata.jsonl").write_text('{"file_name": "bomb.png"}\n')
    tar = write_tar(tmp_path / "shards" / "0.tar", {"0001.png": bomb})
    for source in (folder.parent, listed, tar):
        data = load_images(str(source), resolution=8, strict=True)
        assert_refused(partial(_first, data), "13312 x 13312", megabytes=100)


def _first(data) -> object:
    return next(iter(data)) if isinstance(data, IterableDataset) else data[0]


def test_only_the_formats_of_image_files_are_decoded(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(path) as image:
        assert image.format == "EPS"  # Pillow would start Ghostscript
    with pytest.raises(BrokenImageError, match="cannot identify"):
        decode_image(path, "image.png")


def test_named_pipes_and_devices_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        assert_refused(partial(decode_image, tmp_path / name, name), "not a regular file", seconds=10)


def test_a_link_to_another_kind_of_file_is_no_image(tmp_path):
    (tmp_path / "a.png").symlink_to("/etc/passwd")
    with pytest.raises(BrokenImageError, match="cannot identify") as error:
        decode_image(tmp_path / "a.png", "a.png")
    assert Path("/etc/passwd").read_text()[:20] not in str(error.value)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../outside.png", 3, None, ["a.png"]])
def test_lists_do_not_name_files_outside_their_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(png(0))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl row 1 names the file .*expected a path inside the folder"):
        load_images(str(folder), resolution=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [("[" * 200_000, "line 1 is not JSON"), ('["a.png"]', "line 1 is a list"), ("NaN", "line 1 is a float")],
    ids=["nested", "list", "number"],
)
def test_lines_that_are_no_rows(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    assert_refused(lambda: load_images(str(tmp_path), resolution=8), message)


def test_names_in_tars_lead_nowhere(tmp_path):
    tar = write_tar(tmp_path / "in" / "0.tar", {"../../escaped.png": png(0), "/escaped.png": png(1), "ok.png": png(2)})
    items = iter(load_images(str(tar), resolution=8))
    for _ in range(3):
        next(items)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["0.tar"]
