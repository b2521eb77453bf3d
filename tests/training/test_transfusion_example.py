"""The training script of Transfusion: what it learns from, saves, resumes and refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hfgen import NoisyLatentQuantizer, TransfusionPipeline, TransfusionTransformer
from hfgen.counters import generator
from hfgen.data.sources import load_images
from hfgen.models.generators.transfusion_sizes import TRANSFUSION_SIZES
from hfgen.training import parse_config
from hfgen.training.autoencoder_kl import AutoencoderKLTrainingConfig, new_autoencoder
from hfgen.training.transfusion import TransfusionTrainingConfig
from hfgen.training.transfusion_images import ContinuousImages, DiscreteImages
from hfgen.training.transfusion_model import new_transformer
from hfgen.training.transfusion_text import SLOT, SequenceWriter
from support import text_encoders
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script, logged, read_log, run_script
from support.grey_tokenizer import GreyTokenizer
from support.small_autoencoder import save_autoencoder
from support.torchrun import torchrun

SCRIPT = "train_transfusion"
SMALL = ["--resolution", "16", "--patch_size", "8", "--width", "16", "--num_heads", "2", "--num_layers", "1"]
SMALL += ["--num_inference_steps", "2", "--limit", "64", "--learning_rate", "1e-3", "--adamw_ratio", "1"]
ARGUMENTS = [*TINY, *SMALL]


def _fit(folder: Path, *arguments: str) -> Path:
    return run_script(SCRIPT, folder, *ARGUMENTS, *arguments)


def _config(*arguments: str) -> TransfusionTrainingConfig:
    return parse_config(TransfusionTrainingConfig, ["--output_dir", "run", *SMALL, *arguments])


def _writer(config: TransfusionTrainingConfig, num_slots: int = 4) -> SequenceWriter:
    return SequenceWriter(config, load_images(config.dataset, resolution=16, limit=64), num_slots)


def _task(*arguments: str):
    config = _config(*arguments)
    images = ContinuousImages(config, None)
    return load_script(SCRIPT).TransfusionTask(config, images, _writer(config, images.num_tokens), [])


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pixels_run(tmp_path_factory) -> Path:
    return _fit(tmp_path_factory.mktemp("pixels"))


def test_pixels(pixels_run):
    pipeline = TransfusionPipeline.from_pretrained(pixels_run)
    average = TransfusionTransformer.from_pretrained(pixels_run.parent / "checkpoint-2" / "ema_transformer")
    assert all(
        torch.equal(value, average.state_dict()[name]) for name, value in pipeline.transformer.state_dict().items()
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a small red circle at the top", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)  # the size of training is the default
    assert isinstance(pipeline.caption(images * 2 - 1, max_new_tokens=3).texts[0], str)
    training, validation = (
        {name for record in read_log(pixels_run.parent) for name in record if name.startswith(phase)}
        for phase in ("transformer/", "validation/")
    )
    assert {"transformer/text_loss", "transformer/image_loss", "transformer/wasted_share"} <= training
    assert {f"validation/{name}" for name in ("text_loss", "captioning_loss", "error_0.5")} <= validation
    assert {"validation/judge_shape", "validation/caption_attributes", "validation/caption_pair"} <= validation
    pictures = {path.name for path in (pixels_run.parent / "validation").iterdir()}
    assert {"step-0000002_samples.png", "step-0000002_captions.png"} <= pictures


def test_training_documents_are_those_of_the_pipeline(pixels_run):
    """What precedes an image, with its caption and without, is what the pipeline asks for images with."""
    pipeline, writer = TransfusionPipeline.from_pretrained(pixels_run), _writer(_config())
    assert len(pipeline.tokenizer) == len(writer.tokenizer)
    caption = "a large blue cross in the centre"
    rows = writer.captioned([caption], image_first=False)
    before = rows.ids[0].tolist()[: rows.ids[0].tolist().index(SLOT)]
    assert before == pipeline.encode_prompts(caption, None, 1)[0]
    alone = list(writer.format.uncaptioned(0).ids)
    assert alone[: alone.index(SLOT)] == pipeline.encode_prompts(None, None, 1)[0]
    assert pipeline.transformer.config.eoi_token_id == alone[-1]
    assert pipeline.transformer.config.image_token_id == writer.first_free_id


def test_shares_of_documents():
    captions = ["a small red circle at the top left"] * 400
    shares = ["--caption_first_share", "0.7", "--caption_dropout", "0.2"]
    config = _config(*shares)
    rows = _writer(config).draw(captions, generator(0))
    ids = _writer(config).format
    assert sorted(rows.images.tolist()) == list(range(400))
    assert rows.image_first.float().mean() == pytest.approx(0.8 * 0.3, abs=0.06)
    starts = torch.cat([(rows.segment_ids[:, :1] > 0), rows.segment_ids[:, 1:] != rows.segment_ids[:, :-1]], dim=1)
    ends = (
        (rows.ids[:, 1:] != ids.eos)
        & (rows.ids[:, :-1] == ids.eoi)
        & (rows.segment_ids[:, 1:] != rows.segment_ids[:, :-1])
    )
    assert (rows.ids[starts & (rows.segment_ids > 0)] == ids.bos).all()
    assert ends.sum() / 400 == pytest.approx(0.2, abs=0.06)
    texts = _writer(_config("--text_only_share", "1")).draw(captions, generator(0))
    assert len(texts.images) == 0 and not (texts.ids == SLOT).any()
    share = _config("--text_only_share", "0.3")
    writer = _writer(share)
    alone = [len(writer.draw(captions[:2], generator(0, step)).images) == 0 for step in range(200)]
    assert sum(alone) / 200 == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon", "v_prediction"])
def test_images_before_their_caption_have_less_noise(prediction_type):
    task = _task("--prediction_type", prediction_type, "--caption_dropout", "0.1")
    captions, seen = ["a small red circle at the top left"] * 64, {True: [], False: []}
    noised = task.noising.noised

    def record(x0, noise, times):
        noisy, timesteps, target = noised(x0, noise, times)
        for first, timestep in zip(rows.image_first.tolist(), timesteps.tolist()):
            seen[first].append(timestep)
        return noisy, timesteps, target

    task.noising.noised = record
    for step in range(4):
        rows = task.writer.draw(captions, generator(step))
        with torch.no_grad():
            task.denoising_loss(task.modules["transformer"], rows, torch.zeros(64, 3, 16, 16), generator(step))
    assert max(seen[True]) < 500 < 900 < max(seen[False]) < 1000
    assert len(seen[True]) / 256 == pytest.approx(0.18, abs=0.08)


def test_target_and_noisy_image_of_diffusion():
    task = _task("--prediction_type", "epsilon")
    x0, noise = torch.randn(2, 3, 16, 16, generator=generator(0)), torch.randn(2, 3, 16, 16, generator=generator(1))
    noisy, timesteps, target = task.noising.noised(x0, noise, torch.tensor([0.0, 0.9999]))
    assert timesteps.tolist() == [0, 999] and torch.equal(target, noise)
    torch.testing.assert_close(noisy[1], noise[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(noisy[0], x0[0], atol=0.05, rtol=0)
    assert task.noising.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_text_only_batches_leave_the_image_layers(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": f"a small red circle {number}"}) + "\n" for number in range(9)))
    flags = ["--text_only_share", "1", "--text_dataset", str(file), "--text_column", "body", "--text_batch_size", "3"]
    _fit(tmp_path / "run", *flags, "--checkpointing_steps", "1", "--checkpoints_total_limit", "none")
    record = read_log(tmp_path / "run")[0]
    assert record["transformer/text_loss"] == pytest.approx(record["transformer/loss"])
    assert "transformer/image_loss" not in record
    first, second = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "transformer" / "diffusion_pytorch_model.safetensors")
        for step in (1, 2)
    )
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert "lm_head.weight" in changed and not any(name.startswith("image_") for name in changed)


@pytest.mark.parametrize("method", ["continuous", "discrete"])
def test_resume_is_bit_exact(method, vae, tmp_path):
    flags = {
        "continuous": ["--vae", str(vae), "--patch_size", "2", "--text_only_share", "0.5", "--row_length", "80"],
        "discrete": ["--image_mode", "discrete", "--vae", str(vae), "--codebook_size", "8", "--codebook_steps", "3"],
    }[method]
    flags += ["--max_train_steps", "4", "--checkpointing_steps", "2"]  # Muon and AdamW
    _fit(tmp_path, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


def test_two_processes_equal_one(tmp_path):
    flags = [*ARGUMENTS, "--text_only_share", "0.4", "--max_train_steps", "3", "--logging_steps", "1", "--limit", "8"]
    torchrun(EXAMPLES / f"{SCRIPT}.py", "--output_dir", tmp_path / "two", *flags, "--batch_size", "2")
    run_script(SCRIPT, tmp_path / "one", *flags, "--batch_size", "2", "--gradient_accumulation_steps", "2")
    for name in ("transformer/loss", "transformer/text_loss", "validation/error_0.5"):
        first, second = (logged(tmp_path / folder, name) for folder in ("one", "two"))
        assert first == pytest.approx(second, rel=1e-4)
    one, two = (
        load_file(tmp_path / folder / "checkpoint-3" / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_codes_are_learned_first_and_then_fixed(vae, tmp_path):
    flags = ["--image_mode", "discrete", "--vae", str(vae), "--codebook_size", "8", "--sigma", "0.2"]
    steps = ["--codebook_steps", "2", "--max_train_steps", "3", "--checkpointing_steps", "1"]
    final = _fit(tmp_path / "run", *flags, *steps, "--checkpoints_total_limit", "none", "--noise_timestep", "30")
    first, second, third = (
        NoisyLatentQuantizer.from_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "quantizer").state_dict()
        for step in (1, 2, 3)
    )
    weight = "codebook.embedding.weight"
    assert not torch.equal(first[weight], second[weight]) and torch.equal(second[weight], third[weight])
    pipeline = TransfusionPipeline.from_pretrained(final)
    assert torch.equal(pipeline.quantizer.state_dict()[weight], third[weight])
    assert (pipeline.quantizer.config.sigma, pipeline.transformer.config.fixed_timestep) == (0.2, 30)
    record = read_log(tmp_path / "run")[0]
    assert {"quantizer/loss", "transformer/text_loss", "transformer/image_loss"} <= record.keys()

    again = ["--image_mode", "discrete", "--vae", str(vae), "--quantizer", str(final / "quantizer")]
    other = TransfusionPipeline.from_pretrained(_fit(tmp_path / "again", *again))
    assert torch.equal(other.quantizer.state_dict()[weight], third[weight])
    assert other.transformer.config.fixed_timestep == 30
    settings = json.loads((tmp_path / "again" / "training_config.json").read_text())
    assert settings["sigma"] == 0.2


def test_codes_of_a_discrete_tokenizer():
    config = _config("--image_mode", "discrete", "--vae", "grey", "--resolution", "8")
    images = DiscreteImages(config, GreyTokenizer())
    task = load_script(SCRIPT).TransfusionTask(config, images, _writer(config, images.num_tokens), [])
    assert images.num_tokens == 16 and set(task.modules) == {"transformer"}
    batch = {"pixels": torch.randint(256, (2, 3, 8, 8), generator=generator(0)).to(torch.uint8)}
    codes = images.codes(batch, generator(1))
    rows = task.writer.captioned(["a small red circle at the top left"] * 2, image_first=True)
    seen = []
    task.next_code_loss(lambda ids, **_: seen.append(ids) or task.modules["transformer"](ids), rows, codes)
    config = task.modules["transformer"].config
    assert torch.equal(seen[0][rows.ids == SLOT].view(2, 16) - config.code_offset, codes)
    assert config.vocab_size == config.code_offset + 16
    with pytest.raises(ValueError, match="--resolution is 16, but --vae is for images of 8"):
        DiscreteImages(_config("--image_mode", "discrete", "--vae", "grey"), GreyTokenizer())


def test_cached_latents(vae, tmp_path):
    flags = ["--dataset", "shapes:single", "--limit", "64", "--batch_size", "4", "--resolution", "16", "--no_progress"]
    run_script("cache_latents", tmp_path / "cache", "--tokenizer", str(vae), *flags)
    flags = ["--vae", str(vae), "--cache", str(tmp_path / "cache"), "--patch_size", "2", "--image_adapter", "unet"]
    final = _fit(
        tmp_path / "run", *flags, "--adapter_channels", "8,8", "--causal_images", "--prediction_type", "epsilon"
    )
    pipeline = TransfusionPipeline.from_pretrained(final)
    config = pipeline.transformer.config
    assert (config.latent_channels, config.image_adapter, config.bidirectional_images) == (4, "unet", False)
    assert pipeline.scheduler.config.prediction_type == "epsilon" and not pipeline.scheduler.config.clip_sample
    # The script's own default, shapes:mixed, gives way to what the cache holds; another wish does not.
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["dataset"] == "shapes:single"
    with pytest.raises(ValueError, match="--dataset is shapes:double, in the cache shapes:single"):
        _fit(tmp_path / "other", "--vae", str(vae), "--cache", str(tmp_path / "cache"), "--dataset", "shapes:double")


def test_losses_fall(tmp_path):
    flags = ["--max_train_steps", "40", "--logging_steps", "1", "--batch_size", "8", "--learning_rate", "1e-2"]
    flags += ["--adamw_ratio", "0.3", "--width", "32", "--patch_size", "4", "--checkpointing_steps", "0"]
    _fit(tmp_path, *flags, "--limit", "16")
    for name, factor in (("text_loss", 0.6), ("image_loss", 0.75)):
        losses = logged(tmp_path, f"transformer/{name}")
        assert sum(losses[-5:]) < factor * sum(losses[:5]), name


def test_llama_starts_the_trunk(tmp_path):
    tokenizer = text_encoders.tokenizer(max_length=40)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = _config("--llama", str(tmp_path), "--causal_images")
    images = ContinuousImages(config, None)
    transformer = new_transformer(config, images, _writer(config))
    weights = llama.model.state_dict()
    assert torch.equal(transformer.model.layers[0].mlp.up_proj.weight, weights["layers.0.mlp.up_proj.weight"])
    assert not transformer.config.bidirectional_images and transformer.training


@pytest.mark.parametrize(("num_ids", "error"), [(40, None), (128, None), (500, "has 500 ids, but its tokenizer 34")])
def test_llamas_with_more_ids_than_their_tokenizer(tmp_path, num_ids, error):
    """Vocabularies are padded to multiples of powers of two; of several ends of text the tokenizer names one."""
    tokenizer = text_encoders.tokenizer(max_length=40)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [5, tokenizer.eos_token_id]}
    LlamaForCausalLM(LlamaConfig(vocab_size=num_ids, **sizes, **ids)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = _config("--llama", str(tmp_path))
    if error is not None:
        with pytest.raises(ValueError, match=error):
            _writer(config)
        return
    images, writer = ContinuousImages(config, None), _writer(config)
    transformer = new_transformer(config, images, writer)
    assert transformer.config.boi_token_id == writer.format.boi == num_ids
    assert transformer.config.eos_token_id == tokenizer.eos_token_id
    pipeline = TransfusionPipeline(transformer.eval(), writer.tokenizer, image_size=16)
    assert pipeline.vocabulary.blocked()[len(tokenizer) : num_ids].all()


def test_texts_longer_than_a_row_are_read_in_parts(tmp_path):
    """Only the last part has the end, and no part is left out."""
    writer = _writer(_config("--text_tokens", "4", "--row_length", "12"))
    ids = writer.format
    text = " ".join(["a small red circle at the top left"] * 4)
    whole = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = {start: whole[start : start + 10] for start in range(0, len(whole), 10)}
    seen = set()
    for step in range(40):
        (row,) = writer.texts_alone([text], generator(0, step)).ids.tolist()
        row = [token for token in row if token != ids.pad]
        ended = row[-1] == ids.eos
        start = next(start for start, part in parts.items() if row[1 : len(row) - ended] == part)
        assert row[0] == ids.bos and ended == (start == max(parts))
        seen.add(start)
    assert seen == set(parts)
    assert writer.texts_alone([text]).ids[0, 1:11].tolist() == parts[0]
    caption = writer.captioned([text], image_first=True).ids[0].tolist()
    assert ids.eos not in caption and [token for token in caption if token != ids.pad][-4:] == whole[:4]


def test_the_loss_of_packed_rows_is_that_of_rows_of_their_own():
    captions = ["a small red circle at the top left", "a large blue cross in the centre", "a small red circle"]
    losses, shapes = [], []
    for length in ("25", "80"):
        task = _task("--row_length", length)
        torch.manual_seed(0)
        transformer = task.modules["transformer"]
        for parameter in transformer.parameters():  # some begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
        rows = task.writer.captioned(captions, image_first=True)
        x0 = torch.randn(3, 3, 16, 16, generator=generator(0))[rows.images]
        losses.append(task.denoising_loss(transformer, rows, x0, generator(1), time=0.0)[1]["text_loss"])
        shapes.append(tuple(rows.ids.shape))
    assert shapes[1][0] < shapes[0][0] == 3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_new_networks_keep_the_size_of_activations():
    """Llama's 0.02 would shrink them in a narrow network; blocks start as the identity, predictions at zero."""
    task = _task("--width", "64", "--num_layers", "2", "--num_heads", "2")
    transformer = task.modules["transformer"]
    assert transformer.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    states = torch.randn(1, 5, 64, generator=generator(0))
    hidden = transformer.run(states, torch.arange(5)[None])
    torch.testing.assert_close(hidden, transformer.model.norm(states))
    rows = task.writer.captioned(["a small red circle at the top left"], image_first=False)
    _, log = task.denoising_loss(transformer, rows, torch.zeros(1, 3, 16, 16), generator(0), 0.5)
    assert log["image_loss"].item() == pytest.approx(1, abs=0.15)  # of a prediction of 0 for noise - 0


