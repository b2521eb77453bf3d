"""LPIPS with random weights in the layout of the public files."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from hfgen.losses import perceptual
from hfgen.losses.perceptual import FEATURE_CHANNELS, LPIPS


@pytest.fixture(scope="module")
def files() -> dict[str, dict]:
    draws = torch.Generator().manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}
    for name, value in LPIPS().features.state_dict().items():
        fan_in = value[0].numel() if value.ndim > 1 else 100
        vgg[f"features.{name}"] = torch.randn(value.shape, generator=draws) * (2 / fan_in) ** 0.5
    linear = {
        f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=draws)
        for k, width in enumerate(FEATURE_CHANNELS)
    }
    return {"vgg": vgg, "linear": linear}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    save_file(files["vgg"], folder / "vgg16.safetensors")
    torch.save(files["linear"], folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(folder) -> LPIPS:
    return LPIPS.from_pretrained(folder)


def _images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_value_is_the_published_formula(lpips, files):
    """Written down again layer by layer, from the files."""
    images, references = _images(1), _images(2)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(2)
    stacks = [((x - shift[:, None, None]) / scale[:, None, None]) for x in (images, references)]
    blocks = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    for k, block in enumerate(blocks):
        if k > 0:
            stacks = [nn.functional.max_pool2d(x, 2) for x in stacks]
        for n in block:
            weight, bias = (files["vgg"][f"features.{n}.{part}"] for part in ("weight", "bias"))
            stacks = [nn.functional.conv2d(x, weight, bias, padding=1).relu() for x in stacks]
        first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in stacks)
        weighted = nn.functional.conv2d((first - second) ** 2, files["linear"][f"lin{k}.model.1.weight"])
        total += weighted.mean(dim=(1, 2, 3))
    assert torch.allclose(lpips(images, references), total, rtol=1e-4)
    assert (total > 0).all()


def test_equal_images_have_distance_zero_and_finite_gradients(lpips):
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = lpips(images, images.detach())
    assert distance.item() == 0.0
    lpips(images, _images(3)[:1]).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0


def test_nothing_in_it_trains(lpips):
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not any(isinstance(module, nn.Dropout) for module in lpips.modules())


def test_missing_file_says_what_where_and_how_to_do_without(tmp_path, folder):
    with pytest.raises(ValueError, match=r"has no vgg16.safetensors or vgg16-397923af.pth.*--perceptual_weight 0"):
        LPIPS.from_pretrained(tmp_path)
    (tmp_path / "vgg16.safetensors").symlink_to(folder / "vgg16.safetensors")
    with pytest.raises(ValueError, match=r"has no vgg.safetensors or vgg.pth.*PerceptualSimilarity"):
        LPIPS.from_pretrained(tmp_path)


def test_incomplete_file_names_the_tensors(tmp_path, folder, files):
    (tmp_path / "vgg16.safetensors").symlink_to(folder / "vgg16.safetensors")
    save_file({k: v for k, v in files["linear"].items() if "lin3" not in k}, tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=r"lack lins.3\. LPIPS needs"):
        LPIPS.from_pretrained(tmp_path)


def test_hub_repository(monkeypatch, folder):
    class Missing(EntryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def download(repo, name):
        if not (folder / name).is_file() or repo != "owner/name":
            raise Missing
        return str(folder / name)

    monkeypatch.setattr(perceptual, "hf_hub_download", download)
    assert isinstance(LPIPS.from_pretrained("owner/name"), LPIPS)
    with pytest.raises(ValueError, match="Hub repository owner/other has no vgg16.safetensors"):
        LPIPS.from_pretrained("owner/other")


def test_unreachable_source_is_an_error():
    with pytest.raises(ValueError, match="neither a local folder nor.*LPIPS needs two files"):
        LPIPS.from_pretrained("no/such/place")
