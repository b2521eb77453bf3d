"""The objectives of TiTok: formulas, moving averages, networks from files, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hfgen.losses.convnext import ConvNeXtDistance, MeanDistance
from hfgen.losses.lecam import LeCam
from hfgen.losses.titok import proxy_code_loss, reconstruction_loss
from hfgen.models.layers.blur_discriminator import BlurDownsample, BlurPatchDiscriminator
from support.golden import PUBLIC_CASES, read_case


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small ConvNeXt in the layout of torchvision."""
    prefix = "perceptual_loss.convnext."
    state = read_case("titok", PUBLIC_CASES).states["loss_stage2"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ["convnext_small.safetensors", "convnext_small-0c510722.pth"])
def test_convnext_from_a_file(tmp_path, weights, name):
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    distance = ConvNeXtDistance.from_pretrained(tmp_path).train()
    assert not distance.network.training and not any(p.requires_grad for p in distance.parameters())
    images = draws(2, 3, 16, 16).clamp(-1, 1)
    assert torch.equal(distance(images, images), torch.zeros(2))
    single = distance(images[:1], images[1:])
    expected = F.mse_loss(distance.logits(images[:1]), distance.logits(images[1:]))
    torch.testing.assert_close(single, expected[None])
    assert single > 0


def test_convnext_files_that_do_not_fit(tmp_path, weights):
    with pytest.raises(ValueError, match=r"has no convnext_small\.safetensors .*set its weight to 0"):
        ConvNeXtDistance.from_pretrained(tmp_path)
    missing = {name: value for name, value in weights.items() if name != "features.5.1.block.3.bias"}
    with pytest.raises(ValueError, match=r"Missing key.*stages\.2\.layers\.1\.pwconv1\.bias"):
        ConvNeXtDistance.from_state_dict(missing)
    with pytest.raises(ValueError, match="Unexpected key.*extra"):
        ConvNeXtDistance.from_state_dict(weights | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="no ConvNeXt weights"):
        ConvNeXtDistance.from_state_dict({"conv.weight": torch.zeros(1)})


class L1(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images, references):
        return self.factor * (images - references).abs().mean(dim=(1, 2, 3))


def test_mean_distance():
    mean = MeanDistance([L1(1.0), L1(10.0)], [1.0, 0.1])
    images, references = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    torch.testing.assert_close(mean(images, references), torch.full((2,), 2 / 1.1))
    for weights in ([1.0], [0.0, 0.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="2 distances need as many weights of at least 0"):
            MeanDistance([L1(1.0), L1(1.0)], weights)


def test_lecam_averages_change_after_use_and_in_training_only():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0])
    torch.testing.assert_close(lecam(real, fake), torch.tensor(2.0**2 + 1.0**2))
    torch.testing.assert_close(torch.stack([lecam.real, lecam.fake]), torch.tensor([0.2, -0.1]))
    expected = torch.tensor(2.1**2 + 1.2**2)
    torch.testing.assert_close(lecam.eval()(real, fake), expected)
    torch.testing.assert_close(lecam(real, fake), expected)
    resumed = LeCam(decay=0.9)
    resumed.load_state_dict(lecam.state_dict())
    torch.testing.assert_close(resumed(real, fake), expected)


def test_lecam_gradient_survives_the_update():
    lecam, logits = LeCam(), draws(4).requires_grad_()
    lecam(logits + 5, logits - 5).backward()
    assert logits.grad.abs().min() > 0


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (4, 4)), ((7, 10), (4, 5)), ((1, 3), (1, 2))])
def test_blur_keeps_the_mean_and_halves(size, expected):
    blur = BlurDownsample()
    output = blur(torch.ones(2, 5, *size))
    assert output.shape == (2, 5, *expected)
    inner = output[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones_like(inner))
    kernel = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[0, 0, 3, 4] = 1
    # Output (i, j) sees rows 2i - 1 to 2i + 2 and columns 2j - 1 to 2j + 2.
    torch.testing.assert_close(blur(impulse)[0, 0, 1, 2], kernel[2, 1])
    torch.testing.assert_close(blur(impulse)[0, 0, 2, 2], kernel[0, 1])


def test_discriminator():
    network = BlurPatchDiscriminator(base_channels=8, num_layers=2, norm_num_groups=4)
    logits = network(draws(3, 3, 20, 24))
    assert logits.shape == (3, 1, 16, 16)
    torch.testing.assert_close(network(draws(3, 3, 20, 24)[:1]), logits[:1])  # no batch statistics
    assert all(parameter.dtype == torch.bfloat16 for parameter in network.bfloat16().parameters())
    assert network(draws(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_layers is 0"):
        BlurPatchDiscriminator(num_layers=0)


def test_proxy_code_loss():
    logits, codes = draws(2, 3, 5), torch.tensor([[0, 1, 4], [2, 2, 2]])
    expected = -logits.log_softmax(-1).gather(2, codes[..., None]).mean()
    torch.testing.assert_close(proxy_code_loss(logits, codes), expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and codes \(2, 4\).*as large as those of the VQGAN"):
        proxy_code_loss(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 5\], but there are 5 logits"):
        proxy_code_loss(logits, codes + torch.tensor([0, 1, 1]))


def test_reconstruction_loss():
    sample, pixels = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.ones(2, 3, 4, 4)
    loss, terms = reconstruction_loss(
        sample,
        pixels,
        torch.tensor(3.0),
        perceptual=L1(2.0),
        fake_logits=sample.mean() + torch.tensor([4.0, 6.0]),
        reconstruction_weight=2.0,
        perceptual_weight=0.5,
        quantizer_weight=0.1,
        adversarial_weight=0.01,
        log_variance=math.log(5.0),
    )
    expected = {"reconstruction": 2 * 0.25 / 5, "quantizer": 0.3, "perceptual": 1.0, "adversarial": -0.05}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    assert loss.item() == pytest.approx(sum(expected.values()))
    assert not any(term.requires_grad for term in terms.values())
    loss.backward()
    assert sample.grad.abs().min() > 0
    _, plain = reconstruction_loss(sample, pixels, torch.tensor(3.0))
    assert plain.keys() == {"reconstruction", "quantizer"}