ERRORS = {
    "share": (["--caption_first_share", "1.5"], "--caption_first_share is 1.5"),
    "guidance": (["--caption_dropout", "0"], "set --guidance_scale 1"),
    "heads": (["--width", "20", "--num_heads", "4"], "must be a multiple of twice --num_heads 4"),
    "text data": (["--text_dataset", "x"], "need --text_only_share"),
    "text batch": (["--text_only_share", "0.5", "--text_batch_size", "4"], "--text_batch_size is of --text_dataset"),
    "codes": (["--image_mode", "discrete"], "give --vae"),
    "quantizer": (["--quantizer", "x"], "--quantizer is of --image_mode discrete"),
    "sigma": (["--sigma", "-1"], "--sigma is -1.0"),
    "mode": (["--image_mode", "pixels"], "choose one of continuous, discrete"),
    "adapter": (["--image_adapter", "unet"], "--adapter_channels has 3 levels, which make patches of 4"),
    "time": (["--image_first_max_timestep", "0"], "between 1 and 1000"),
    "steps": (["--num_inference_steps", "0"], "--num_inference_steps is 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        _config(*arguments)
    assert message in capsys.readouterr().err


def test_misfits_are_errors(vae, tmp_path):
    with pytest.raises(ValueError, match="--patch_size 5 does not divide the side of the samples, 16"):
        ContinuousImages(_config("--patch_size", "5"), None)
    with pytest.raises(ValueError, match="--row_length is 20, but an image of 4 tokens"):
        _writer(_config("--row_length", "20"))
    with pytest.raises(ValueError, match="--context_length is 20"):
        _writer(_config("--context_length", "20"))
    with pytest.raises(ValueError, match="has 2 texts, of which --num_validation_images 64"):
        file = tmp_path / "texts.txt"
        file.write_text("one\ntwo\n")
        _writer(_config("--text_only_share", "1", "--text_dataset", str(file)))
    NoisyLatentQuantizer(num_codes=4, latent_channels=3).save_pretrained(tmp_path / "quantizer")
    with pytest.raises(ValueError, match="is for latents of 3 channels, but those of --vae have 4"):
        _fit(
            tmp_path / "run", "--image_mode", "discrete", "--vae", str(vae), "--quantizer", str(tmp_path / "quantizer")
        )


@pytest.mark.parametrize("name", TRANSFUSION_SIZES)
def test_recipes_are_the_published_sizes(name):
    file = EXAMPLES / "configs" / f"transfusion_{name.lower()}.yaml"
    given = ["--output_dir", "run", "--vae", "vae", "--text_dataset", "texts", "--dataset", "images"]
    config = parse_config(TransfusionTrainingConfig, ["--config", str(file), *given])
    assert (config.num_layers, config.width, config.num_heads, config.mlp_width) == TRANSFUSION_SIZES[name]
    assert (config.prediction_type, config.image_weight, config.caption_first_share) == ("epsilon", 5.0, 0.8)
    assert (config.optimizer, config.adam_beta2, config.warmup_steps) == ("adamw", 0.95, 4000)
    processes = int(file.read_text().split("--num_processes ")[1].split()[0])
    rows = processes * config.gradient_accumulation_steps * config.text_batch_size
    assert rows * config.row_length == 2**21  # 2 M tokens
    assert config.learning_rate * config.lr_final == pytest.approx(1.5e-5)


def test_recipe_of_the_unet_is_the_preset():
    file = EXAMPLES / "configs" / "transfusion_7b_unet.yaml"
    given = ["--output_dir", "run", "--vae", "vae", "--text_dataset", "texts"]
    config = parse_config(TransfusionTrainingConfig, ["--config", str(file), *given])
    default = inspect.signature(TransfusionTransformer.__init__).parameters["adapter_channels"].default
    assert config.image_adapter == TransfusionTransformer.presets["7B-unet"]["image_adapter"] == "unet"
    assert config.adapter_channels == tuple(default)


def test_recipe_of_the_autoencoder_is_the_papers():
    file = EXAMPLES / "configs" / "transfusion_vae.yaml"
    arguments = ["--config", str(file), "--output_dir", "run", "--perceptual_source", "weights"]
    config = parse_config(AutoencoderKLTrainingConfig, arguments)
    assert (config.latent_channels, config.reconstruction, config.kl_weight) == (8, "l1", 1e-6)
    assert (config.adversarial_weight, config.discriminator_start, config.max_train_steps) == (0.5, 50000, 1_000_000)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in new_autoencoder(config).parameters())
    assert size == pytest.approx(86e6, rel=0.05)
