"""Checkpoint files for the converter and for --resume that were made to harm."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from hfgen.conversion import load_original, read_checkpoint, to_original
from hfgen.training.checkpoints import load_checkpoint, save_checkpoint
from support.bounded import assert_refused
from support.hostile import LYING_HEADERS, Payload, write_safetensors
from support.instances import build_model


def repack(
    path: Path, member: str, content: bytes, megabytes: int = 0, compression: int = zipfile.ZIP_DEFLATED
) -> None:
    """Replace one member of a file of torch.save by ``content`` and so many megabytes of zeros."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, data in members.items():
            with target.open(name, "w", force_zip64=True) as file:
                file.write(content if name.endswith(member) else data)
                for _ in range(megabytes if name.endswith(member) else 0):
                    file.write(bytes(2**20))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save({"a": torch.zeros(4)}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.mark.parametrize("name", LYING_HEADERS)
def test_safetensors_headers_that_lie(tmp_path, name):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, *LYING_HEADERS[name])
    assert_refused(lambda: read_checkpoint(path), "model.safetensors is cut off or not a safetensors file")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_zip_bombs(checkpoint, member):
    repack(checkpoint, member, b"", megabytes=120)
    assert checkpoint.stat().st_size < 2**20
    assert_refused(lambda: read_checkpoint(checkpoint), "data.pkl is compressed", megabytes=60)


PICKLES = {
    "deep": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "long-string": b"\x80\x02X" + (2**31 - 1).to_bytes(4, "little") + b".",
    "many-items": b"\x80\x02" + b"(" * 10**4 + b".",
    "no-end": b"\x80\x02}",
    "text-protocol": b"(lp0\ncos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_exhaust_the_reader(checkpoint, name, zipped):
    if zipped:
        repack(checkpoint, "data.pkl", PICKLES[name], compression=zipfile.ZIP_STORED)
    else:
        checkpoint.write_bytes(PICKLES[name])
    assert_refused(lambda: read_checkpoint(checkpoint), "model.pth", megabytes=3000)


def test_tensors_that_claim_more_than_is_stored(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "model.pth")
    assert_refused(
        lambda: read_checkpoint(tmp_path / "model.pth"), "copies of its tensors would take 4,000,000,000,000"
    )
    nested = [torch.zeros(1).expand(10**7) for _ in range(10)]
    torch.save({"model": {"list": nested}}, tmp_path / "model.pth")
    assert_refused(lambda: read_checkpoint(tmp_path / "model.pth"), "would take 400,000,000")


def test_small_expanded_tensors_are_read(tmp_path):
    torch.save({"mask": torch.zeros(1).expand(1, 1, 64, 64)}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth")["mask"].shape == (1, 1, 64, 64)


def test_names_that_ask_for_endless_blocks():
    state = to_original(build_model("VARTransformer"))
    state["blocks.999999999.ffn.fc1.bias"] = state["blocks.0.ffn.fc1.bias"]
    options = {"patch_nums": [1, 2, 4], "num_heads": 2}
    assert_refused(
        lambda: load_original("var", state, part="transformer", original_config=options), "more than 5,000 tensors"
    )


@pytest.mark.parametrize("text", ["[" * 200_000, '{"weight_map":' + "[" * 200_000])
def test_nested_shard_indices(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(lambda: read_checkpoint(tmp_path), "nested too deeply")


def test_shard_indices_stay_in_their_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in ("../model.pth", "/etc/passwd.bin", "..", ""):
        (tmp_path / "in" / "model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="only checkpoint files beside the index"):
            read_checkpoint(tmp_path / "in")


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "cut"])
def test_a_training_state_with_code_is_not_resumed(tmp_path, form):
    model, trace = build_model("MultiScaleVQVAE"), tmp_path / "executed"
    folder = save_checkpoint(tmp_path, 1, {"model": model}, {"optimizer": {}})
    path = folder / "training_state.pt"
    if form == "plain":
        path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    elif form == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        torch.save({"step": Payload(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    trace.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"training_state\.pt is damaged, or holds more than tensors"):
        load_checkpoint(folder, {"model": model})
    assert not trace.exists()


def test_removing_old_checkpoints_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("x")
    run = tmp_path / "run"
    model = build_model("MultiScaleVQVAE")
    first = save_checkpoint(run, 1, {"model": model}, {})
    (first / "link").symlink_to(outside, target_is_directory=True)
    (run / "checkpoint-0.tmp").symlink_to(outside, target_is_directory=True)
    with pytest.raises(OSError, match="symbolic link"):
        save_checkpoint(run, 2, {"model": model}, {}, total_limit=1)
    (run / "checkpoint-0.tmp").unlink()
    save_checkpoint(run, 2, {"model": model}, {}, total_limit=1)
    assert not first.exists() and (outside / "kept.txt").exists()
    shutil.rmtree(run)
