"""``hfgen convert`` on the forms in which TiTok and MaskGIT were published: a folder per model, or bare files."""

import copy
import json

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import hfgen
from support.command_line import error_of, run
from support.golden import PUBLIC_CASES, read_case

CASE = read_case("maskgit", PUBLIC_CASES)
PARTS = {"tokenizer": "tokenizer", "image_bert": "bert", "uvit": "uvit"}


def nested(part):
    """The configuration as the repositories hold it: references are not resolved, training settings lie beside."""
    config = copy.deepcopy(CASE.config["bert_tokenizer"] if part == "tokenizer" else CASE.config[PARTS[part]])
    if part == "tokenizer":
        config["vit_sizes"] = CASE.config["vit_sizes"]  # the published sizes have known names
    else:
        config["model"]["vq_model"]["num_latent_tokens"] = config["model"]["generator"]["image_seq_len"]
        config["model"]["generator"]["image_seq_len"] = "${model.vq_model.num_latent_tokens}"
        config["model"]["generator"] |= {"num_steps": 8, "randomize_temperature": 9.5, "guidance_decay": "linear"}
    return config | {"experiment": {"output_dir": "titok"}, "optimizer": {"name": "adamw"}}


@pytest.fixture
def published(tmp_path):
    """One folder per model: ``model.safetensors`` and the nested ``config.json``."""
    for part, state in PARTS.items():
        (tmp_path / part).mkdir()
        tensors = {name: value.contiguous() for name, value in CASE.states[state].items()}
        save_file(tensors, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps(nested(part)))
    return tmp_path


@pytest.mark.parametrize(
    ("part", "model_class"), [("tokenizer", "TiTok"), ("image_bert", "ImageBert"), ("uvit", "UViTBert")]
)
def test_convert_picks_the_model_of_a_folder(published, part, model_class, capsys):
    run("convert", "titok", published / part, "--output", published / "out")
    assert f"{model_class} from" in capsys.readouterr().out
    model = hfgen.AutoModel.from_pretrained(published / "out")
    assert type(model).__name__ == model_class
    heads = model.config.decoder_heads if part == "tokenizer" else model.config.num_attention_heads
    assert heads == 4  # what only the configuration tells
    again = type(model).from_single_file(published / part)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("part", "name"), [("image_bert", "ImageBert"), ("uvit", "UViTBert")])
def test_convert_makes_a_pipeline_of_tokenizer_and_generator(published, part, name):
    run("convert", "titok", published / "tokenizer", published / part, "--output", published / "out")
    pipeline = hfgen.AutoPipeline.from_pretrained(published / "out")
    assert type(pipeline.transformer).__name__ == name and type(pipeline.vq_model).__name__ == "TiTok"
    options = ("--labels", "3", "--num-inference-steps", "4", "--output", published / "png", "--device", "cpu")
    run("sample", published / "out", *options)
    with PIL.Image.open(published / "png" / "000000_3.png") as image:
        assert image.size == (32, 32)


def test_convert_bare_files_with_one_configuration_for_all(published):
    """The form of the ``.bin`` files; the YAML of the official repository describes tokenizer and generator."""
    config = nested("tokenizer")
    config["model"]["generator"] = nested("image_bert")["model"]["generator"]
    (published / "titok.yaml").write_text(json.dumps(config))  # JSON is YAML
    files = []
    for part in ("tokenizer", "image_bert"):
        files.append(published / f"{part}.bin")
        torch.save(CASE.states[PARTS[part]], files[-1])
    run("convert", "titok", *files, "--original-config", published / "titok.yaml", "--output", published / "out")
    pipeline = hfgen.AutoPipeline.from_pretrained(published / "out")
    assert pipeline.transformer.config.num_attention_heads == pipeline.vq_model.config.decoder_heads == 4


def test_convert_folders_that_do_not_fit(published, capsys):
    end = ("--output", published / "out")
    assert "holds the part vq_model" in error_of(
        capsys, "convert", "titok", published / "tokenizer", published / "tokenizer", *end
    )
    state = read_case("titok", PUBLIC_CASES).states["titok_vq"]
    config = read_case("titok", PUBLIC_CASES).config
    save_file({name: value.contiguous() for name, value in state.items()}, published / "tokenizer/model.safetensors")
    (published / "tokenizer/config.json").write_text(json.dumps(config["vq"] | {"vit_sizes": config["vit_sizes"]}))
    message = error_of(capsys, "convert", "titok", published / "tokenizer", published / "uvit", *end)
    assert "different codebook sizes: 48 and 32" in message
    torch.save(CASE.states["bert"], published / "uvit/pytorch_model.bin")
    message = error_of(capsys, "convert", "titok", published / "uvit", *end)
    assert "several checkpoints: model.safetensors, pytorch_model.bin" in message
    assert not (published / "out").exists()


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("tokenizer", "model.vq_model"),
        ("tokenizer", "model.vq_model.num_latent_tokens"),
        ("tokenizer", "dataset.preprocessing.crop_size"),
        ("image_bert", "model.generator"),
        ("image_bert", "model.generator.hidden_size"),
        ("image_bert", "model.vq_model.codebook_size"),
        ("uvit", "model.generator.model_type"),
        ("uvit", "model.vq_model.num_latent_tokens"),  # which image_seq_len refers to
    ],
)
def test_convert_names_the_key_that_a_configuration_lacks(published, part, path, capsys):
    config = json.loads((published / part / "config.json").read_text())
    *parents, name = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    del section[name]
    (published / part / "config.json").write_text(json.dumps(config))
    message = error_of(capsys, "convert", "titok", published / part, "--output", published / "out")
    assert f"original_config lacks {path}, which the nested configuration" in message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${model.generator.image_seq_len}", "go round in a circle at model.generator.image_seq_len"),
        (17, "['image_seq_len'] is 17, but the tensors say 16"),
        ("ViT", "['image_seq_len'] is 'ViT', but the tensors say 16"),
    ],
)
def test_convert_configuration_that_contradicts_the_tensors(published, value, message, capsys):
    config = nested("uvit")
    config["model"]["generator"]["image_seq_len"] = value
    (published / "uvit" / "config.json").write_text(json.dumps(config))
    assert message in error_of(capsys, "convert", "titok", published / "uvit", "--output", published / "out")


def test_convert_maskgit(published, capsys):
    """Two files; their tensors tell neither the number of classes nor the size of the images."""
    files = []
    for name in ("jax_transformer", "jax_tokenizer"):
        files.append(published / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in CASE.states[name].items()}, files[-1])
    settings = ["--original-config", "transformer.num_class=10", "--original-config", "vq_model.resolution=8"]
    run("convert", "maskgit", *files, *settings, "--output", published / "out")
    pipeline = hfgen.AutoPipeline.from_pretrained(published / "out")
    assert type(pipeline.transformer).__name__ == "MaskGITTransformer" and pipeline.grid_size == (4, 4)
    assert pipeline.scheduler.config.mask_schedule == "cosine"
    settings[-1] = "vq_model.resolution=16"
    message = error_of(capsys, "convert", "maskgit", *files, *settings, "--output", published / "other")
    assert "different numbers of codes per image: 64 and 16" in message
