import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from hfgen.counters import generator
from hfgen.sampling.logits import exponential_draws, filter_logits, gumbel_softmax, sample_codes
from hfgen.sampling.next_scale import keep_mask_at_scale, smooth_probabilities

LOGITS = torch.tensor([[[0.5, 2.0, -1.0, 1.0, 2.0]]])


def kept(logits):
    return torch.isfinite(logits)[0, 0].tolist()


def test_top_k_keeps_ties_with_the_last():
    assert kept(filter_logits(LOGITS, top_k=1)) == [False, True, False, False, True]
    assert kept(filter_logits(LOGITS, top_k=3)) == [False, True, False, True, True]
    assert torch.equal(filter_logits(LOGITS), LOGITS)


def test_top_p_keeps_the_smallest_set_that_exceeds_the_mass():
    logits = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()
    assert kept(filter_logits(logits, top_p=0.39)) == [False, False, False, True]
    assert kept(filter_logits(logits, top_p=0.65)) == [False, False, True, True]
    assert kept(filter_logits(logits, top_p=1e-6)) == [False, False, False, True]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (20, 0.9), (60, 0.3), (200, 0.95)])
def test_filters_equal_those_of_transformers(top_k, top_p):
    logits = 3 * torch.randn(4, 6, 100, generator=generator(9))
    expected = logits.flatten(0, 1)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_logits(logits, top_k=top_k, top_p=top_p).flatten(0, 1), expected)


def test_filters_leave_their_input_alone():
    before = LOGITS.clone()
    filter_logits(LOGITS, top_k=1, top_p=0.5)
    assert torch.equal(LOGITS, before)


def test_a_draw_is_what_multinomial_draws():
    logits = torch.randn(3, 4, 50, generator=generator(0))
    codes = sample_codes(logits, exponential_draws(logits.shape, generator(1), "cpu"))
    probabilities = logits.softmax(-1).flatten(0, 1)
    assert torch.equal(codes.flatten(), torch.multinomial(probabilities, 1, generator=generator(1))[:, 0])


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    logits = probabilities.log().expand(1, 20000, 3)
    codes = sample_codes(logits, exponential_draws(logits.shape, generator(2), "cpu"))
    frequencies = torch.bincount(codes.flatten(), minlength=3) / codes.numel()
    torch.testing.assert_close(frequencies, probabilities, atol=0.02, rtol=0)


def test_without_draws_the_likeliest_code():
    assert sample_codes(LOGITS[..., :4], None).item() == 1


def test_a_list_of_generators_draws_each_row_alone():
    rows = exponential_draws((2, 3), [generator(7), generator(8)], "cpu")
    assert torch.equal(rows[1:], exponential_draws((1, 3), [generator(8)], "cpu"))
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        exponential_draws((2, 3), [generator(7)], "cpu")


def test_gumbel_softmax_sharpens_to_the_drawn_code():
    logits = torch.randn(2, 5, 9, generator=generator(3))
    draws = exponential_draws(logits.shape, generator(4), "cpu")
    weights = gumbel_softmax(logits, draws, 1e-4)
    assert torch.equal(weights.argmax(-1), sample_codes(logits, draws))
    torch.testing.assert_close(weights.amax(-1), torch.ones(2, 5))


def test_smooth_probabilities_follow_the_schedule():
    logits = torch.randn(1, 4, 9, generator=generator(5))
    draws = exponential_draws(logits.shape, generator(6), "cpu")
    for progress, temperature in ((0.0, 0.27), (0.5, 0.27 * 0.525), (1.0, 0.27 * 0.05)):
        expected = ((logits * (1 + progress) - draws.log()) / temperature).softmax(-1)
        torch.testing.assert_close(smooth_probabilities(logits, draws, progress), expected)


def test_coarse_scales_are_always_kept():
    keep = torch.zeros(1, 1, 8, 8)
    keep[..., :4] = 1
    assert keep_mask_at_scale(keep, 1).all()
    assert keep_mask_at_scale(keep, 2)[0, 0].tolist() == [[True, False]] * 2
    assert torch.equal(keep_mask_at_scale(keep, 8), keep > 0.5)
