"""The command line on masked-token pipelines and on their tokenizers."""

import numpy as np
import PIL.Image
import pytest
import torch

import hfgen
from hfgen.counters import generator
from support.command_line import error_of, run
from support.instances import build_model, build_pipeline

SIDE = 8
CPU = ("--device", "cpu")


def read(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module", params=["grid", "sequence"])
def pipeline_folder(request, tmp_path_factory):
    """A pipeline over a grid of 16 codes, and one over the 4 codes of a TiTok."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "grid":
        pipeline = build_pipeline("MaskGITPipeline", class_names=["red", "green", "blue", "cyan", "dark pink"])
    else:
        transformer = build_model("ImageBert", num_tokens=4)
        pipeline = hfgen.MaskGITPipeline(build_model("TiTok"), transformer, hfgen.MaskedTokenScheduler())
    pipeline.save_pretrained(folder)
    return folder


def test_sample_is_the_pipeline_called_with_counters(pipeline_folder, tmp_path, capsys):
    options = ["--num-inference-steps", "3", "--guidance-scale", "2.5", "--token-temperature", "0.5"]
    options += ["--choice-temperature", "2", "--seed", "1", "--labels", "4,0"]
    run("sample", pipeline_folder, *options, "--output", tmp_path, *CPU)
    assert "2 images" in (text := capsys.readouterr().out) and "NFE 3" in text
    pipeline = hfgen.AutoPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 2.5, "token_temperature": 0.5, "choice_temperature": 2.0, "num_inference_steps": 3}
    expected = pipeline([4, 0], generator=[generator(1, 0), generator(1, 1)], **settings).images
    for path, image in zip(sorted(tmp_path.glob("*.png")), expected, strict=True):
        np.testing.assert_array_equal(read(path), np.asarray(image))


def test_sample_by_name_with_the_steps_as_gif(tmp_path):
    build_pipeline("MaskGITPipeline", class_names=["a", "b", "c", "d", "dark pink"]).save_pretrained(tmp_path / "pipe")
    arguments = ["--labels", "b,dark pink", "--batch-size", "1", "--num-inference-steps", "3", "--gif"]
    run("sample", tmp_path / "pipe", *arguments, "--format", "grid", "--output", tmp_path / "out", *CPU)
    run("sample", tmp_path / "pipe", *arguments, "--output", tmp_path / "out", *CPU)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ["000000_b", "000001_dark-pink"]
    assert names == sorted([f"{stem}.{suffix}" for stem in stems for suffix in ("gif", "png")] + ["grid.png"])
    for stem in stems:
        with PIL.Image.open(tmp_path / "out" / f"{stem}.gif") as gif:
            assert gif.n_frames == 3 and gif.size == (128, 64)  # beside it what is masked, 8 times enlarged
            gif.seek(2)
            shown = np.asarray(gif.convert("RGB"))[4::8, 4:64:8].astype(int)
        assert np.abs(shown - read(tmp_path / "out" / f"{stem}.png")).max() <= 8  # a palette of 256 colours


def test_sample_names_what_is_wrong(pipeline_folder, tmp_path, capsys):
    start = ("sample", pipeline_folder, *CPU, "--output", tmp_path / "out", "--labels")
    assert "17 steps are more than the" in error_of(capsys, *start, "0", "--num-inference-steps", "17")
    assert "guidance_scale must be" in error_of(capsys, *start, "0", "--guidance-scale", "-1")
    assert "Class label 9 is out of range" in error_of(capsys, *start, "9")
    message = error_of(capsys, *start, "0", "--top-k", "3")
    assert "MaskGITPipeline has no setting --top-k; it has --num-inference-steps, --guidance-scale" in message
    build_pipeline("VARPipeline").save_pretrained(tmp_path / "var")
    message = error_of(capsys, "sample", tmp_path / "var", *CPU, "--output", tmp_path / "out", "--labels", 0, "--gif")
    assert "masked-token, rectified-flow and Transfusion pipelines; VARPipeline is none" in message
    assert not (tmp_path / "out").exists()


TOKENIZERS = {
    "MaskGITVQGAN": ("MaskGITVQGAN", {}),
    "TiTok": ("TiTok", {}),
    "TiTok with continuous latents": ("TiTok", {"bottleneck": "kl"}),
}


@pytest.mark.parametrize("form", TOKENIZERS)
def test_reconstruct(form, tmp_path, capsys):
    name, changes = TOKENIZERS[form]
    tokenizer = build_model(name, **changes)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    array = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    PIL.Image.fromarray(array).save(tmp_path / "photo.png")
    run("reconstruct", tmp_path / "tokenizer", tmp_path / "photo.png", "--output", tmp_path / "out", *CPU)
    both = read(tmp_path / "out" / "photo.png")
    np.testing.assert_array_equal(both[:, :SIDE], array)
    with torch.no_grad():
        sample = tokenizer(torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1).sample[0].clamp(-1, 1)
    assert np.abs(both[:, SIDE:] - (sample.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51
    assert "photo.png: PSNR" in capsys.readouterr().out


def test_reconstruct_with_the_tokenizer_of_a_pipeline(pipeline_folder, tmp_path):
    PIL.Image.new("RGB", (20, 10), "teal").save(tmp_path / "wide.png")
    run("reconstruct", pipeline_folder, tmp_path / "wide.png", "--output", tmp_path / "out", *CPU)
    assert read(tmp_path / "out" / "wide.png").shape == (SIDE, 2 * SIDE, 3)


def test_reconstruct_says_what_a_tokenizer_cannot_do(tmp_path, capsys):
    PIL.Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "photo.png")
    forms = {
        "stage1": ({"two_stage": True, "num_proxy_codes": 16}, "draws no images: a TiTok of stage 1"),
        "text": ({"text_length": 3, "text_channels": 4}, "decodes with text"),
    }
    for form, (changes, message) in forms.items():
        build_model("TiTok", **changes).save_pretrained(tmp_path / form)
        assert message in error_of(capsys, "reconstruct", tmp_path / form, tmp_path / "photo.png", *CPU)
