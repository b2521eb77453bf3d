"""Writing caches, by one process or several, killed or not, and training on them."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from hfgen.counters import generator
from hfgen.data.cache_format import INFO_FILE
from hfgen.data.token_cache import TokenCache
from hfgen.data.transforms import to_pixels
from hfgen.training import (
    CacheConfig,
    TokenTrainingConfig,
    Trainer,
    batch_codes,
    batch_latents,
    build_cache,
    cache_writer,
    parse_config,
    training_images,
    training_tokens,
)
from hfgen.training.batches import collate
from hfgen.training.history import History
from support.benchmark_modules import benchmark_modules
from support.example_runs import load_script
from support.instances import build_model
from support.torchrun import torchrun

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The tiny MultiScaleVQVAE of 8 x 8 images and 16 codes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_model("MultiScaleVQVAE").save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer():
    return build_model("MultiScaleVQVAE")


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Ten images of two classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for index in range(5):
            pixels = torch.randint(0, 256, (10, 12, 3), generator=generator(index, *name.encode()))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
    (folder / "dog" / "broken.png").write_bytes(b"not an image")
    return folder


def _config(folder: Path, **changes) -> CacheConfig:
    values = {"tokenizer": "tiny", "resolution": 8, "batch_size": 4, "limit": 22, "progress": False}
    return CacheConfig(output_dir=str(folder), **(values | changes))


def _arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".json")}


def test_every_version_is_that_of_its_epoch(tmp_path, tokenizer, photos, caplog):
    config = _config(tmp_path / "cache", dataset=str(photos), crop="random", flip=True, variants=3, limit=None)
    build_cache(config, tokenizer)
    cache, images = TokenCache(config.output_dir), training_images(config)
    assert (cache.info.num_rows, cache.class_names, cache.has_captions) == (11, ["cat", "dog"], False)
    assert cache.info.num_skipped == 1 and "1 unreadable images" in caplog.text
    for epoch in range(3):
        items = [images[epoch, index] for index in range(11)]
        expected = tokenizer.encode(to_pixels(torch.stack([item["pixels"] for item in items]))).codes
        assert torch.equal(torch.stack([cache[epoch, index]["codes"] for index in range(11)]), expected)
        assert [cache[epoch, index]["label"] for index in range(11)] == [item["label"] for item in items]
    assert not torch.equal(cache[0, 0]["codes"], cache[1, 0]["codes"])
    assert cache.tokens.dtype == np.uint8
    assert (tmp_path / "cache" / "cache_check.png").is_file()
    recorded = json.loads((tmp_path / "cache" / INFO_FILE).read_text())["preprocessing"]
    assert recorded["dataset"] == photos.name  # not the path: caches are published
    assert (recorded["flip"], recorded["crop"], recorded["resolution"], recorded["split"]) == (
        True,
        "random",
        8,
        "train",
    )


def test_captions_are_kept(tmp_path, tokenizer):
    config = _config(tmp_path / "cache", dataset="shapes:double")
    build_cache(config, tokenizer)
    cache, images = TokenCache(config.output_dir), training_images(config)
    assert [cache[index]["caption"] for index in range(22)] == [images[index]["caption"] for index in range(22)]
    assert {cache[index]["label"] for index in range(22)} == {-1}


def test_a_killed_writer_continues(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cache_writer, "_BLOCK_ROWS", 8)
    build_cache(_config(tmp_path / "straight"), tokenizer)
    encode, calls = cache_writer.encode_tokens, []

    def encode_and_die(tokenizer, pixels):
        calls.append(len(pixels))
        if len(calls) == 5:  # the first one asks for the shape: the second of three blocks is half done
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(tokenizer, pixels)

    monkeypatch.setattr(cache_writer, "encode_tokens", encode_and_die)
    child = os.fork()
    if child == 0:
        build_cache(_config(tmp_path / "killed"), tokenizer)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(ValueError, match="is unfinished: run the command that writes it again"):
        TokenCache(tmp_path / "killed")
    with pytest.raises(ValueError, match="holds another cache: its crop is center, not adm.*--overwrite"):
        build_cache(_config(tmp_path / "killed", crop="adm"), tokenizer)

    calls.clear()

    def count_and_encode(tokenizer, pixels):
        calls.append(len(pixels))
        return encode(tokenizer, pixels)

    monkeypatch.setattr(cache_writer, "encode_tokens", count_and_encode)
    build_cache(_config(tmp_path / "killed"), tokenizer)
    assert calls == [1, 4, 4, 4, 2]  # the shape, then the rows 8 to 21: the first block was done
    assert _arrays(tmp_path / "killed") == _arrays(tmp_path / "straight")
    assert not (tmp_path / "killed" / "unfinished").exists()
    build_cache(_config(tmp_path / "killed"), tokenizer)
    assert calls[5:] == [1]  # complete: nothing is encoded again


def test_two_processes_write_the_same_cache(tmp_path, tokenizer_folder, tokenizer):
    config = _config(tmp_path / "one", tokenizer=str(tokenizer_folder), batch_size=32, limit=1100)
    build_cache(config, tokenizer)
    arguments = ["--resolution", "8", "--limit", "1100", "--no_progress"]
    log = torchrun(
        EXAMPLES / "cache_tokens.py", "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "two", *arguments
    )
    assert log.count("2 of 2 blocks to do, 1 on this process of 2") == 2
    assert _arrays(tmp_path / "two") == _arrays(tmp_path / "one")


def test_overwrite_replaces_the_cache_and_nothing_else(tmp_path, tokenizer):
    folder = tmp_path / "cache"
    build_cache(_config(folder), tokenizer)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="num_rows is 22, not 9"):
        build_cache(_config(folder, limit=9), tokenizer)
    build_cache(_config(folder, limit=9, overwrite=True), tokenizer)
    assert len(TokenCache(folder)) == 9 and (folder / "notes.txt").read_text() == "mine"


def test_what_a_cache_cannot_hold(tmp_path, tokenizer, autoencoder, monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    monkeypatch.setattr("hfgen.training.tokens.training_images", lambda config: Stream())
    with pytest.raises(ValueError, match="needs a data set with a fixed number of rows"):
        build_cache(_config(tmp_path / "stream"), tokenizer)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="keeps one version of each image.*--variants 10"):
        _config(tmp_path / "one", flip=True)
    with pytest.raises(ValueError, match="--variants is 0"):
        _config(tmp_path / "one", variants=0)
    autoencoder.quant_conv.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="Row 0: the moments do not fit float16"):
        build_cache(_config(tmp_path / "large"), autoencoder)


# ------------------------------------------------------------------------------------------- continuous tokenizers


def test_latents_keep_the_posterior(tmp_path, autoencoder):
    config = _config(tmp_path / "cache")
    build_cache(config, autoencoder)
    cache, images = TokenCache(config.output_dir), training_images(config)
    assert cache.info.kind == "moments" and cache.info.row_shape == (4, 8, 8)
    batch, pixels = (collate([data[0, index] for index in range(6)]) for data in (cache, images))
    posterior = autoencoder.encode(to_pixels(pixels["pixels"])).latent_dist
    torch.testing.assert_close(batch["moments"].float(), posterior.parameters, rtol=2e-3, atol=1e-3)

    samples = torch.stack([batch_latents(batch, autoencoder, generator(step)) for step in range(200)])
    assert torch.equal(samples[3], batch_latents(batch, autoencoder, generator(3)))
    torch.testing.assert_close(samples[3], batch_latents(pixels, autoencoder, generator(3)), rtol=1e-2, atol=1e-2)
    assert ((samples.mean(0) - posterior.mean).abs() < 0.5 * posterior.std).all()
    assert ((samples.std(0) / posterior.std - 1).abs() < 0.4).all()


def test_the_script_for_latents(tmp_path, tokenizer_folder, autoencoder, monkeypatch):
    autoencoder.save_pretrained(tmp_path / "kl" / "vae")
    arguments = ["--resolution", "8", "--limit", "6", "--no_progress", "--output_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(
        sys, "argv", ["x", "--debug", "--tokenizer", str(tmp_path / "kl"), "--subfolder", "vae", *arguments]
    )
    load_script("cache_latents").main()
    assert TokenCache(tmp_path / "cache").info.tokenizer.class_name == "AutoencoderKL"
    monkeypatch.setattr(sys, "argv", ["x", "--debug", "--tokenizer", str(tokenizer_folder), *arguments])
    with pytest.raises(ValueError, match="has a codebook: use cache_tokens.py"):
        load_script("cache_latents").main()


def test_a_tokenizer_that_can_have_codes_and_has_none(tmp_path, monkeypatch):
    titok = build_model("TiTok", bottleneck="kl")
    titok.save_pretrained(tmp_path / "titok")
    arguments = ["--resolution", "8", "--limit", "6", "--no_progress", "--output_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["x", "--debug", "--tokenizer", str(tmp_path / "titok"), *arguments])
    with pytest.raises(ValueError, match="has no codebook: use cache_latents.py"):
        load_script("cache_tokens").main()
    load_script("cache_latents").main()
    cache = TokenCache(tmp_path / "cache")
    assert cache.info.tokenizer.class_name == "TiTok" and cache.info.kind == "latents"
    images = training_images(_config(tmp_path / "other", limit=6))
    batch = collate([images[0, index] for index in range(6)])
    expected = titok.encode(to_pixels(batch["pixels"])).latents
    torch.testing.assert_close(torch.tensor(cache.tokens[:, 0]).float(), expected, rtol=2e-3, atol=2e-3)


# -------------------------------------------------------------------------------------------------------- training


def _trainer(folder: Path, **changes) -> Trainer:
    values = {"output_dir": str(folder), "tokenizer": "tiny", "batch_size": 4, "progress": False}
    return Trainer(TokenTrainingConfig(**(values | changes)))


def test_training_tokens_takes_the_data_flags_of_the_cache(tmp_path, tokenizer, photos):
    build_cache(_config(tmp_path / "cache", dataset=str(photos), crop="adm", limit=None), tokenizer)
    trainer = _trainer(tmp_path / "run", cache=str(tmp_path / "cache"), dataset=str(photos), seed=5)
    cache = training_tokens(trainer.config, tokenizer, trainer)
    assert cache.num_classes == 2 and len(cache) == 11
    assert (trainer.config.resolution, trainer.config.crop, trainer.config.seed) == (8, "adm", 5)
    assert (tmp_path / "run" / "validation" / "cache_check.png").is_file()
    batch = collate([cache[0, 1], cache[0, 2]])
    images = training_images(replace(trainer.config, seed=0))
    pixels = collate([images[0, 1], images[0, 2]])
    assert torch.equal(batch_codes(batch, tokenizer), batch_codes(pixels, tokenizer))


def test_a_wrong_pairing_is_named(tmp_path, tokenizer):
    build_cache(_config(tmp_path / "cache", crop="adm"), tokenizer)
    other = build_model("MultiScaleVQVAE")
    other.decoder.conv_out.bias.data[0] += 1e-3
    wrong = [
        (other, {}, "the tokenizer's weights are"),
        (build_model("MultiScaleVQVAE", patch_nums=(1, 4)), {}, r"patch_nums is \[1, 4\], in the cache \[1, 2, 4\]"),
        (tokenizer, {"resolution": 16}, "--resolution is 16, in the cache 8"),
        (tokenizer, {"crop": "random"}, "--crop is random, in the cache adm"),
        (tokenizer, {"dataset": "shapes:double"}, "--dataset is shapes:double, in the cache shapes"),
        (tokenizer, {"limit": 20}, "--limit is 20, in the cache 22"),
    ]
    for model, flags, message in wrong:
        trainer = _trainer(tmp_path / "run", cache=str(tmp_path / "cache"), **flags)
        with pytest.raises(ValueError, match=f"{message}.*cache_tokens.py .or cache_latents.py. with --overwrite"):
            training_tokens(trainer.config, model, trainer)
    assert not (tmp_path / "run").exists()


def test_data_flags_of_a_hostile_cache_are_checked(tmp_path, tokenizer):
    build_cache(_config(tmp_path / "cache"), tokenizer)
    path = tmp_path / "cache" / INFO_FILE
    path.write_text(path.read_text().replace('"resolution": 8', '"resolution": "8; rm"'))
    trainer = _trainer(tmp_path / "run", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="--resolution is '8; rm'"):
        training_tokens(trainer.config, tokenizer, trainer)


def test_codes_written_on_the_way(tmp_path, tokenizer, photos):
    flags = {"cache_codes": True, "resolution": 8, "dataset": str(photos), "flip": True}
    trainer = _trainer(tmp_path / "run", cache_variants=2, **flags)
    assert training_tokens(trainer.config, tokenizer, trainer).info.num_variants == 2
    assert (tmp_path / "run" / "cache" / INFO_FILE).is_file()
    trainer = _trainer(tmp_path / "run", **flags)
    with pytest.raises(ValueError, match="--cache_codes keeps one version of each image.*--cache_variants 10"):
        training_tokens(trainer.config, tokenizer, trainer)
    trainer = _trainer(tmp_path / "run", cache=str(tmp_path / "run" / "cache"), cache_codes=True)
    with pytest.raises(ValueError, match="give only one of them"):
        training_tokens(trainer.config, tokenizer, trainer)


def test_var_trains_on_a_cache_without_waiting(tmp_path, tokenizer_folder, tokenizer, monkeypatch):
    """A cache, a cache made on the way and images give the same run; with a cache the data takes no time."""
    monkeypatch.setattr(History, "plot", lambda self: None)
    build_cache(_config(tmp_path / "cache", tokenizer=str(tokenizer_folder), batch_size=16, limit=64), tokenizer)
    common = [
        "--tokenizer", str(tokenizer_folder), "--batch_size", "16", "--max_train_steps", "6", "--no_progress",
        "--num_validation_images", "2", "--logging_steps", "1", "--num_layers", "4", "--attention_head_dim", "64",
    ]  # fmt: skip
    images = ["--resolution", "8", "--limit", "64"]
    runs = {"cache": ["--cache", str(tmp_path / "cache")], "on the way": ["--cache_codes", *images], "images": images}
    for name, flags in runs.items():
        monkeypatch.setattr(sys, "argv", ["x", *common, *flags, "--output_dir", str(tmp_path / f"run {name}")])
        load_script("train_var").main()
    weights = {
        name: load_file(tmp_path / f"run {name}" / "final" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in runs
    }
    for name in ("on the way", "images"):
        assert all(torch.equal(value, weights["cache"][key]) for key, value in weights[name].items())
    recorded = json.loads((tmp_path / "run cache" / "training_config.json").read_text())
    assert (recorded["resolution"], recorded["limit"]) == (8, 64)
    records = [json.loads(line) for line in (tmp_path / "run cache" / "log.jsonl").read_text().splitlines()]
    waits = [record["data_wait_fraction"] for record in records if "data_wait_fraction" in record]
    assert len(waits) == 6 and float(np.median(waits)) < 0.02


def test_the_benchmark_of_the_data(tmp_path, capsys):
    script = benchmark_modules("data")["data"]
    script.main(["--images", "32", "--steps", "2", "--json", str(tmp_path / "rows.json")])
    rows = {row["source"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == {"images", "file per image", "cache"}
    assert rows["cache"]["read_ms"] < rows["file per image"]["read_ms"] < rows["images"]["read_ms"]
    assert rows["cache"]["wait"] < 0.02
    assert "| cache | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["cache_tokens", "cache_latents"])
def test_scripts_are_short_and_their_help_works(script, capsys):
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 150
    with pytest.raises(SystemExit) as caught:
        parse_config(load_script(script).Config, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--tokenizer", "--variants", "--flip", "--push_to", "--num_workers"):
        assert flag in text
    with pytest.raises(SystemExit):
        parse_config(CacheConfig, ["--output_dir", "x"])
    assert "Missing --tokenizer" in capsys.readouterr().err
