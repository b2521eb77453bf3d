"""``hfgen sample`` on flow and diffusion pipelines: prompts, class labels, or no condition at all."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DModel

import hfgen
from hfgen.cli import main
from hfgen.commands.sample import file_stem
from hfgen.counters import generator
from support.command_line import error_of, run
from support.instances import build_model, build_pipeline
from support.text_encoders import CAPTIONS, t5, tokenizer

CPU = ("--device", "cpu")
SIDE = 8


def read(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def text_pipeline() -> hfgen.RectifiedFlowPipeline:
    """Pixels of captions, with the T5 that is trained together with the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            in_channels=3,
            out_channels=3,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        ).eval()
    return hfgen.RectifiedFlowPipeline(transformer, text_encoder=t5(16), tokenizer=tokenizer())


def unconditional_unet() -> hfgen.ImageDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=SIDE,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        ).eval()
    return hfgen.ImageDiffusionPipeline(network)


PIPELINES = {
    "text": text_pipeline,
    "classes": lambda: build_pipeline("RectifiedFlowPipeline", class_names=["red", "green", "blue", "cyan", "pink"]),
    "ncsnpp": lambda: hfgen.RectifiedFlowPipeline(build_model("NCSNpp")),
    "unet": unconditional_unet,
    "diffusion": lambda: build_pipeline("ImageDiffusionPipeline"),
    "mean_flow": lambda: build_pipeline("MeanFlowPipeline"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder of a saved pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in PIPELINES.items():
        build().save_pretrained(root / name)
    return {name: root / name for name in PIPELINES}


def called(folder, count, **arguments) -> list[np.ndarray]:
    """The images 0 to ``count`` of seed 1, drawn by calling the pipeline."""
    pipeline = hfgen.AutoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**arguments, generator=[generator(1, index) for index in range(count)]).images
    return [np.asarray(image) for image in images]


def test_prompts(folders, tmp_path):
    settings = ["--num-inference-steps", 2, "--guidance-scale", 3, "--negative-prompt", CAPTIONS[2], "--seed", 1]
    arguments = ["--height", 4, "--width", 12, "--num", 2, *settings, "--output", tmp_path / "out", *CPU]
    run("sample", folders["text"], "--prompt", *CAPTIONS[:2], *arguments)
    expected = called(
        folders["text"],
        4,
        prompt=[CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1]],
        negative_prompt=CAPTIONS[2],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=4,
        width=12,
    )
    paths = sorted((tmp_path / "out").iterdir())
    assert paths[0].name == "000000_a-small-red-circle-at-the-top-left.png"
    for path, image in zip(paths, expected, strict=True):
        assert image.shape == (4, 12, 3)
        np.testing.assert_array_equal(read(path), image)
    assert len({image.tobytes() for image in expected}) == 4


def test_a_file_of_prompts_is_the_same_as_prompts(folders, tmp_path):
    (tmp_path / "captions.txt").write_text(f"{CAPTIONS[0]}\n\n  {CAPTIONS[1]} \n", encoding="utf-8")
    arguments = ["--num-inference-steps", 1, "--format", "npz", *CPU]
    run("sample", folders["text"], "--prompts-file", tmp_path / "captions.txt", *arguments, "--output", tmp_path / "a")
    run("sample", folders["text"], "--prompt", *CAPTIONS[:2], *arguments, "--output", tmp_path / "b")
    first, second = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2, SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["classes", "diffusion", "mean_flow"])
def test_class_labels(name, folders, tmp_path):
    arguments = ["--labels", "4,0", "--num-inference-steps", 2, "--seed", 1, "--output", tmp_path, *CPU]
    run("sample", folders[name], *arguments)
    expected = called(folders[name], 2, class_labels=[4, 0], num_inference_steps=2)
    for path, image in zip(sorted(tmp_path.iterdir()), expected, strict=True):
        np.testing.assert_array_equal(read(path), image)


def test_all_classes(folders, tmp_path, capsys):
    run("sample", folders["classes"], "--labels", "all", "--num-inference-steps", 1, "--output", tmp_path, *CPU)
    assert "5 images" in capsys.readouterr().out
    assert [path.stem[7:] for path in sorted(tmp_path.iterdir())] == ["red", "green", "blue", "cyan", "pink"]


