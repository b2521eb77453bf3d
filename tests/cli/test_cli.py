"""The command line on tiny pipelines: what it writes, that it is repeatable, and what it says to wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import hfgen
from hfgen.cli import main
from hfgen.conversion import systems, to_original
from hfgen.counters import generator
from hfgen.systems import SYSTEMS
from support.instances import build_model, build_pipeline

NUM_CLASSES = 5
SIZE = 8


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline("VARPipeline").save_pretrained(folder)
    return str(folder)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def error_of(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("hfgen: error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and not captured.out
    return lines[0]


def test_sample_writes_one_file_per_image_whatever_the_batch(pipeline_folder, tmp_path, capsys):
    for batch_size in (1, 4):
        arguments = ["--labels", "0,2-3", "--num", "2", "--batch-size", str(batch_size), "--seed", "7"]
        output = tmp_path / str(batch_size)
        assert main(["sample", pipeline_folder, *arguments, "--output", str(output), "--device", "cpu"]) == 0
        assert f"{output}: 6 images" in (text := capsys.readouterr().out) and "NFE 3" in text
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == [f"{number:06d}_{label}.png" for number, label in enumerate((0, 0, 2, 2, 3, 3))]
    images = [read(tmp_path / "1" / name) for name in names]
    for name, image in zip(names, images):
        assert image.shape == (SIZE, SIZE, 3)
        # float32 sums differ by the batch size in the last bits, which may move a value over a rounding edge.
        assert np.abs(image.astype(int) - read(tmp_path / "4" / name)).max() <= 1
    assert len({image.tobytes() for image in images}) == 6


def test_sample_is_the_pipeline_called_with_counters(pipeline_folder, tmp_path):
    output = tmp_path / "out"
    options = ["--guidance-scale", "3", "--top-k", "4", "--top-p", "0.9", "--temperature", "0.8", "--seed", "1"]
    options += ["--labels", "4", "--output", str(output), "--device", "cpu"]
    assert main(["sample", pipeline_folder, *options]) == 0
    pipeline = hfgen.AutoPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 3.0, "top_k": 4, "top_p": 0.9, "temperature": 0.8}
    expected = pipeline(class_labels=[4], generator=[generator(1, 0)], **settings).images[0]
    np.testing.assert_array_equal(read(output / "000000_4.png"), np.asarray(expected))


def test_sample_grid_and_npz(pipeline_folder, tmp_path):
    for image_format in ("png", "grid", "npz"):
        arguments = ["--labels", "all", "--format", image_format, "--output", str(tmp_path), "--device", "cpu"]
        assert main(["sample", pipeline_folder, *arguments]) == 0
    array = np.load(tmp_path / "samples.npz")["arr_0"]
    assert array.shape == (NUM_CLASSES, SIZE, SIZE, 3) and array.dtype == np.uint8
    for label in range(NUM_CLASSES):
        np.testing.assert_array_equal(array[label], read(tmp_path / f"{label:06d}_{label}.png"))
    grid = read(tmp_path / "grid.png")
    assert min(grid.shape[:2]) > 2 * 64  # three columns and two rows of enlarged images
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_sample_names_what_is_wrong(pipeline_folder, tmp_path, capsys):
    start = ("sample", pipeline_folder, "--output", tmp_path / "out", "--labels")
    assert "out of range" in error_of(capsys, *start, "0,99")
    assert "the classes are 0 to 4" in error_of(capsys, *start, "4,5")  # 5 is no class, for the pipeline itself
    assert "red circle" in error_of(capsys, *start, "red circle")
    assert "--num-inference-steps" in error_of(capsys, *start, "0", "--num-inference-steps", "3")
    assert "top_p" in error_of(capsys, *start, "0", "--top-p", "2")
    assert "warp" in error_of(capsys, *start, "0", "--device", "warp")
    missing = tmp_path / "missing.txt"
    assert f"--prompts-file {missing} cannot" in error_of(capsys, *start[:-1], "--prompts-file", missing)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    assert "out is a file" in error_of(capsys, *start, "0")


@pytest.mark.parametrize("command", [("sample",), ("reconstruct", "image.png")])
def test_a_folder_without_what_is_asked_for_is_said_to_be_what_it_is(command, tmp_path, capsys):
    def message(source):
        return error_of(capsys, command[0], source, *command[1:])

    wanted = "pipeline" if command[0] == "sample" else "tokenizer"
    assert "There is no folder" in message(tmp_path / "nothing") and "Hub" in message("nothing/of_this_name")
    assert f"is not the folder of a {wanted}" in message(tmp_path)
    (tmp_path / "final").mkdir()
    assert f"its {wanted} is {tmp_path / 'final'}" in message(tmp_path)


def test_sample_sends_a_tokenizer_to_reconstruct(tmp_path, capsys):
    build_model("MultiScaleVQVAE").save_pretrained(tmp_path)
    assert "`hfgen reconstruct`" in error_of(capsys, "sample", tmp_path)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(OSError):
        main(["sample", str(tmp_path / "nothing"), "--labels", "0", "--debug"])


@pytest.mark.parametrize("source", ["pipeline", "tokenizer"])
def test_reconstruct(source, pipeline_folder, tmp_path, capsys):
    if source == "tokenizer":
        build_model("MultiScaleVQVAE").save_pretrained(tmp_path / "tokenizer")
    folder = pipeline_folder if source == "pipeline" else tmp_path / "tokenizer"
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for image, path in zip(pixels, paths):
        Image.fromarray(image).save(path)
    output = tmp_path / "out"
    assert main(["reconstruct", str(folder), *map(str, paths), "--output", str(output), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    tokenizer = build_model("MultiScaleVQVAE")
    for image, path in zip(pixels, paths):
        both = read(output / path.name)
        assert both.shape == (SIZE, 2 * SIZE, 3)
        np.testing.assert_array_equal(both[:, :SIZE], image)
        inputs = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        sample = tokenizer(inputs).sample[0].detach().clamp(-1, 1).permute(1, 2, 0).numpy()
        assert np.abs(both[:, SIZE:] - (sample + 1) * 127.5).max() <= 0.51
        error = np.square(both[:, :SIZE].astype(float) - both[:, SIZE:]).mean()
        assert f"{output / path.name}: PSNR {10 * np.log10(255**2 / error):.2f} dB" in text
    assert "mean PSNR of 2 images" in text


def test_reconstruct_resizes_and_refuses(pipeline_folder, tmp_path, capsys):
    path = tmp_path / "wide.png"
    Image.new("RGB", (40, 20), "red").save(path)
    output = tmp_path / "out"
    arguments = ("reconstruct", pipeline_folder, path, "--output", output, "--device", "cpu")
    assert main([*map(str, arguments), "--size", str(SIZE)]) == 0
    assert read(output / "wide.png").shape == (SIZE, 2 * SIZE, 3)
    capsys.readouterr()
    assert "16" in error_of(capsys, *arguments, "--size", "16")
    assert "missing.png" in error_of(capsys, "reconstruct", pipeline_folder, tmp_path / "missing.png")
    assert "same name" in error_of(capsys, "reconstruct", pipeline_folder, path, path)


@pytest.fixture
def official_files(tmp_path):
    """A tiny pipeline as two files in the official layout, and the pipeline."""
    vq_model = build_model("MultiScaleVQVAE", base_channels=32, norm_num_groups=32)  # the official groups
    pipeline = hfgen.VARPipeline(vq_model=vq_model, transformer=build_model("VARTransformer"))
    pipeline.set_progress_bar_config(disable=True)
    torch.save(to_original(pipeline.transformer), tmp_path / "var.pth")
    save_file({name: tensor.clone() for name, tensor in to_original(pipeline.vq_model).items()},
              tmp_path / "vae.safetensors")  # fmt: skip
    return tmp_path / "var.pth", tmp_path / "vae.safetensors", pipeline


VAE_SETTING = "vae.v_patch_nums=[1,2,4]"


def test_convert_writes_a_pipeline(official_files, tmp_path, capsys):
    transformer, vae, pipeline = official_files
    output = tmp_path / "converted"
    arguments = ["convert", "var", str(transformer), str(vae), "--output", str(output)]
    assert main([*arguments, "--original-config", VAE_SETTING]) == 0
    text = capsys.readouterr().out
    assert f"{output}: VARPipeline" in text and "MIT" in text
    converted = hfgen.AutoPipeline.from_pretrained(output)
    converted.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            expected, found = component.state_dict(), getattr(converted, name).state_dict()
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected)
    images = [pipe([0, 1], generator=generator(0), output_type="pt").images for pipe in (pipeline, converted)]
    assert torch.equal(*images)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_convert_one_part(official_files, tmp_path):
    _, vae, pipeline = official_files
    (tmp_path / "config.yaml").write_text("vae:\n  v_patch_nums: [1, 2, 4]\n")
    output = tmp_path / "vae"
    arguments = ["convert", "var", str(vae), "--output", str(output), "--dtype", "float16"]
    assert main([*arguments, "--original-config", str(tmp_path / "config.yaml"), "--part", "vae"]) == 0
    model = hfgen.AutoModel.from_pretrained(output, dtype=torch.float16)
    expected = pipeline.vq_model.half().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_convert_leaves_an_existing_folder_alone(official_files, tmp_path, capsys):
    _, vae, _ = official_files
    arguments = ("convert", "var", vae, "--original-config", VAE_SETTING, "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    assert "exists" in error_of(capsys, *arguments)
    assert "no saved model" in error_of(capsys, *arguments, "--overwrite")
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"

    (tmp_path / "out" / "config.json").write_text("{}")
    assert "unknown" in error_of(capsys, *arguments, "--overwrite", "--original-config", "vae.wrong=1")
    assert (tmp_path / "out" / "precious.txt").exists()  # a conversion that fails changes nothing
    assert main([*map(str, arguments), "--overwrite"]) == 0
    assert not (tmp_path / "out" / "precious.txt").exists()
    hfgen.AutoModel.from_pretrained(tmp_path / "out")


def test_convert_names_what_is_wrong(official_files, tmp_path, capsys):
    transformer, vae, _ = official_files
    end = ("--output", tmp_path / "out")
    setting = ("--original-config", VAE_SETTING)
    assert "var" in error_of(capsys, "convert", "nosuchsystem", vae, *end)
    assert "nosuchpart" in error_of(capsys, "convert", "var", vae, *end, "--part", "nosuchpart")
    assert "v_patch_nums" in error_of(capsys, "convert", "var", vae, *end)
    assert "once" in error_of(capsys, "convert", "var", vae, vae, *end, *setting)
    assert "missing.pth" in error_of(capsys, "convert", "var", tmp_path / "missing.pth", *end)
    assert "patch_nums" in error_of(
        capsys, "convert", "var", transformer, vae, *end, "--original-config", "vae.v_patch_nums=[1,4]"
    )
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json" in error_of(capsys, "convert", "var", vae, *end, "--original-config", tmp_path / "list.json")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "no checkpoint of var" in error_of(capsys, "convert", "var", tmp_path / "other.safetensors", *end)
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def test_convert_runs_nothing_inside_a_pickle(tmp_path, capsys):
    torch.save({"payload": Payload()}, tmp_path / "evil.pth")
    message = error_of(capsys, "convert", "var", tmp_path / "evil.pth", "--output", tmp_path / "out")
    assert "--trust-pickle" in message


def test_systems_lists_every_row(capsys):
    assert main(["systems"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [system.key for system in SYSTEMS]
    assert main(["systems", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["var"]["status"] == "works" and rows["var"]["pipeline"] == "VARPipeline"


@pytest.mark.parametrize("command", ["sample", "reconstruct", "convert", "systems"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  hfgen {command} " in capsys.readouterr().out.partition("examples:")[2] + " "


def test_help_of_convert_names_the_converters_that_the_table_lacks(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in set(systems()) - {system.converter for system in SYSTEMS})


def test_labels_that_name_nothing(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "anything", "--labels", ","])
    assert stop.value.code == 2 and "names no class" in capsys.readouterr().err
