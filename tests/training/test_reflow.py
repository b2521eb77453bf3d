"""Reflow and distillation: the pairs that a flow makes, and what the script learns from them."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

import hfgen.training.flow_pairs as flow_pairs
from hfgen import DiT, InterpolantSDEScheduler, NCSNpp, RectifiedFlowPipeline
from hfgen.data.flow_pairs import FlowPairs
from hfgen.training.flow_pairs import make_pairs
from hfgen.training.history import History
from support import text_encoders

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reflow.py"
SETTINGS = {"num_pairs": 10, "num_inference_steps": 3, "guidance_scale": 2.0, "batch_size": 3, "progress": False}


def _randomized(network, scale):
    draws = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=draws) / max(parameter.shape[-1], 4) ** 0.5
    return network.eval()


def class_flow() -> RectifiedFlowPipeline:
    network = DiT(
        sample_size=4, patch_size=2, in_channels=3, num_classes=3, num_layers=2, width=16, num_heads=2, mlp_ratio=2.0
    )
    return RectifiedFlowPipeline(_randomized(network, 1.0), class_names=["red", "green", "blue"])


def text_flow() -> RectifiedFlowPipeline:
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=3,
        pos_embed_max_size=4,
    )
    return RectifiedFlowPipeline(
        _randomized(network, 1.0), text_encoder=text_encoders.t5(), tokenizer=text_encoders.tokenizer()
    )


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(flow_pairs, "_PAIRS_PER_FILE", 4)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def _items(pairs):
    return [pairs[0, index] for index in range(len(pairs))]


def _equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for a, b in zip(one, other)
        for name in a.keys() | b.keys()
    )


def test_a_pair_is_noise_and_what_the_pipeline_makes_of_it(tmp_path, accelerator):
    pipeline = class_flow()
    pairs = make_pairs(pipeline, tmp_path, accelerator=accelerator, **SETTINGS)
    items = _items(pairs)
    assert len(items) == 10 and len({item["label"] for item in items}) == 3
    assert len({float(item["noise"].sum()) for item in items}) == 10
    again = pipeline(
        class_labels=[item["label"] for item in items],
        latents=torch.stack([item["noise"] for item in items]),
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(torch.stack([item["sample"] for item in items]), again, rtol=0, atol=1e-5)
    assert _equal(_items(pickle.loads(pickle.dumps(pairs))), items)  # as loading processes get them


def test_pairs_continue_where_they_stopped(tmp_path, accelerator, monkeypatch):
    whole = _items(make_pairs(class_flow(), tmp_path / "whole", accelerator=accelerator, **SETTINGS))
    folder, calls = tmp_path / "stopped", []
    write = flow_pairs.write_pairs_file

    def stop_at_the_second(path, *content):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, *content)

    monkeypatch.setattr(flow_pairs, "write_pairs_file", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(class_flow(), folder, accelerator=accelerator, **SETTINGS)
    with pytest.raises(ValueError, match="2 files are missing"):
        FlowPairs(folder)
    pairs = make_pairs(class_flow(), folder, accelerator=accelerator, **SETTINGS)
    assert calls == [f"pairs-0000{n}.safetensors" for n in (0, 1, 1, 2)]  # the first is not made again
    assert _equal(_items(pairs), whole)


def test_prompts_are_kept_with_the_pairs(tmp_path, accelerator):
    captions = text_encoders.CAPTIONS[:2]
    pairs = make_pairs(text_flow(), tmp_path, accelerator=accelerator, captions=captions, **SETTINGS)
    assert [pairs[index]["caption"] for index in range(3)] == [*captions, captions[0]]
    assert pairs[0]["label"] == -1
    with pytest.raises(ValueError, match="its captions is"):
        make_pairs(text_flow(), tmp_path, accelerator=accelerator, captions=captions[:1], **SETTINGS)
    with pytest.raises(ValueError, match="no captions"):
        make_pairs(text_flow(), tmp_path / "none", accelerator=accelerator, **SETTINGS)


def test_pairs_of_another_flow_are_refused(tmp_path, accelerator):
    make_pairs(class_flow(), tmp_path, accelerator=accelerator, **SETTINGS)
    with pytest.raises(ValueError, match="its guidance_scale is 2.0, not 1.0"):
        make_pairs(class_flow(), tmp_path, accelerator=accelerator, **{**SETTINGS, "guidance_scale": 1.0})
    stochastic = class_flow()
    stochastic.scheduler = InterpolantSDEScheduler()
    with pytest.raises(ValueError, match="InterpolantSDEScheduler does not follow"):
        make_pairs(stochastic, tmp_path / "other", accelerator=accelerator, **SETTINGS)


def test_damaged_pairs_are_named(tmp_path, accelerator):
    make_pairs(class_flow(), tmp_path, accelerator=accelerator, **SETTINGS)
    path = tmp_path / "pairs-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="pairs-00001.safetensors cannot be read"):
        FlowPairs(tmp_path)[5]
    (tmp_path / "pairs.json").write_text('{"num_pairs": -1}')
    with pytest.raises(ValueError, match="does not describe pairs"):
        FlowPairs(tmp_path)


def _fit(output: Path, model: Path, *arguments: str) -> dict[str, float]:
    """Run the script; the last value of everything in its log."""
    spec = importlib.util.spec_from_file_location("example_reflow", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    tiny = ["--num_pairs", "64", "--num_inference_steps", "8", "--straightness_steps", "8", "--batch_size", "16"]
    flags = ["--output_dir", str(output), "--model", str(model), *tiny, "--num_validation_images", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reflow.py", "--debug", *flags, "--no_progress", *arguments])
        patch.setattr(History, "plot", lambda self: None)
        script.main()
    lines = (output / "log.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_reflow_straightens_the_paths_and_distillation_makes_one_step_enough(tmp_path, caplog):
    class_flow().save_pretrained(tmp_path / "flow")
    common = ["--learning_rate", "3e-3", "--ema_decay", "0.9", "--weight_decay", "0"]
    reflowed = _fit(tmp_path / "reflow", tmp_path / "flow", "--max_train_steps", "200", *common)
    assert reflowed["validation/straightness"] < 0.5 * reflowed["validation/straightness_before"]
    steps = ["--max_train_steps", "100", "--mode", "distill", *common]
    distilled = _fit(tmp_path / "distill", tmp_path / "reflow" / "final", *steps)
    assert distilled["validation/straightness_before"] == pytest.approx(reflowed["validation/straightness"])
    # One step of the distilled network is closer to the end of its teacher's paths than one step of the teacher was.
    assert distilled["validation/error_1_steps"] < 0.2 * reflowed["validation/error_1_steps"]
    final = RectifiedFlowPipeline.from_pretrained(tmp_path / "distill" / "final")
    assert final.class_names == ["red", "green", "blue"]
    assert isinstance(final.scheduler, FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("kind", ["text", "unconditional"])
def test_flows_of_every_kind_train(kind, tmp_path):
    if kind == "text":
        pipeline = text_flow()
    else:
        sizes = {"sample_size": 4, "base_channels": 8, "channel_multipliers": (1, 2), "layers_per_block": 1}
        pipeline = RectifiedFlowPipeline(_randomized(NCSNpp(**sizes), 0.5))
    pipeline.save_pretrained(tmp_path / "flow")
    flags = ["--max_train_steps", "2", "--distill_steps", "2", *(["--limit", "20"] if kind == "text" else [])]
    log = _fit(tmp_path / "run", tmp_path / "flow", *flags)
    assert log["validation/straightness"] > 0 and log["validation/error_2_steps"] > 0
    final = RectifiedFlowPipeline.from_pretrained(tmp_path / "run" / "final")
    moved = [not torch.equal(a, b) for a, b in zip(final.transformer.parameters(), pipeline.transformer.parameters())]
    assert any(moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "shapes:double"], "--dataset shapes:double: this flow takes random classes and no data set"),
        (["--flip", "--limit", "9", "--num_workers", "0"], "--flip True, --limit 9: this flow"),
    ],
)
def test_a_flow_of_classes_reads_no_data_set(flags, message, tmp_path):
    class_flow().save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path / "run", tmp_path / "flow", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distance", "lpips"], "use --mode distill"),
        (["--mode", "distill", "--distance", "lpips"], "give --perceptual_source"),
        (["--num_pairs", "0"], "--num_pairs is 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _fit(tmp_path / "run", tmp_path / "flow", *arguments)
    assert message in capsys.readouterr().err
