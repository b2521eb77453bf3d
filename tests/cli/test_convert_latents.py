"""``hfgen convert`` on systems that work in the latents of an autoencoder, with it and without."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

import hfgen
from hfgen import official
from hfgen.conversion import ReleasedCheckpoint, ReleasedFile, to_original
from support import text_encoders
from support.command_line import error_of, run
from support.golden import PUBLIC_CASES, read_case
from support.instances import build_model
from support.text_encoders import CAPTIONS

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


def test_text_encoders_of_another_pipeline(files, capsys):
    """A file of SD3 has the network alone; with encoders and autoencoder the command draws prompts."""
    encoders = {
        "text_encoder": text_encoders.clip(seed=1),
        "text_encoder_2": text_encoders.clip(seed=2),
        "text_encoder_3": text_encoders.t5(width=32, seed=3),
    }
    tokenizers = {name.replace("text_encoder", "tokenizer"): text_encoders.tokenizer() for name in encoders}
    parts = {"transformer": None, "scheduler": None, "vae": autoencoder(16)}
    StableDiffusion3Pipeline(**parts, **encoders, **tokenizers).save_pretrained(files / "whole")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SD3Transformer2DModel(
            sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=64, caption_projection_dim=64,
            joint_attention_dim=32, pooled_projection_dim=24, pos_embed_max_size=192,
        )  # fmt: skip
    save_file(to_original(network, "sd3", "transformer"), files / "sd3.safetensors")
    convert = ("convert", "sd3", files / "sd3.safetensors", "--vae", files / "whole")

    run(*convert, "--output", files / "bare")
    assert "for prompts add --text-encoders stabilityai/stable-diffusion-3-medium" in capsys.readouterr().out
    run(*convert, "--text-encoders", files / "whole", "--output", files / "out")
    assert "add --" not in capsys.readouterr().out
    pipeline = hfgen.AutoPipeline.from_pretrained(files / "out")
    for name, encoder in encoders.items():
        saved = getattr(pipeline, name).state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in encoder.state_dict().items()), name
    options = ("--prompt", CAPTIONS[0], "--num-inference-steps", 1, "--height", 16, "--width", 16, "--device", "cpu")
    run("sample", files / "out", *options, "--output", files / "images")
    assert len(list((files / "images").glob("*.png"))) == 1

    refused = ("convert", "dit", files / "dit.safetensors", *HEADS, "--output", files / "no")
    assert "takes no text_encoder" in error_of(capsys, *refused, "--text-encoders", files / "whole")
    convert += ("--output", files / "no", "--text-encoders")
    assert "has no text_encoder" in error_of(capsys, *convert, files / "bare")
    assert "there is no pipeline" in error_of(capsys, *convert, files / "vae")


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


def test_sizes_that_a_tokenizer_does_not_take(files, capsys):
    PIL.Image.new("RGB", (1, 7), "teal").save(files / "thin.png")
    command = ("reconstruct", files / "vae", files / "thin.png", "--output", files / "out", "--device", "cpu")
    assert "has 1x7 pixels, fewer than the 2 of a code" in error_of(capsys, *command)
    assert "--size is 33; this tokenizer takes multiples of 2" in error_of(capsys, *command, "--size", 33)
    build_model("TiTok").save_pretrained(files / "titok")
    command = ("reconstruct", files / "titok", files / "thin.png", "--output", files / "out", "--device", "cpu")
    assert "pixels have shape (1, 3, 33, 33), expected (batch, 3, 8, 8)" in error_of(capsys, *command, "--size", 33)
    # The size that a convolutional tokenizer is meant for is not the only one.
    build_model("MaskGITVQGAN").save_pretrained(files / "vqgan")
    run("reconstruct", files / "vqgan", files / "thin.png", "--output", files / "v", "--device", "cpu", "--size", 16)
    with PIL.Image.open(files / "v" / "thin.png") as image:
        assert image.size == (32, 16)


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
