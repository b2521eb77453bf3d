"""A Llama checkpoint as the start of a Transfusion model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hfgen import TransfusionTransformer
from hfgen.counters import generator

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(folder, max_shard_size="1GB", **arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **arguments})).eval()
    draws = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"rope_parameters": LLAMA3, "max_shard_size": "10KB"},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "theta", "llama3 in shards", "tied"],
)
@pytest.mark.parametrize("image_mode", ["continuous", "discrete"])
@torch.no_grad()
def test_text_is_that_of_the_llama(tmp_path, arguments, image_mode):
    reference = llama(tmp_path, **arguments)
    codes = {"codebook_size": 8} if image_mode == "discrete" else {}
    model = TransfusionTransformer.from_llama(tmp_path, image_mode=image_mode, latent_channels=2, **codes)
    assert not model.training and model.config.vocab_size == 40 + (3 + 8 if codes else 4)
    ids = torch.randint(40, (2, 50), generator=generator(2))
    if codes:  # text has a modality of its own, which has to be learned
        model.modality_embedding.weight.zero_()
    expected = reference(ids).logits
    torch.testing.assert_close(model(ids).logits[..., :40], expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    rebuilt = TransfusionTransformer.from_config(model.config)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_new_ids_start_around_the_mean(tmp_path):
    reference = llama(tmp_path)
    model = TransfusionTransformer.from_llama(tmp_path, dtype=torch.float64)
    assert model.dtype == torch.float64
    for rows, known in (
        (model.model.embed_tokens.weight, reference.model.embed_tokens.weight),
        (model.lm_head.weight, reference.lm_head.weight),
    ):
        assert torch.equal(rows[:40], known.double()) and len(rows[40:].unique(dim=0)) == 4
        torch.testing.assert_close(rows[40:].mean(0), known.double().mean(0), rtol=0, atol=0.06)
    special = {name: value for name, value in model.config.items() if name.endswith("_token_id")}
    assert sorted(special.values()) == [1, 2, 40, 41, 42, 43] and model.config.bos_token_id == 1


def test_what_images_are_can_be_chosen(tmp_path):
    llama(tmp_path)
    causal = TransfusionTransformer.from_llama(tmp_path, bidirectional_images=False)
    assert not causal.config.bidirectional_images
    assert TransfusionTransformer.from_llama(tmp_path).config.bidirectional_images
    codes = TransfusionTransformer.from_llama(tmp_path, image_mode="discrete", codebook_size=8, fixed_timestep=30)
    ids = torch.tensor([[1, 40, 43, 44]])
    expected = codes(ids, timesteps=torch.tensor([30])).logits
    assert torch.equal(codes(ids).logits, expected)
    assert not torch.equal(codes(ids, timesteps=torch.tensor([100])).logits, expected)


def test_checkpoints_that_do_not_fit(tmp_path):
    llama(tmp_path)
    weights, original = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")

    def refused(message, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            TransfusionTransformer.from_llama(tmp_path, **arguments)

    save_file({name: tensor for name, tensor in original.items() if "layers.1.mlp.up" not in name}, weights)
    refused(r"missing \['model.layers.1.mlp.up_proj.weight'\], unknown \[\]")
    save_file(original | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, weights)
    refused(r"missing \[\], unknown \['model.layers.0.self_attn.q_proj.bias'\]")
    save_file(original | {"model.norm.weight": torch.zeros(31)}, weights)
    refused(r"model.norm.weight has shape \(31,\); expected \(32,\)")
    save_file(original | {"lm_head.weight": torch.zeros(41, 32)}, weights)
    refused(r"lm_head.weight has shape \(41, 32\); expected \(40, 32\)")
    weights.rename(tmp_path / "pytorch_model.bin")
    refused("Only safetensors are read", OSError)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "../other.safetensors"}}'
    )
    refused("files beside it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral'; only 'llama'"),
        ({"attention_bias": True}, "attention_bias = True; only False"),
        ({"hidden_size": "large"}, "hidden_size = 'large'; expected a positive integer"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id = \[2, 3\]; one id is needed"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, message):
    llama(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        TransfusionTransformer.from_llama(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    for source in (tmp_path / "a" / "b" / "none", "a/b/c"):
        with pytest.raises(OSError, match="There is no folder .* no Hub id such as USER/NAME"):
            TransfusionTransformer.from_llama(source)
    llama(tmp_path)
    with pytest.raises(ValueError, match="image_mode = 'pixels'; expected one of 'continuous', 'discrete'"):
        TransfusionTransformer.from_llama(tmp_path, image_mode="pixels")


def test_the_end_of_text_can_be_chosen(tmp_path):
    llama(tmp_path)
    change_config(tmp_path, eos_token_id=[2, 3])
    model = TransfusionTransformer.from_llama(tmp_path, eos_token_id=3, context_length=32)
    assert model.config.eos_token_id == 3 and model.config.context_length == 32
    for arguments in (
        {"image_mode": "discrete"},
        {"codebook_size": 8},
        {"image_mode": "discrete", "codebook_size": 0},
    ):
        with pytest.raises(ValueError, match="codebook_size"):
            TransfusionTransformer.from_llama(tmp_path, eos_token_id=3, **arguments)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"has no config.json"):
        TransfusionTransformer.from_llama(tmp_path)
