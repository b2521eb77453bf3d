"""The losses of the open implementation of Transfusion by hand; those of the golden case are in the parity test."""

import math

import pytest
import torch

from hfgen.losses.transfusion_flow import next_token_labels, text_loss, transfusion_flow_loss

NULL = 7
# begin, a word, the opening of an image with two slots, its end, the null id, a word, padding
IDS = torch.tensor([[5, 1, 8, -2, -2, 9, NULL, 2, -1]])


def test_labels():
    assert next_token_labels(IDS, NULL).tolist() == [[1, 8, -1, -1, -1, -1, 2, -1]]


def test_shares_of_text_and_modalities():
    """Eight ids that are no padding: three are learned, two are an image."""
    logits = torch.zeros(1, 8, 16)
    sample, target = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]])
    losses = transfusion_flow_loss(logits, IDS, NULL, [sample], [target], text_weight=2.0, flow_weight=0.5)
    assert losses.text.item() == pytest.approx(math.log(16))
    assert [one.item() for one in losses.flow] == [5.0]
    assert losses.total.item() == pytest.approx(2 * math.log(16) * 3 / 8 + 0.5 * 5 * 2 / 8)


def test_modalities_are_weighted_one_by_one():
    ids = torch.tensor([[5, -2, 9, -3, -3, 9]])
    losses = transfusion_flow_loss(
        torch.zeros(1, 5, 16),
        ids,
        NULL,
        [torch.zeros(3, 1), torch.zeros(2, 2)],
        [torch.ones(3, 1), torch.ones(2, 2) * 2],
    )
    assert [one.item() for one in losses.flow] == [1.0, 4.0]
    assert losses.total.item() == pytest.approx(1 / 6 + 4 * 2 / 6)  # only what closes an image would be text


def test_text_alone_competes_with_text():
    logits = torch.zeros(1, 2, 16)
    logits[..., 10:] = 50.0
    labels = torch.tensor([[1, -1]])
    assert text_loss(logits, labels, num_text_tokens=4).item() == pytest.approx(math.log(4))
    assert text_loss(logits, labels).item() > 40
    assert text_loss(logits, torch.full((1, 2), -1)).item() == 0


def test_images_that_are_missing():
    with pytest.raises(ValueError, match="0 predictions, 0 targets and 1 images"):
        transfusion_flow_loss(torch.zeros(1, 8, 16), IDS, NULL)
