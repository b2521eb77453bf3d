"""The masked-token generators: what they see, their vocabularies, published sizes and errors."""

import pytest
import torch

import hfgen
from hfgen import ImageBert, MaskGITTransformer, UViTBert
from hfgen.losses.masked import masked_token_accuracy, masked_token_loss
from support.instances import MASKED_SIZES, build_model, masked_inputs

NAMES = ["MaskGITTransformer", "ImageBert", "UViTBert"]
PARAMETERS = {  # millions, from the sheets of the releases
    ("MaskGITTransformer", "maskgit-256"): 172.0,
    ("ImageBert", "titok-l32"): 177.2,
    ("UViTBert", "titok-s128"): 295.0,
}


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_some_positions_are_those_of_all(name):
    model, inputs = build_model(name), masked_inputs(3)
    positions = torch.tensor([[0, 15, 4], [3, 3, 2], [7, 8, 9]])
    with torch.no_grad():
        expected = model(**inputs).logits[torch.arange(3)[:, None], positions]
        actual = model.forward_positions(**inputs, positions=positions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_every_token_sees_every_token_and_the_class(name):
    model, inputs = build_model(name), masked_inputs(1)
    with torch.no_grad():
        before = model(**inputs).logits
        for position in range(16):
            codes = inputs["codes"].clone()
            codes[0, position] = (codes[0, position] + 1) % 16
            changed = (model(codes, inputs["class_labels"]).logits - before).abs().amax(-1)
            assert (changed > 1e-6).all(), position
        assert ((model(inputs["codes"], inputs["class_labels"] + 1).logits - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_mask_token_classes_and_no_class_have_rows_of_their_own(name):
    """17 code ids and 6 labels make 23 rows of the embedding, and each moves the result."""
    model = build_model(name)
    table = next(parameter for key, parameter in model.named_parameters() if parameter.shape == (16 + 5 + 2, 16))
    used = set()
    for code in range(17):
        codes = torch.full((1, 16), code)
        for label in range(6):
            hidden = model.encode_tokens(codes, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(hidden.square().sum(), table)
            rows = set(gradient.abs().amax(1).nonzero().flatten().tolist())
            # The embedding of BERT's padding token, here code 0, has no gradient.
            assert len(rows) == (1 if name == "ImageBert" and code == 0 else 2)
            used |= rows
    assert used == set(range(23)) - ({0} if name == "ImageBert" else set())


@pytest.mark.parametrize(("name", "preset"), PARAMETERS)
def test_published_sizes(name, preset):
    with torch.device("meta"):
        model = getattr(hfgen, name).from_preset(preset)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name, preset], rel=0.01)


def test_logits_of_the_vocabulary():
    """[codes, classes, no class, mask token] at the class position and all tokens; the codes are those of forward."""
    model, inputs = build_model("MaskGITTransformer"), masked_inputs(2)
    with torch.no_grad():
        logits = model.forward_vocabulary(**inputs)
        assert logits.shape == (2, 17, 16 + 5 + 2)
        torch.testing.assert_close(logits[:, 1:, :16], model(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_mask_token_is_the_last_row_without_an_unconditional_class():
    """As in the released weights: 16 codes, 5 classes and the mask token."""
    model = MaskGITTransformer(**MASKED_SIZES)
    assert model.token_embed.num_embeddings == 16 + 5 + 1 and model.unconditional_label is None
    hidden = model.encode_tokens(torch.full((1, 16), model.mask_token_id), torch.tensor([4]))
    (gradient,) = torch.autograd.grad(hidden.square().sum(), model.token_embed.weight)
    assert gradient.abs().amax(1).nonzero().flatten().tolist() == [20, 21]


def test_long_skips_are_used_last_in_first_out():
    """With every other branch off, the output is the embedding mixed by the skip layers alone."""
    model = UViTBert(**{**MASKED_SIZES, "num_layers": 4}).eval()
    with torch.no_grad():
        for block in (*model.in_blocks, model.mid_block, *model.out_blocks):
            block.attn.to_out[0].weight.zero_()
            block.ff.net[2].weight.zero_()
        for block in model.out_blocks:  # (x, skip) -> skip
            block.skip_linear.weight.copy_(torch.eye(16, 32).roll(16, 1))
        model.in_blocks[0].ff.net[2].bias.fill_(1.0)
        model.in_blocks[1].ff.net[2].bias.fill_(2.0)
        inputs = masked_inputs(1)
        embedded = model.token_embed(inputs["codes"]) + model.position_embed[:, 1:]
        hidden = model.encode_tokens(**inputs)[:, 1:]
    torch.testing.assert_close(hidden, embedded + 1.0)  # the last block took the output of the first


BAD_INPUTS = {
    "too few codes": ({"codes": torch.zeros(2, 15, dtype=torch.long)}, r"\(2, 15\), expected \(batch, 16\)"),
    "one dimension": ({"codes": torch.zeros(16, dtype=torch.long)}, r"\(16,\), expected \(batch, 16\)"),
    "code too large": ({"codes": torch.full((2, 16), 17)}, r"\[17, 17\], expected \[0, 15\], or 16.*same codebook"),
    "negative code": ({"codes": torch.full((2, 16), -1)}, r"\[-1, -1\], expected \[0, 15\]"),
    "labels": ({"class_labels": torch.zeros(3, dtype=torch.long)}, r"class_labels have shape \(3,\).*2 rows"),
    "label too large": ({"class_labels": torch.tensor([0, 6])}, r"class_labels lie in \[0, 6\], expected \[0, 5\]"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(name)(**{**masked_inputs(2), **changes})


@pytest.mark.parametrize(
    ("model_class", "changes", "message"),
    [
        (MaskGITTransformer, {"class_dropout": 0.1}, "class_dropout=0.1 needs unconditional_class=True"),
        (MaskGITTransformer, {"num_attention_heads": 3}, "multiple of the number of attention"),
        (ImageBert, {"num_attention_heads": 3}, "multiple of the number of attention"),
        (UViTBert, {"num_attention_heads": 3}, "hidden_size=16 must be a multiple"),
        (UViTBert, {"num_layers": 3}, "num_layers=3 must be even"),
    ],
)
def test_bad_arguments(model_class, changes, message):
    with pytest.raises(ValueError, match=message):
        model_class(**{**MASKED_SIZES, **changes})


def test_loss_weights_and_reductions():
    """Against the definition, with masks of different sizes in the two images."""
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    each = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    plain = masked_token_loss(logits, codes, mask, label_smoothing=0.0)
    torch.testing.assert_close(plain, each[mask].mean())
    per_image = masked_token_loss(logits, codes, mask, label_smoothing=0.0, reduction="images")
    torch.testing.assert_close(per_image, (each[0, 0] + each[1, :3].mean()) / 2)
    weighted = masked_token_loss(logits, codes, mask, label_smoothing=0.0, unmasked_weight=0.5)
    torch.testing.assert_close(weighted, (each[mask].sum() + 0.5 * each[~mask].sum()) / 6)
    with pytest.raises(ValueError, match="Unknown reduction 'sum'"):
        masked_token_loss(logits, codes, mask, reduction="sum")


def test_accuracy_counts_masked_tokens_only():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3]]), 8).float()
    mask = torch.tensor([[True, True, False, False]])
    assert masked_token_accuracy(logits, torch.tensor([[0, 5, 5, 5]]), mask).item() == pytest.approx(0.5)
