"""The converter of MaskGIT's VQGAN: both published forms, and files made to harm."""

import math
import struct

import pytest
import torch

from hfgen import MaskGITVQGAN
from hfgen.conversion import load_original, parts, read_checkpoint, released, to_original
from hfgen.conversion.converter import OriginalConfig
from hfgen.conversion.maskgit_vqgan import flax_rules
from hfgen.conversion.rules import convert, revert
from support.golden import PUBLIC_CASES, read_case

SYSTEM = "maskgit_vqgan"


def state_of(part="tokenizer"):
    return dict(read_case(SYSTEM, PUBLIC_CASES).states[part])


# ------------------------------------------------------------------------------------------------ writing flax files


def text(value):
    return b"\xd9" + bytes([len(value)]) + value.encode()


def array(tensor, dtype=None, shape=None, data=None):
    """flax's extension type 1: msgpack of (shape, dtype name, bytes)."""
    shape = tuple(tensor.shape) if shape is None else shape
    data = tensor.contiguous().numpy().tobytes() if data is None else data
    sizes = b"".join(struct.pack(">BI", 0xCE, size) for size in shape)
    content = b"\x93" + bytes([0x90 + len(shape)]) + sizes + text(dtype or str(tensor.dtype).removeprefix("torch."))
    content += struct.pack(">BI", 0xC6, len(data)) + data
    return struct.pack(">BIB", 0xC9, len(content), 1) + content


def pack(tree):
    if not isinstance(tree, dict):
        return tree if isinstance(tree, bytes) else array(tree)
    entries = b"".join(text(name) + pack(value) for name, value in tree.items())
    return struct.pack(">BH", 0xDE, len(tree)) + entries


def nested(state):
    tree = {}
    for name, tensor in state.items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = tensor
    return tree


