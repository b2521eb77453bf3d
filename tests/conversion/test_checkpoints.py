"""Reading checkpoints: every kind of file, damaged ones, and pickles that would run code."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hfgen.conversion import read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


class Payload:
    """Restoring it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Settings:
    """A harmless object that the weights-only reader does not know."""

    def __init__(self):
        self.depth = 2


def write_shards(folder, weight_map):
    for shard in set(weight_map.values()):
        save_file({name: STATE[name] for name, where in weight_map.items() if where == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def assert_is_state(content):
    assert content.keys() == STATE.keys()
    assert all(torch.equal(content[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    assert_is_state(read_checkpoint(path))
    assert_is_state(read_checkpoint(str(path)))


def test_safetensors_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert_is_state(read_checkpoint(tmp_path / "model.safetensors"))


def test_mapping_is_taken_as_it_is():
    content = read_checkpoint(STATE)
    assert_is_state(content)
    assert content is not STATE


def test_nesting_is_kept(tmp_path):
    torch.save({"trainer": {"model": STATE}, "epoch": 3, "args": {"lr": 0.1, "name": "x"}}, tmp_path / "m.pth")
    content = read_checkpoint(tmp_path / "m.pth")
    assert content["epoch"] == 3
    assert_is_state(content["trainer"]["model"])


def test_folder_with_one_checkpoint(tmp_path):
    torch.save(STATE, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text("{}")
    assert_is_state(read_checkpoint(tmp_path))


def test_shards_by_folder_and_by_index(tmp_path):
    index = write_shards(tmp_path, {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"})
    assert_is_state(read_checkpoint(tmp_path))
    assert_is_state(read_checkpoint(index))


def test_folder_with_several_checkpoints_lists_them(tmp_path):
    torch.save(STATE, tmp_path / "ema.pth")
    save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="several checkpoints: ema.pth, model.safetensors"):
        read_checkpoint(tmp_path)


def test_shards_beside_another_checkpoint(tmp_path):
    write_shards(tmp_path, {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"})
    torch.save(STATE, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="several checkpoints: model.safetensors.index.json, ema.pth"):
        read_checkpoint(tmp_path)


def test_folder_without_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        read_checkpoint(tmp_path)


def test_absent_file_and_other_suffix(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        read_checkpoint(tmp_path / "nothing.pth")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt is not a checkpoint: its name must end in one of .safetensors"):
        read_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/etc/model.bin", "sub/x.bin", "..\\x.bin", "passwd", 3])
def test_index_must_not_leave_its_folder(tmp_path, shard):
    (tmp_path / "in").mkdir()
    save_file(STATE, tmp_path / "model-1.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, shard)}))
    for checkpoint in (index, index.parent):
        with pytest.raises(ValueError, match="only checkpoint files beside the index"):
            read_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}'])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    index = write_shards(tmp_path, {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"c": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="disagree on which tensors there are, first on 'b'"):
        read_checkpoint(index)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        read_checkpoint(index)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "zip.pth", "legacy.pth"])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_cut_off_files_are_named(tmp_path, kept, name, allow_pickle):
    path = tmp_path / name
    state = {"a": torch.zeros(1000)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name.startswith("zip"))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=f"{name} is cut off or not a"):
        read_checkpoint(path, allow_pickle=allow_pickle)


@pytest.mark.parametrize("name", ["page.safetensors", "page.pth"])
def test_foreign_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>Not found</html>" * 10)
    with pytest.raises(ValueError, match=f"{name} is cut off or not a") as error:
        read_checkpoint(tmp_path / name)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2]])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}; expected a state dict"):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_never_runs(tmp_path, form):
    path, trace = tmp_path / "model.pth", tmp_path / "executed"
    content = STATE | {"extra": Payload(trace)}
    if form == "plain":
        path.write_bytes(pickle.dumps({"extra": Payload(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    trace.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"model\.pth was not read: .*allow_pickle=True .*--trust-pickle"):
        read_checkpoint(path)
    assert not trace.exists()


def test_refused_objects_are_named_and_read_on_request(tmp_path):
    torch.save(STATE | {"settings": Settings()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"besides tensors it holds \S*Settings,"):
        read_checkpoint(tmp_path / "model.pth")
    content = read_checkpoint(tmp_path / "model.pth", allow_pickle=True)
    assert content["settings"].depth == 2
    assert torch.equal(content["b"], STATE["b"])
