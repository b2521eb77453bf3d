"""The structure of the VAR transformer: published sizes, causality over scales, cached passes, training switches."""

import pytest
import torch

from hfgen import MultiScaleVQVAE, VARTransformer
from hfgen.counters import generator

# Millions of parameters as published.
PUBLISHED_SIZES = {
    "var-d12": 133.2, "var-d16": 310.28, "var-d20": 600.9, "var-d24": 1033.4, "var-d30": 2010.0, "var-d36": 2353.9,
}  # fmt: skip
VARIANTS = [
    pytest.param(shared, l2_norm, id=f"{'shared' if shared else 'own'}-{'l2' if l2_norm else 'plain'}")
    for shared in (False, True)
    for l2_norm in (False, True)
]


def tiny(shared_modulation=False, l2_norm_attention=True, **arguments):
    """Four scales, weights large enough that every part matters."""
    model = VARTransformer(
        num_codes=24,
        code_dim=6,
        num_classes=5,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        patch_nums=(1, 2, 3, 5),
        shared_modulation=shared_modulation,
        l2_norm_attention=l2_norm_attention,
        **arguments,
    )
    draws = generator(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return model.eval()


def teacher_inputs(batch=2, num_tokens=38):
    return torch.randn(batch, num_tokens, 6, generator=generator(5))


@pytest.mark.parametrize("name", VARTransformer.presets)
def test_presets_have_the_published_size(name):
    with torch.device("meta"):
        model = VARTransformer.from_preset(name)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZES[name], abs=0.05)


@pytest.mark.parametrize("name", MultiScaleVQVAE.presets)
def test_tokenizer_presets_have_the_published_size(name):
    with torch.device("meta"):
        model = MultiScaleVQVAE.from_preset(name)
    count = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in model.named_children()}
    assert sum(count.values()) == pytest.approx(108.95, abs=0.005)
    assert (count["encoder"], count["decoder"]) == pytest.approx((44.11, 64.65), abs=0.005)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="var-d17.*var-d16"):
        VARTransformer.from_preset("var-d17")


@pytest.mark.parametrize(("shared", "l2_norm"), VARIANTS)
def test_a_scale_sees_itself_and_earlier_scales_only(shared, l2_norm):
    """By Jacobian: which inputs move which logits. Inputs of scale k start the columns of scale k."""
    model = tiny(shared, l2_norm)
    latents = teacher_inputs(batch=1)
    label = torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, label).logits[0].sum(-1), latents)
    moves = jacobian[:, 0].abs().sum(-1) > 0  # (L, L - 1): logits by inputs
    scale_of = torch.arange(4).repeat_interleave(torch.tensor(model.scale_lengths))
    assert torch.equal(moves, scale_of[:, None] >= scale_of[None, 1:])


@pytest.mark.parametrize(("shared", "l2_norm"), VARIANTS)
def test_scale_by_scale_equals_the_whole_sequence(shared, l2_norm):
    model = tiny(shared, l2_norm)
    latents, labels = teacher_inputs(batch=3), torch.tensor([4, 0, 4])
    with torch.no_grad():
        whole = model(latents, labels).logits
        cache, condition = model.new_cache(labels)
        parts = [None, *latents.split(model.scale_lengths[1:], dim=1)]
        grids = [p if p is None else p.transpose(1, 2).unflatten(-1, (s, s)) for p, s in zip(parts, model.patch_nums)]
        logits = [model.forward_scale(x, condition, cache, k, num_logit_rows=3) for k, x in enumerate(grids)]
    assert cache.kv.length == model.num_tokens
    assert len(condition) == 2  # distinct classes
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_prefix_of_scales_gives_the_same_logits():
    model, latents, labels = tiny(), teacher_inputs(), torch.tensor([1, 3])
    with torch.no_grad():
        whole, prefix = model(latents, labels).logits, model(latents[:, :13], labels).logits
    torch.testing.assert_close(prefix, whole[:, :14], rtol=1e-5, atol=1e-5)


def test_the_unconditional_rows_can_leave_out_the_head():
    model, labels = tiny(), torch.tensor([1, 5])
    with torch.no_grad():
        cache, condition = model.new_cache(labels)
        both = model.forward_scale(None, condition, cache, 0, num_logit_rows=2)
        cache, condition = model.new_cache(labels)
        one = model.forward_scale(None, condition, cache, 0, num_logit_rows=1)
    torch.testing.assert_close(one, both[:1])


def test_guidance_before_the_head_is_guidance_of_the_logits():
    model, labels = tiny(), torch.tensor([1, 3, 5, 5])
    with torch.no_grad():
        cache, condition = model.new_cache(labels)
        conditional, unconditional = model.forward_scale(None, condition, cache, 0, num_logit_rows=4).chunk(2)
        cache, condition = model.new_cache(labels)
        guided = model.forward_scale(None, condition, cache, 0, num_logit_rows=2, guidance_scale=2.5)
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_latents_of_half_a_scale_are_an_error():
    with pytest.raises(ValueError, match=r"20 tokens.*\[0, 4, 13, 38\]"):
        tiny()(teacher_inputs(num_tokens=20), torch.tensor([0, 0]))


@pytest.mark.parametrize("patch_nums", [(), (2, 2), (3, 1), (0, 1)])
def test_patch_nums_must_grow(patch_nums):
    with pytest.raises(ValueError, match="patch_nums"):
        VARTransformer(num_layers=1, num_attention_heads=1, attention_head_dim=8, patch_nums=patch_nums)


def test_the_temperature_of_cosine_attention_is_clamped():
    """Above log 100 the scale is constant: no gradient, and the same output."""
    model = tiny()
    attention = model.blocks[1].attn
    x = torch.randn(1, 7, 16, generator=generator(1))
    with torch.no_grad():
        attention.log_scale.copy_(torch.tensor([4.0, 6.0]))
    first = attention(x)
    first.square().sum().backward()
    assert attention.log_scale.grad[0] != 0 and attention.log_scale.grad[1] == 0
    with torch.no_grad():
        attention.log_scale[1] = 9.0
        torch.testing.assert_close(attention(x), first)


def test_drop_path_rescales_and_grows_with_depth():
    model = tiny(drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == [0.0, 0.4]
    latents, labels = teacher_inputs(), torch.tensor([1, 3])
    model.train()
    torch.manual_seed(0)
    outputs = [model(latents, labels).logits.detach() for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    model.eval()
    assert torch.equal(model(latents, labels).logits, model(latents, labels).logits)


def test_gates_start_small():
    model = VARTransformer(num_layers=2, num_attention_heads=2, attention_head_dim=8)
    weight = model.blocks[0].modulation.linear.weight
    gates, others = weight[:32].std().item(), weight[32:].std().item()
    assert gates == pytest.approx(others * 2e-3, rel=0.2)
    model.init_weights(gate_gain=1e-5)
    assert model.blocks[0].modulation.linear.weight[:32].std().item() == pytest.approx(gates * 1e-2, rel=0.2)
