"""``hfgen convert`` on systems that work in the latents of an autoencoder, with it and without."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import save_file

import hfgen
from hfgen import official
from hfgen.conversion import ReleasedCheckpoint, ReleasedFile, to_original
from support.command_line import error_of, run
from support.golden import PUBLIC_CASES, read_case
from support.instances import build_model

CASE, MEAN_FLOW = read_case("dit", PUBLIC_CASES), read_case("mean_flow", PUBLIC_CASES)
HEADS = ("--original-config", "num_heads=4")


def autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=latent_channels,
            norm_num_groups=2,
            scaling_factor=0.25,
        ).eval()


@pytest.fixture
def files(tmp_path):
    """Official files of DiT, SiT and MeanFlow, and a saved autoencoder."""
    states = {"dit": CASE.states["dit"], "sit": CASE.states["sit"], "mean_flow": MEAN_FLOW.states["sit"]}
    for system, state in states.items():
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / f"{system}.safetensors")
    autoencoder().save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.mark.parametrize(
    ("system", "pipeline_class"),
    [("dit", "ImageDiffusionPipeline"), ("sit", "RectifiedFlowPipeline"), ("mean_flow", "MeanFlowPipeline")],
)
def test_the_autoencoder_becomes_part_of_the_pipeline(system, pipeline_class, files, capsys):
    run("convert", system, files / f"{system}.safetensors", *HEADS, "--vae", files / "vae", "--output", files / "out")
    text = capsys.readouterr().out
    assert f"{pipeline_class} from " in text and "--vae" not in text
    pipeline = hfgen.AutoPipeline.from_pretrained(files / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == pipeline_class and type(pipeline.vae) is AutoencoderKL
    expected = autoencoder().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.vae.state_dict().items())
    side = 2 * pipeline.transformer.config.sample_size
    images = pipeline(class_labels=[0], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, side, side) and images.isfinite().all()


def test_without_it_the_message_names_the_one_that_belongs_to_it(files, capsys):
    run("convert", "dit", files / "dit.safetensors", *HEADS, "--output", files / "out")
    assert "gives latents; for images add --vae stabilityai/sd-vae-ft-ema" in capsys.readouterr().out
    pipeline = hfgen.AutoPipeline.from_pretrained(files / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae is None
    assert pipeline([0], num_inference_steps=1, output_type="latent").images.shape[1] == 4


@pytest.mark.parametrize(
    ("system", "pipeline_class"), [("dit", hfgen.ImageDiffusionPipeline), ("sit", hfgen.RectifiedFlowPipeline)]
)
def test_published_settings_are_those_of_the_system(system, pipeline_class, files):
    """Guidance of the official DiT and SiT acts on three channels; that of new pipelines on all."""
    run("convert", system, files / f"{system}.safetensors", *HEADS, "--output", files / "out")
    assert hfgen.AutoPipeline.from_pretrained(files / "out").config.guidance_channels == 3
    fresh = pipeline_class(hfgen.DiT(num_layers=1, width=16, num_heads=2))
    assert fresh.config.guidance_channels is None


def test_the_autoencoder_inside_of_a_pipeline_and_its_dtype(files):
    encoders = (f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3"))
    parts = dict.fromkeys(["transformer", "scheduler", *encoders])
    StableDiffusion3Pipeline(vae=autoencoder(), **parts).save_pretrained(files / "sd3")
    arguments = ["--vae", files / "sd3", "--dtype", "float16", "--output", files / "out"]
    run("convert", "dit", files / "dit.safetensors", *HEADS, *arguments)
    vae = AutoencoderKL.from_pretrained(files / "out" / "vae", dtype=torch.float16)
    expected = autoencoder().half().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())


def test_official_weights_by_name(files, monkeypatch, capsys):
    file = ReleasedFile("transformer", "sit.safetensors", 1, original_config={"num_heads": 4})
    release = ReleasedCheckpoint("tiny", "sit", "authors/sit", (file,), "MIT")
    monkeypatch.setattr(official, "released", lambda: (release,))
    monkeypatch.setattr(official, "download_file", lambda repo, path, **options: files / path)
    run("convert", "tiny", "--output", files / "latents")
    assert "for images add --vae stabilityai/sd-vae-ft-ema" in capsys.readouterr().out
    card = (files / "latents" / "README.md").read_text()
    assert 'latents = pipeline(class_labels=0, output_type="latent").images' in card and "2401.08740" in card
    run("convert", "tiny", "--vae", files / "vae", "--output", files / "images")
    assert "--vae" not in capsys.readouterr().out
    assert "image = pipeline(class_labels=0).images[0]" in (files / "images" / "README.md").read_text()
    assert type(hfgen.AutoPipeline.from_pretrained(files / "images").vae) is AutoencoderKL


def test_reconstruct_with_the_autoencoder(files, capsys):
    PIL.Image.new("RGB", (13, 8), "teal").save(files / "photo.png")
    run("reconstruct", files / "vae", files / "photo.png", "--output", files / "out", "--device", "cpu")
    assert "photo.png: PSNR" in capsys.readouterr().out
    with PIL.Image.open(files / "out" / "photo.png") as image:
        both = np.asarray(image)
    assert both.shape == (8, 24, 3)  # 12 of 13 columns, twice
    pixels = torch.from_numpy(both[:, :12].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        vae = autoencoder()
        expected = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1).permute(1, 2, 0)
    assert np.abs(both[:, 12:] - (expected.numpy() + 1) * 127.5).max() <= 0.51
    half = ("--dtype", "bfloat16", "--output", files / "half", "--device", "cpu")
    run("reconstruct", files / "vae", files / "photo.png", *half)
    with PIL.Image.open(files / "half" / "photo.png") as image:
        assert np.abs(np.asarray(image).astype(int) - both).max() <= 8


def test_autoencoders_that_do_not_fit(files, capsys):
    start = ("convert", "dit", files / "dit.safetensors", *HEADS, "--output", files / "out", "--vae")
    assert "nothing" in error_of(capsys, *start, files / "nothing")
    autoencoder(latent_channels=3).save_pretrained(files / "three")
    assert "vae have 3 channels, but the transformer has 4" in error_of(capsys, *start, files / "three")
    build_model("MaskGITVQGAN").save_pretrained(files / "codes")
    assert "is of the class MaskGITVQGAN; expected an AutoencoderKL" in error_of(capsys, *start, files / "codes")
    hfgen.RectifiedFlowPipeline(build_model("NCSNpp")).save_pretrained(files / "pixels")
    assert "is a pipeline without an image tokenizer" in error_of(capsys, *start, files / "pixels")
    assert not (files / "out").exists()


def test_systems_of_pixels_or_codes(files, capsys):
    save_file({name: value.contiguous() for name, value in to_original(build_model("NCSNpp")).items()},
              files / "unet.safetensors")  # fmt: skip
    unet = ("convert", "rectified_flow", files / "unet.safetensors", "--output", files / "unet")
    (files / "config.json").write_text('{"data": {"image_size": 8}}')
    unet = (*unet, "--original-config", files / "config.json")
    assert "vae have 4 channels, but the transformer has 3" in error_of(capsys, *unet, "--vae", files / "vae")
    run(*unet)
    assert "latents" not in capsys.readouterr().out
    assert hfgen.AutoPipeline.from_pretrained(files / "unet").vae is None

    save_file({name: value.clone() for name, value in to_original(build_model("VARTransformer")).items()},
              files / "var.safetensors")  # fmt: skip
    var = ("convert", "var", files / "var.safetensors", "--output", files / "var", "--vae", files / "vae")
    assert "A VARTransformer alone makes no pipeline" in error_of(capsys, *var)