@pytest.mark.parametrize("name", ["tokenizer_imagenet256_checkpoint", "vqgan.msgpack"])
def test_flax_file(tmp_path, name):
    state = state_of("jax_tokenizer")
    (tmp_path / name).write_bytes(pack(nested(state)))
    read = read_checkpoint(tmp_path / name)
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
    model = MaskGITVQGAN.from_single_file(tmp_path / name)
    assert torch.equal(model.quantizer.embedding.weight, state["params.quantizer.codebook"])
    with_config = load_original(SYSTEM, state, original_config={"resolution": 64})
    assert all(torch.equal(value, with_config.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_dtypes_of_flax_arrays(tmp_path, dtype):
    values = (torch.arange(6).view(2, 3) % 2).to(dtype)
    (tmp_path / "a.msgpack").write_bytes(pack({"a": values}))
    assert torch.equal(read_checkpoint(tmp_path / "a.msgpack")["a"], values)


BOMB = 2**31 - 1
DAMAGED = {
    "empty": (b"", "cut off or not a flax msgpack checkpoint"),
    "cut": (pack({"a": torch.zeros(9)})[:-1], "cut off"),
    "more": (pack({"a": torch.zeros(9)}) + b"\0", "1 bytes after its end"),
    "no-map": (array(torch.zeros(2)), "holds a Tensor; expected a map"),
    "pickle": (b"\x80\x02}q\0.", "cut off or not"),
    "deep": (b"\x81\xa1a" * 100 + b"\x01", "nested more than 16 deep"),
    "long-text": (struct.pack(">BBI", 0x81, 0xDB, BOMB), "bytes expected"),
    "many": (struct.pack(">BI", 0xDF, BOMB) + b"".join(text(str(n)) + b"\1" for n in range(20_000)), "values"),
    "twice": (b"\x82\xa1a\x01\xa1a\x01", "'a', which is no text or occurs twice"),
    "number-name": (b"\x81\x01\x01", "no text"),
    "python-object": (pack({"a": b"\xd4\x2a\x00"}), "extension of type 42"),
    "float": (pack({"a": b"\xcb" + bytes(8)}), "kind 0xcb"),
    "huge-shape": (pack({"a": array(torch.zeros(2), shape=(2**31, 2**31, 2**31))}), "does not have its"),
    "other-shape": (pack({"a": array(torch.zeros(2), shape=(3,))}), "does not have its 12 bytes"),
    "empty-shape": (pack({"a": array(torch.zeros(2), shape=(0, 3))}), "the shape"),
    "object-dtype": (pack({"a": array(torch.zeros(2), dtype="object")}), "dtype 'object'"),
    "no-triple": (pack({"a": struct.pack(">BBB", 0xC7, 1, 1) + b"\x90"}), "not .shape, dtype, bytes."),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_flax_files(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / "a.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.msgpack .*{message}"):
        read_checkpoint(tmp_path / "a.msgpack")


def test_flax_names_that_make_no_vqgan():
    state = state_of("jax_tokenizer")
    with pytest.raises(ValueError, match="1 missing: .*conv2"):
        load_original(SYSTEM, {k: v for k, v in state.items() if k != "params.encoder.ResBlock_3.Conv_1.kernel"})
    with pytest.raises(ValueError, match="make no MaskGIT VQGAN"):
        load_original(SYSTEM, {k: v for k, v in state.items() if "decoder.Conv_5" not in k})
    with pytest.raises(ValueError, match="make no MaskGIT VQGAN"):
        load_original(SYSTEM, state | {"params.decoder.ResBlock_999999999.Conv_0.kernel": torch.zeros(1)})


def test_flax_rules_read_in_both_directions():
    state, rules = state_of("jax_tokenizer"), flax_rules(5, 2)
    port = convert(state, rules)
    assert port.keys() == state_of().keys()
    back = revert(port, rules)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


# ---------------------------------------------------------------------------------------------------------- the port


def test_round_trip():
    state = state_of()
    model = load_original(SYSTEM, state)
    back = to_original(model)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_configuration_is_read_off_the_tensors():
    official = read_case(SYSTEM, PUBLIC_CASES).config
    config = load_original(SYSTEM, state_of(), original_config={"resolution": 64}).config
    assert list(config.channel_multipliers) == official["channel_mult"]
    assert config.layers_per_block == official["num_res_blocks"]
    assert (config.base_channels, config.latent_channels) == (official["hidden_channels"], official["z_channels"])
    assert (config.num_codes, config.image_size) == (official["num_embeddings"], 64)


@pytest.mark.parametrize("given", [{"channel_mult": [1, 2]}, {"num_res_blocks": 3}, {"num_embeddings": 8}])
def test_contradicting_arguments(given):
    with pytest.raises(ValueError, match=rf"original_config\['{next(iter(given))}'\] is .* the tensors say"):
        load_original(SYSTEM, state_of(), original_config=given)


def test_arguments_that_make_no_model():
    with pytest.raises(ValueError, match="entropy_assignment = 'hard'"):
        load_original(SYSTEM, state_of(), original_config={"entropy_loss_type": "hard"})
    with pytest.raises(ValueError, match="image_size=100 must be a multiple of 16"):
        load_original(SYSTEM, state_of(), original_config={"resolution": 100})


def test_released_size():
    with torch.device("meta"):
        model = MaskGITVQGAN.from_preset("maskgit-vqgan-256")
        state = parts(SYSTEM)["vq_model"].save(model)
    sizes = {side: sum(p.numel() for p in getattr(model, side).parameters()) for side in ("encoder", "decoder")}
    assert {side: round(size / 1e6, 1) for side, size in sizes.items()} == {"encoder": 23.8, "decoder": 30.5}
    assert model.num_tokens == 256 and MaskGITVQGAN.presets["maskgit-vqgan-512"]["image_size"] == 512
    config = parts(SYSTEM)["vq_model"].config(state, OriginalConfig({}))
    assert config == {name: model.config[name] for name in config}
    (row,) = (row for row in released() if row.system == SYSTEM)
    num_bytes = 4 * sum(math.prod(tensor.shape) for tensor in state.values())
    assert 0.98 < row.megabytes * 1e6 / num_bytes < 1.04


def test_bad_input():
    model = load_original(SYSTEM, state_of(), original_config={"resolution": 64})
    with pytest.raises(ValueError, match=r"\(1, 3, 40, 64\), expected .* multiples of 16"):
        model.encode(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match="15 codes are no square grid"):
        model.decode_codes(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 64\], expected ids in \[0, 63\]"):
        model.decode_codes(torch.tensor([[[0, 64]]]))
    with pytest.raises(ValueError, match=r"latents have shape .* expected \(batch, 16"):
        model.decode(torch.zeros(1, 8, 4, 4))


def test_other_sizes_and_sides_in_both_forms():
    """Three levels, one block each, the first already wider: names and counts differ from the released ones."""
    arguments = {"num_codes": 8, "latent_channels": 4, "base_channels": 2, "channel_multipliers": (2, 2, 3)}
    model = MaskGITVQGAN(**arguments, layers_per_block=1, norm_num_groups=2, image_size=8).eval()
    port = to_original(model)
    flax = {name: value.contiguous() for name, value in revert(port, flax_rules(3, 1)).items()}
    rules = flax_rules(3, 1)
    assert all(torch.equal(value, port[name]) for name, value in convert(flax, rules).items())
    config = parts(SYSTEM)["vq_model"].config(parts(SYSTEM)["vq_model"].find(flax), OriginalConfig({"resolution": 8}))
    assert config == {name: model.config[name] for name in config}
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        output = model(pixels)
        assert output.codes.shape == (2, 6) and output.sample.shape == pixels.shape
        again = model.decode_codes(output.codes.unflatten(1, (2, 3))).sample
    torch.testing.assert_close(again, output.sample, rtol=0, atol=1e-5)
