"""Labels of mixed sequences, times of images, and the sum of the two losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from hfgen.counters import generator
from hfgen.losses.transfusion import limit_times, text_labels, transfusion_loss

BOS, EOS, BOI, EOI, PAD, IMAGE = range(10, 16)
IDS = {"pad_token_id": PAD, "image_token_id": IMAGE, "boi_token_id": BOI}
NONE = -100


def test_begin_is_a_target_and_end_is_not():
    ids = torch.tensor([[BOS, 1, BOI, IMAGE, IMAGE, EOI, 2, EOS, PAD, PAD]])
    assert text_labels(ids, **IDS).tolist() == [[1, BOI, NONE, NONE, NONE, 2, EOS, NONE, NONE, NONE]]


def test_discrete_images_are_predicted_like_words():
    ids = torch.tensor([[BOS, 1, BOI, 20, 21, EOS, PAD]])
    assert text_labels(ids, pad_token_id=PAD).tolist() == [[1, BOI, 20, 21, EOS, NONE, NONE]]


def test_no_sequence_predicts_the_next_one():
    ids, segments = torch.tensor([[BOS, 1, EOS, BOS, 2, EOS]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert text_labels(ids, **IDS, segment_ids=segments).tolist() == [[1, EOS, NONE, 2, EOS, NONE]]


def test_the_terms():
    draws = generator(0)
    logits = torch.randn(2, 5, 7, generator=draws)
    labels = torch.tensor([[1, NONE, 2, NONE, NONE], [6, 0, NONE, NONE, NONE]])
    prediction, target = torch.randn(2, 3, 2, 2, 4, generator=draws)
    loss = transfusion_loss(logits, labels, prediction, target, image_weight=2.5)
    picked = [(0, 0, 1), (0, 2, 2), (1, 0, 6), (1, 1, 0)]
    text = -sum(logits[row, place].log_softmax(0)[label] for row, place, label in picked) / len(picked)
    torch.testing.assert_close(loss.text, text)
    torch.testing.assert_close(loss.per_image, torch.stack([F.mse_loss(*pair) for pair in zip(prediction, target)]))
    torch.testing.assert_close(loss.image, loss.per_image.mean())
    torch.testing.assert_close(loss.loss, text + 2.5 * loss.image)
    default = transfusion_loss(logits, labels, prediction, target)
    torch.testing.assert_close(default.loss, text + 5 * loss.image)


def test_a_batch_may_lack_text_or_images():
    logits, images = torch.randn(1, 3, 7, generator=generator(0)), torch.ones(2, 1, 2, 2)
    nothing = torch.full((1, 3), NONE)
    only_images = transfusion_loss(logits, nothing, images, 0 * images)
    assert only_images.text == 0 and only_images.loss == 5.0
    for empty in (None, torch.zeros(0, 1, 2, 2)):
        only_text = transfusion_loss(logits, torch.tensor([[1, 2, 3]]), empty, empty)
        assert only_text.image == 0 and only_text.loss == only_text.text and len(only_text.per_image) == 0


def test_the_loss_is_float32_and_reaches_both_outputs():
    logits = torch.zeros(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    prediction = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    loss = transfusion_loss(logits, torch.tensor([[1, NONE]]), prediction, torch.zeros(1, 1, 2, 2))
    assert loss.loss.dtype == loss.per_image.dtype == torch.float32
    assert loss.text.item() == pytest.approx(math.log(4))
    loss.loss.backward()
    assert logits.grad[0, 0].any() and not logits.grad[0, 1].any() and prediction.grad.all()


def test_images_before_their_text_get_less_noise():
    uniform = torch.tensor([0.0, 0.5, 0.999, 0.999])
    first = torch.tensor([True, True, True, False])
    steps = (1000 * limit_times(uniform, first)).long()
    assert steps.tolist() == [0, 250, 499, 999]
    assert limit_times(uniform, first, 1.0).equal(uniform)
    with pytest.raises(ValueError, match="limit=500"):
        limit_times(uniform, first, 500)


def test_shapes_that_do_not_fit():
    logits, labels, images = torch.zeros(1, 3, 7), torch.zeros(1, 3, dtype=torch.long), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"got \(2, 1, 2, 2\) and None"):
        transfusion_loss(logits, labels, images)
    with pytest.raises(ValueError, match=r"got \(2, 1, 2, 2\) and \(1, 1, 2, 2\)"):
        transfusion_loss(logits, labels, images, images[:1])
    with pytest.raises(ValueError, match=r"labels have shape \(1, 2\), expected \(1, 3\)"):
        transfusion_loss(logits, labels[:, :2])
