"""Model cards: what a reader finds in them, and what stays out."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from huggingface_hub import ModelCard
from PIL import Image

import hfgen
from hfgen.cards import CARD_FILE, portable, write_run_card, write_short_card
from hfgen.publishing import write_pipeline_file
from support.instances import MODELS, PIPELINES, build_model, build_pipeline
from support.text_encoders import t5, tokenizer


@pytest.fixture
def run(tmp_path):
    """The folder of a training run with two validations."""
    folder = tmp_path / "runs" / "mine"
    (folder / "validation").mkdir(parents=True)
    settings = {"dataset": "user/photos", "resolution": 64, "flip": True, "limit": None, "num_validation_images": 8}
    (folder / "training_config.json").write_text(json.dumps(settings | {"tokenizer": "/disk/of/somebody/tok/final"}))
    records = [
        {"step": 5, "validation/psnr": 10.0},
        {"step": 9, "model/loss": 0.5},
        {"step": 10, "validation/psnr": 12.345678, "validation/fid": None},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step, colour in ((5, "red"), (10, "blue")):
        for name in ("reconstructions", "samples"):
            Image.new("RGB", (2, 2), colour).save(folder / "validation" / f"step-{step:07d}_{name}.png")
    return folder


def write_card(run, folder, **changes):
    arguments = {"command": "accelerate launch examples/train_any.py", "environment": "With hfgen.", **changes}
    write_run_card(folder, run, **arguments)
    return ModelCard.load(folder / CARD_FILE)


@pytest.mark.parametrize("name", [*MODELS, *PIPELINES])
def test_a_short_card_shows_how_to_use_each_class(name, tmp_path):
    (build_pipeline(name) if name in PIPELINES else build_model(name)).save_pretrained(tmp_path)
    write_short_card(tmp_path, "user/mine")
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.to_dict()["library_name"] == "hfgen" and "hfgen" in card.data.tags and card.data.license is None
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) <= 4
    compile(code, name, "exec")
    assert f'{name}.from_pretrained("user/mine")' in code and f"from hfgen import {name}" in code
    assert "```bibtex" in card.text and "licence" in card.text.lower()


def mmdit(channels):
    with torch.random.fork_rng(devices=[]):
        return SD3Transformer2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            pos_embed_max_size=4,
        )


FLOWS = {
    "text": (
        lambda: hfgen.RectifiedFlowPipeline(mmdit(3), text_encoder=t5(16), tokenizer=tokenizer()),
        'image = pipeline(prompt="a small red circle at the top left").images[0]',
        "text-to-image",
        "sd3",
    ),
    "classes": (
        lambda: build_pipeline("RectifiedFlowPipeline"),
        "image = pipeline(class_labels=0).images[0]",
        "text-to-image",
        "sit",
    ),
    "unconditional": (
        lambda: hfgen.RectifiedFlowPipeline(build_model("NCSNpp")),
        "image = pipeline().images[0]",
        "unconditional-image-generation",
        "rectified_flow",
    ),
    "text and images": (
        lambda: build_pipeline("TransfusionPipeline"),
        'image = pipeline(prompt="a small red circle at the top left").images[0]',
        "text-to-image",
        "transfusion",
    ),
    "neither encoder nor decoder": (
        lambda: hfgen.RectifiedFlowPipeline(mmdit(4)),
        "latents = pipeline(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, "
        'guidance_scale=1, output_type="latent").images',
        "text-to-image",
        "sd3",
    ),
}


@pytest.mark.parametrize("kind", FLOWS)
def test_the_call_and_the_system_are_those_of_the_network(kind, tmp_path):
    build, call, task, system = FLOWS[kind]
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    write_short_card(tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert f"\n{call}\n" in card.text
    assert card.data.pipeline_tag == task and system in card.data.tags
    assert ("class-conditional" in card.data.tags) == (kind == "classes")
    embeds = {"prompt_embeds": torch.zeros(1, 2, 16), "pooled_prompt_embeds": torch.zeros(1, 16)}
    exec(call, {"pipeline": lambda **arguments: pipeline(num_inference_steps=1, **arguments), **embeds})


def test_the_converter_tells_the_system_of_a_shared_class(tmp_path):
    build_pipeline("RectifiedFlowPipeline").save_pretrained(tmp_path)
    write_short_card(tmp_path, converter="rectified_flow")
    assert "rectified_flow" in ModelCard.load(tmp_path / CARD_FILE).data.tags


def test_the_card_of_a_run(run, tmp_path):
    build_model("MultiScaleVQVAE").save_pretrained(tmp_path)
    card = write_card(run, tmp_path, licence="CC-BY-NC-4.0", repo_id="user/mine")
    assert card.data.license == "cc-by-nc-4.0" and card.data.datasets == ["user/photos"]
    assert "https://huggingface.co/datasets/user/photos" in card.text and "random mirroring" in card.text
    assert "| psnr | 12.35 |" in card.text and "after step 10, on 8 images" in card.text and "fid" not in card.text
    assert card.text.index("samples.png") < card.text.index("reconstructions.png")
    with Image.open(tmp_path / "samples.png") as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)  # of the last validation
    assert "training_curve.png" not in card.text  # the run has none
    record = json.loads((tmp_path / "training_config.json").read_text())
    assert record["tokenizer"] == "tok/final" and "somebody" not in card.text


def test_the_card_of_an_autoencoder_of_diffusers(run, tmp_path):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    vae.save_pretrained(tmp_path)
    card = write_card(run, tmp_path, example="examples/train_autoencoder_kl.py", repo_id="user/mine")
    assert "from diffusers import AutoencoderKL" in card.text and "tokenizer(pixels).sample" in card.text
    assert card.data.to_dict()["library_name"] == "diffusers" and card.data.pipeline_tag == "image-to-image"
    assert "arxiv.org/abs/1312.6114" in card.text and "vae" in card.data.tags
    write_short_card(tmp_path)
    assert "arxiv" not in ModelCard.load(tmp_path / CARD_FILE).text  # of whichever system it is


def test_a_run_without_validation_or_licence(run, tmp_path):
    (run / "log.jsonl").write_text("")
    build_model("MultiScaleVQVAE").save_pretrained(tmp_path)
    card = write_card(run, tmp_path)
    assert "## Results" not in card.text and "None was stated" in card.text and card.data.license is None
    card = write_card(run, tmp_path, licence="My own terms")
    assert (card.data.license, card.data.license_name) == ("other", "My own terms")


def test_settings_lose_the_folders_of_one_machine():
    values = ("/disk/of/me/runs/tok", "runs/tok", "user/tok", 3, None, "/tok")
    assert [portable(value) for value in values] == ["runs/tok", "runs/tok", "user/tok", 3, None, "tok"]


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model_index.json nor config.json"):
        write_short_card(tmp_path)
    build_model("MultiScaleVQVAE").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no pipeline of hfgen, so there is no pipeline.py"):
        write_pipeline_file(tmp_path)
