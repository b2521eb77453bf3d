import json
import logging
import pickle
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.data.rows import BrokenImageError, decode_image
from hfgen.data.sources import load_images


def picture(width=24, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.fixture
def class_folder(tmp_path):
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for k in range(3):
            picture(seed=10 * number + k).save(tmp_path / name / f"{k}.png")
    return tmp_path


def break_images(folder):
    """A text file, a cut-off JPEG and a decompression bomb among readable images."""
    (folder / "cat" / "1.png").write_text("this is not an image")
    picture(200, 200).save(folder / "dog" / "0.jpg")
    data = (folder / "dog" / "0.jpg").read_bytes()
    (folder / "dog" / "0.jpg").write_bytes(data[: len(data) // 2])
    (folder / "dog" / "1.png").write_bytes(png_header(30000, 30000))
    return {"cat/1.png", "dog/0.jpg", "dog/1.png"}


def test_class_folders(class_folder):
    (class_folder / "empty").mkdir()
    (class_folder / "dog" / "notes.txt").write_text("not listed")
    data = load_images(str(class_folder), resolution=16)
    assert data.class_names == ["cat", "dog"] and data.num_classes == 2 and len(data) == 6
    assert [data[k]["label"] for k in range(6)] == [0, 0, 0, 1, 1, 1]
    item = data[(0, 4)]
    assert item["pixels"].dtype == torch.uint8 and item["pixels"].shape == (3, 16, 16)
    assert item["index"] == 4 and item["skipped"] == () and "caption" not in item
    assert len(load_images(str(class_folder), resolution=16, limit=2)) == 2


def test_split_folders(class_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    class_folder.rename(root / "train")
    assert load_images(str(root), resolution=8).class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"no split 'test'.*\['train'\]"):
        load_images(str(root), resolution=8, split="test")


def test_metadata_captions_and_labels(tmp_path):
    rows = []
    for k, (text, label) in enumerate([("a red circle", "b"), ("two things", "a"), (None, "b")]):
        picture(seed=k).save(tmp_path / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "text": text, "kind": label})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_images(str(tmp_path), resolution=16)
    assert [data[k]["caption"] for k in range(3)] == ["a red circle", "two things", ""]
    assert data.has_captions and data[0]["label"] == -1
    with pytest.raises(ValueError, match="no class labels.*label"):
        _ = data.num_classes
    data = load_images(str(tmp_path), resolution=16, label_column="kind")
    assert data.class_names == ["a", "b"] and [data[k]["label"] for k in range(3)] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"row 1 has no field 'nope'.*'kind'"):
        load_images(str(tmp_path), resolution=16, caption_column="nope")


def test_broken_images_are_named_once_and_replaced(class_folder, caplog):
    broken = break_images(class_folder)
    data = load_images(str(class_folder), resolution=16)
    assert len(data) == 7
    with caplog.at_level(logging.WARNING):
        items = [data[(epoch, k)] for epoch in range(2) for k in range(7)]
    for name in broken:
        assert caplog.text.count(f"{name}:") == 1
    assert [item["index"] for item in items[:7]] == [0, 2, 2, 4, 4, 6, 6]
    assert [len(item["skipped"]) for item in items[:7]] == [0, 1, 0, 1, 0, 1, 0]
    assert items[1]["skipped"][0].endswith("cat/1.png")
    assert [item["skipped"] for item in items[7:]] == [item["skipped"] for item in items[:7]]
    assert items[3]["label"] == 1 and torch.equal(items[3]["pixels"], items[4]["pixels"])


def test_strict_loading_names_the_file(class_folder):
    break_images(class_folder)
    data = load_images(str(class_folder), resolution=16, strict=True)
    assert data[0]["skipped"] == ()
    for index, name in ((1, r"cat/1\.png"), (3, r"dog/0\.jpg"), (5, r"dog/1\.png")):
        with pytest.raises(BrokenImageError, match=f"{name}.*strict=False"):
            data[index]


def test_the_last_image_is_followed_by_the_first(class_folder):
    (class_folder / "dog" / "2.png").write_bytes(b"")
    assert load_images(str(class_folder), resolution=16)[5]["index"] == 0


def test_all_images_broken(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(b"nothing")
    with pytest.raises(BrokenImageError, match=r"none of the 2 images.*1\.png"):
        load_images(str(tmp_path), resolution=16)[1]


def test_sources_that_cannot_be_opened(tmp_path, class_folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images.*metadata.jsonl"):
        load_images(str(tmp_path / "empty"), resolution=16)
    with pytest.raises(ValueError, match="'./missing' is not a folder"):
        load_images("./missing", resolution=16)
    with pytest.raises(ValueError, match="'shapes:triple' is unknown.*'shapes:double'"):
        load_images("shapes:triple", resolution=16)
    with pytest.raises(ValueError, match="'label' was asked for.*no metadata.jsonl"):
        load_images(str(class_folder), resolution=16, label_column="label")
    (class_folder / "stray.png").write_bytes(b"")
    with pytest.raises(ValueError, match="stray.png.*cat"):
        load_images(str(class_folder), resolution=16)

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="'some/where'.*'shapes', a local folder.*offline"):
        load_images("some/where", resolution=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": "middle"}, "crop 'middle'"),
        ({"resample": "nearest"}, "resample 'nearest'"),
        ({"resize_ratio": 0.5}, "resize_ratio is 0.5"),
        ({"crop": "adm", "resize_ratio": 1.125}, "exactly 1"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_options(class_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(str(class_folder), resolution=16, **arguments)


def test_random_crops_and_flips_repeat_by_seed_epoch_and_index(class_folder):
    def epoch(number, **options):
        options = {"crop": "random", "resize_ratio": 1.5, "flip": True, "seed": 0, **options}
        data = load_images(str(class_folder), resolution=16, **options)
        return torch.stack([data[(number, k)]["pixels"] for k in range(6)])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))
    assert not torch.equal(epoch(0), epoch(0, seed=1))
    plain, flipped = epoch(0, flip=False), epoch(0)
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(plain, flipped)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert all(a or b for a, b in zip(mirrored, same))
    data = load_images(str(class_folder), resolution=16, flip=True)
    sides = [torch.equal(data[(k, 0)]["pixels"], data[(0, 0)]["pixels"]) for k in range(20)]
    assert 3 < sum(sides) < 17


def test_built_in_shapes():
    data = load_images("shapes", resolution=16, limit=6)
    assert data.num_classes == 24 and len(data) == 6 and data[0]["pixels"].shape == (3, 16, 16)
    assert " and " in load_images("shapes:double", resolution=16, limit=2)[0]["caption"]
    validation = load_images("shapes", resolution=16, limit=6, split="validation")
    assert not any(torch.equal(validation[k]["pixels"], data[k]["pixels"]) for k in range(6))
    with pytest.raises(ValueError, match="flip=False"):
        load_images("shapes", resolution=16, flip=True)


def hub_data():
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y"]),
            "text": datasets.Value("string"),
            "size": datasets.Value("int64"),
        }
    )
    images = [picture(seed=k) for k in range(3)]
    rows = {"picture": images, "kind": [1, 0, 1], "text": ["a", None, "c"], "size": [0, 1, 2]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub_data_sets(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *args, **kwargs: hub_data())
    data = load_images("user/name", resolution=16)
    assert data.class_names == ["x", "y"] and [data[k]["label"] for k in range(3)] == [1, 0, 1]
    assert [data[k]["caption"] for k in range(3)] == ["a", "", "c"]
    by_size = load_images("user/name", resolution=16, label_column="size")
    assert by_size.num_classes == 3 and by_size[2]["label"] == 2
    for options, message in (
        ({"image_column": "image"}, r"no column 'image'.*'picture'"),
        ({"image_column": "text"}, "'text'.*not images"),
        ({"label_column": "sort"}, "no column 'sort'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images("user/name", resolution=16, **options)


def test_configuration_and_revision_reach_the_hub(monkeypatch, class_folder):
    asked = []

    def load_dataset(source, *arguments, **options):
        asked.append((source, *arguments, options))
        return hub_data()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_images("user/name", resolution=16, config_name="large", revision="v2")
    assert asked == [("user/name", "large", {"split": "train", "revision": "v2"})]
    for options in ({"config_name": "large"}, {"revision": "v2"}, {"num_classes": 2}):
        for source in (str(class_folder), "shapes"):
            with pytest.raises(ValueError, match=f"{next(iter(options))} is .*has no such option: leave it out"):
                load_images(source, resolution=16, **options)


def test_captions_are_read_without_images(tmp_path, class_folder):
    rows = [{"file_name": f"{k}.png", "caption": text} for k, text in enumerate(["one", "two", ""])]
    folder = tmp_path / "captions"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(load_images(str(folder), resolution=16).captions()) == ["one", "two", ""]
    (folder / "metadata.jsonl").unlink()
    folder.rmdir()
    with pytest.raises(ValueError, match="has no captions: add them to metadata.jsonl"):
        load_images(str(class_folder), resolution=16).captions()


def test_saved_data_sets_and_parquet_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_data().save_to_disk(tmp_path / "saved")
    assert load_images(str(tmp_path / "saved"), resolution=16)[2]["caption"] == "c"
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    hub_data().to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    data = load_images(str(tmp_path / "parquet"), resolution=16)
    assert data.class_names == ["x", "y"] and len(data) == 3


def test_broken_rows_of_data_sets(monkeypatch):
    values = [{"bytes": b"nothing", "path": None}, None, {"bytes": png_header(30000, 30000), "path": None}]
    good = hub_data().cast_column("picture", datasets.Image(decode=False))[0]["picture"]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [*values, good]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *args, **kwargs: rows)
    item = load_images("user/name", resolution=16)[0]
    assert item["index"] == 3
    assert item["skipped"] == tuple(f"the data set user/name row {k}" for k in range(3))


def test_workers_read_the_same_items(class_folder):
    break_images(class_folder)
    data = load_images(str(class_folder), resolution=16, crop="random", resize_ratio=1.25)
    data = pickle.loads(pickle.dumps(data))
    keys = [(3, k) for k in range(7)]
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=keys, num_workers=2)
    for key, item in zip(keys, loader):
        assert torch.equal(item["pixels"], data[key]["pixels"])
        assert tuple(item["skipped"]) == data[key]["skipped"]


def decoded(image, path, **options):
    image.save(path, **options)
    result = decode_image(path, str(path))
    assert result.mode == "RGB"
    return np.asarray(result)


def test_modes_become_rgb(tmp_path):
    rgb = picture(8, 6)
    array = np.asarray(rgb)
    grey = np.asarray(rgb.convert("L"))
    np.testing.assert_array_equal(decoded(rgb.convert("L"), tmp_path / "l.png"), np.stack([grey] * 3, axis=-1))
    palette = rgb.quantize(16)
    np.testing.assert_array_equal(decoded(palette, tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(deep, tmp_path / "i.png")[..., 1], grey)
    assert decoded(rgb.convert("CMYK"), tmp_path / "c.jpg").shape == array.shape

    alpha = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    rgba = Image.fromarray(np.dstack([array, alpha]))
    weight = alpha[..., None] / 255
    expected = weight * array + (1 - weight) * 255
    np.testing.assert_allclose(decoded(rgba, tmp_path / "a.png"), expected, atol=1)
    transparent = Image.new("P", (4, 4), 0)
    transparent.putpalette([255, 0, 0] + [0] * 765)
    assert (decoded(transparent, tmp_path / "t.png", transparency=0) == 255).all()
    with pytest.raises(BrokenImageError, match="floats of unknown range"):
        decoded(Image.new("F", (4, 4)), tmp_path / "f.tiff")


def test_exif_orientation_is_applied(tmp_path):
    image = picture(8, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    expected = np.asarray(image.rotate(-90, expand=True))
    np.testing.assert_array_equal(decoded(image, tmp_path / "e.png", exif=exif), expected)