@pytest.mark.parametrize("name", ["ncsnpp", "unet"])
def test_without_a_condition(name, folders, tmp_path, capsys):
    arguments = ["--num-inference-steps", 3, "--seed", 1, "--num", 3, "--batch-size", 2, *CPU]
    run("sample", folders[name], *arguments, "--output", tmp_path / "out")
    text = capsys.readouterr().out
    assert "3 images" in text and "NFE 3" in text
    expected = called(folders[name], 3, num_images_per_prompt=3, num_inference_steps=3)
    for number, image in enumerate(expected):
        # float32 sums differ by the batch size in the last bits, which may move a value over a rounding edge.
        drawn = read(tmp_path / "out" / f"{number:06d}.png").astype(int)
        assert np.abs(drawn - image).max() <= 1
    assert len({image.tobytes() for image in expected}) == 3
    run("sample", folders[name], *arguments, "--format", "grid", "--output", tmp_path / "grid")
    assert read(tmp_path / "grid" / "grid.png").shape[1] > 2 * 64


def test_the_steps_of_a_flow_as_gif(folders, tmp_path):
    arguments = ["--labels", "1,pink", "--num-inference-steps", 3, "--gif", "--output", tmp_path, *CPU]
    run("sample", folders["classes"], *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{stem}.{suffix}" for stem in ("000000_green", "000001_pink") for suffix in ("gif", "png")
    ]
    for stem in ("000000_green", "000001_pink"):
        with PIL.Image.open(tmp_path / f"{stem}.gif") as gif:
            assert gif.n_frames == 3 and gif.size == (64, 64)  # 8 times enlarged
            shown = []
            for frame in range(3):
                gif.seek(frame)
                shown.append(np.asarray(gif.convert("RGB"))[4::8, 4::8].astype(int))
        # The last estimate is the image, up to a palette of 256 colours.
        assert np.abs(shown[-1] - read(tmp_path / f"{stem}.png")).max() <= 8
        assert np.abs(shown[0] - shown[-1]).max() > 8


def test_what_a_pipeline_does_not_take(folders, tmp_path, capsys):
    def error(name, *arguments):
        return error_of(capsys, "sample", folders[name], *CPU, "--output", tmp_path / "out", *arguments)

    labels = "This RectifiedFlowPipeline takes --labels: leave --prompt or --prompts-file out."
    assert error("classes", "--prompt", "red") == labels
    prompts = "This RectifiedFlowPipeline takes --prompt or --prompts-file: leave --labels out."
    assert error("text", "--labels", "all") == prompts
    assert "RectifiedFlowPipeline draws without a condition: leave --labels out" in error("ncsnpp", "--labels", 0)
    assert "ImageDiffusionPipeline draws without a condition: leave --prompt" in error("unet", "--prompt", "red")
    assert "needs a condition: give --labels." in error("mean_flow")
    assert "needs a condition: give --prompt or --prompts-file." in error("text")
    assert "negative prompt is for networks that read text" in error(
        "classes", "--labels", 0, "--negative-prompt", "x"
    )
    assert "no setting --negative-prompt" in error("mean_flow", "--labels", 0, "--negative-prompt", "x")
    assert "height must be a multiple of 2" in error("classes", "--labels", 0, "--height", 7)
    assert "Transfusion pipelines; MeanFlowPipeline is none" in error("mean_flow", "--labels", 0, "--gif")
    assert not (tmp_path / "out").exists()


def test_files_without_prompts(folders, tmp_path, capsys):
    start = ("sample", folders["text"], *CPU, "--prompts-file", tmp_path / "captions.txt")
    assert "captions.txt" in error_of(capsys, *start)  # there is none
    (tmp_path / "captions.txt").write_text(" \n\n")
    assert "captions.txt is empty; expected one prompt per line" in error_of(capsys, *start)
    (tmp_path / "captions.txt").write_bytes(b"\xff\xfe\x00")
    assert "captions.txt is no UTF-8 text" in error_of(capsys, *start)


def test_one_kind_of_condition_at_a_time(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "anything", "--labels", "0", "--prompt", "red"])
    assert stop.value.code == 2 and "not allowed with argument --labels" in capsys.readouterr().err


def test_a_title_becomes_a_file_name():
    assert file_stem(3, "great white shark, man-eater/Carcharodon") == "000003_great-white-shark-man-eater-Carcharodon"
    assert file_stem(0, "../../etc: <passwd>") == "000000_etc-passwd"
    assert file_stem(12, "") == file_stem(12, "..") == "000012"
    assert len(file_stem(0, "very " * 100)) <= 47
