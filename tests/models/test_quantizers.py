"""Nearest-code search, usage statistics, and the single- and multi-scale quantizers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hfgen.models.quantizers import nearest
from hfgen.models.quantizers.multiscale import MultiScaleResidualQuantizer, residual_conv_index
from hfgen.models.quantizers.nearest import nearest_code
from hfgen.models.quantizers.restart import DeadCodeRestart
from hfgen.models.quantizers.usage import ScaleUsage, codebook_usage
from hfgen.models.quantizers.vector import VectorQuantizer


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestNearestCode:
    @pytest.mark.parametrize("cosine", [False, True])
    @pytest.mark.parametrize("tiles", [(2048, 4096), (7, 5), (1, 1), (50, 33)])
    def test_equals_brute_force(self, monkeypatch, cosine, tiles):
        monkeypatch.setattr(nearest, "LATENTS_PER_TILE", tiles[0])
        monkeypatch.setattr(nearest, "CODES_PER_TILE", tiles[1])
        latents, codebook = randn(50, 6).double(), randn(33, 6, seed=1).double()
        if cosine:
            expected = (F.normalize(latents, dim=1) @ F.normalize(codebook, dim=1).T).argmax(1)
        else:
            expected = torch.cdist(latents, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        assert torch.equal(nearest_code(latents, codebook, cosine=cosine), expected)

    @pytest.mark.parametrize("cosine", [False, True])
    def test_first_of_equal_codes_wins_within_and_across_tiles(self, monkeypatch, cosine):
        monkeypatch.setattr(nearest, "CODES_PER_TILE", 4)
        codebook = randn(6, 5).repeat(3, 1)
        assert torch.equal(nearest_code(codebook, codebook, cosine=cosine), torch.arange(6).repeat(3))

    def test_last_code_of_the_default_tiles_is_found(self):
        codebook = randn(nearest.CODES_PER_TILE + 3, 4)
        chosen = torch.tensor([0, nearest.CODES_PER_TILE - 1, nearest.CODES_PER_TILE, len(codebook) - 1])
        latents = codebook[chosen].repeat(nearest.LATENTS_PER_TILE // 4 + 1, 1)
        assert torch.equal(nearest_code(latents, codebook), chosen.repeat(nearest.LATENTS_PER_TILE // 4 + 1))

    def test_autocast_does_not_round(self):
        latents, codebook = randn(500, 8), randn(64, 8, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(
                nearest_code(latents, codebook), torch.cdist(latents.double(), codebook.double()).argmin(1)
            )

    def test_tf32_is_off_inside_and_restored(self):
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        try:
            with pytest.raises(KeyError), nearest.full_float32(torch.device("cuda")):
                assert "tf32" not in (matmul.fp32_precision, conv.fp32_precision)
                raise KeyError
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
        finally:
            matmul.fp32_precision = before


class TestUsage:
    def test_perplexity_and_used_fraction(self):
        usage = codebook_usage(torch.tensor([[0, 0], [3, 3]]), 8)
        assert usage["perplexity"].item() == pytest.approx(2)
        assert usage["used_fraction"].item() == 0.25

    def test_scale_usage_copies_only_the_first_scale_of_the_first_step(self):
        usage = ScaleUsage(2, 4)
        codes = [torch.tensor([[1]]), torch.tensor([[0, 0, 2, 3]])]
        usage.update(codes)
        torch.testing.assert_close(usage.hits, torch.tensor([[0.0, 1, 0, 0], [0.2, 0, 0.1, 0.1]]))
        usage.update([torch.tensor([[2]]), codes[1]])
        torch.testing.assert_close(usage.hits[0], torch.tensor([0.0, 0.9, 0.1, 0]))
        # An even share is 1 token per code, and its 8 % are reached by these codes.
        assert usage.percent(4).tolist() == [50, 75]

    def test_scale_usage_slows_down_after_a_hundred_updates(self):
        usage = ScaleUsage(1, 2)
        for _ in range(100):
            usage.update([torch.tensor([0])])
        usage.update([torch.tensor([1])])
        torch.testing.assert_close(usage.hits, torch.tensor([[0.99, 0.01]]))


class TestVectorQuantizer:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_each_loss_term_reaches_its_side(self, legacy):
        quantizer = VectorQuantizer(6, 4, commitment_weight=0.3, legacy_beta=legacy)
        latents = randn(2, 5, 4).requires_grad_()
        output = quantizer(latents)
        output.loss.backward()
        chosen = quantizer.embedding.weight[output.codes]
        difference = (latents - chosen).detach() * 2 / latents.numel()
        to_encoder, to_codes = (1.0, 0.3) if legacy else (0.3, 1.0)
        torch.testing.assert_close(latents.grad, to_encoder * difference)
        expected = torch.zeros(6, 4).index_add_(0, output.codes.flatten(), -to_codes * difference.flatten(0, 1))
        torch.testing.assert_close(quantizer.embedding.weight.grad, expected)
        squared = F.mse_loss(latents, chosen).item()
        assert output.losses["commitment"].item() == pytest.approx(to_encoder * squared)
        assert output.losses["codebook"].item() == pytest.approx(to_codes * squared)

    def test_straight_through_gradient_reaches_latents_only(self):
        quantizer = VectorQuantizer(6, 4)
        latents, upstream = randn(2, 4, 3, 3).requires_grad_(), randn(2, 4, 3, 3, seed=1)
        quantizer(latents).latents.backward(upstream)
        assert torch.equal(latents.grad, upstream)
        assert quantizer.embedding.weight.grad is None

    def test_grids_are_sequences_in_raster_order(self):
        quantizer = VectorQuantizer(6, 4).eval()
        grid = randn(2, 4, 3, 2)
        output = quantizer(grid)
        sequence = quantizer(grid.flatten(2).transpose(1, 2))
        assert torch.equal(output.codes, sequence.codes) and torch.equal(quantizer.encode(grid), output.codes)
        assert torch.equal(output.latents.flatten(2).transpose(1, 2), sequence.latents)
        assert torch.equal(quantizer.decode(output.codes), sequence.latents)
        assert torch.equal(quantizer.decode(output.codes.view(2, 3, 2)), output.latents)

    def test_normalize_puts_out_unit_codes_and_compares_directions(self):
        quantizer = VectorQuantizer(6, 4, normalize=True).eval()
        latents = randn(2, 5, 4)
        output = quantizer(latents)
        torch.testing.assert_close(output.latents.norm(dim=-1), torch.ones(2, 5))
        assert torch.equal(quantizer(latents * 7).codes, output.codes)
        assert torch.equal(
            output.codes.flatten(), nearest_code(latents.flatten(0, 1), quantizer.embedding.weight, cosine=True)
        )

    def test_moving_averages_follow_the_formula(self):
        quantizer = VectorQuantizer(5, 3, codebook_update="ema", ema_decay=0.9, ema_eps=1e-3)
        size, total = torch.ones(5), quantizer.embedding.weight.clone()
        for step in range(3):
            latents = randn(2, 6, 3, seed=step)
            before = quantizer.embedding.weight.clone()
            output = quantizer(latents)
            assert torch.equal(output.latents, before[output.codes])
            hits = F.one_hot(output.codes.flatten(), 5).float()
            size = 0.9 * size + 0.1 * hits.sum(0)
            total = 0.9 * total + 0.1 * hits.T @ latents.flatten(0, 1)
            smoothed = (size + 1e-3) / (size.sum() + 5e-3) * size.sum()
            torch.testing.assert_close(quantizer.embedding.weight, total / smoothed[:, None])
        assert set(output.losses) == {"commitment"} and not quantizer.embedding.weight.requires_grad

    def test_moving_averages_are_stored_only_if_used(self):
        assert list(VectorQuantizer(5, 3).state_dict()) == ["embedding.weight"]
        names = set(VectorQuantizer(5, 3, codebook_update="ema", restart_after=2).state_dict())
        assert names == {
            "embedding.weight", "cluster_size", "embedding_sum", "restart.unused_steps", "restart.step"
        }  # fmt: skip

    def test_evaluation_changes_no_state(self):
        quantizer = VectorQuantizer(5, 3, codebook_update="ema", restart_after=1).eval()
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        quantizer(randn(2, 6, 3))
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
        quantizer.train()(randn(2, 6, 3))
        after = quantizer.state_dict()
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert changed >= {"embedding.weight", "cluster_size", "embedding_sum", "restart.step"}

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    def test_dead_codes_restart_at_latents_of_the_batch(self, update):
        def run(steps, quantizer):
            for step in steps:
                quantizer(1 + 0.1 * randn(1, 8, 3, seed=step))
            return quantizer

        def build():
            quantizer = VectorQuantizer(4, 3, codebook_update=update, restart_after=2)
            weight = torch.tensor([[1.0, 1, 1], [-9, 0, 0], [0, -9, 0], [0, 0, -9]])
            state = quantizer.state_dict()
            quantizer.load_state_dict(
                {name: weight if name.startswith("embedding") else state[name] for name in state}
            )
            return quantizer

        quantizer = run([0], build())
        assert quantizer.embedding.weight[1:].min() < -5
        resumed = build()
        resumed.load_state_dict(quantizer.state_dict())
        run([1], quantizer)
        batch = 1 + 0.1 * randn(8, 3, seed=1)
        assert all((batch == code).all(1).any() for code in quantizer.embedding.weight[1:])
        assert len(quantizer.embedding.weight.unique(dim=0)) == 4
        assert torch.equal(run([1], resumed).embedding.weight, quantizer.embedding.weight)
        assert codebook_usage(quantizer.encode(batch[None]), 4)["used_fraction"] == 1

    def test_more_dead_codes_than_latents(self):
        dead, vectors = DeadCodeRestart(10, after=1)(torch.zeros(10), randn(3, 2))
        assert len(dead) == len(vectors) == 10

    def test_no_dead_code_replaces_nothing(self):
        dead, vectors = DeadCodeRestart(3, after=1)(torch.ones(3), randn(4, 2))
        assert dead.shape == (0,) and vectors.shape == (0, 2)

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="codebook_update='adam'"):
            VectorQuantizer(4, 3, codebook_update="adam")
        with pytest.raises(ValueError, match="legacy_beta"):
            VectorQuantizer(4, 3, codebook_update="ema", legacy_beta=True)
        quantizer = VectorQuantizer(4, 3)
        with pytest.raises(ValueError, match=r"\(2, 5, 4\).*\(B, L, 3\)"):
            quantizer(randn(2, 5, 4))
        with pytest.raises(ValueError, match=r"\[0, 4\].*\[0, 3\]"):
            quantizer.decode(torch.tensor([[0, 4]]))


def numpy_conv_index(scale, num_scales, count):
    """The official choice, in numpy."""
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return int(np.argmin(np.abs(ticks - scale / (num_scales - 1))))


class TestResidualConvIndex:
    @pytest.mark.parametrize(
        "count, expected",
        [
            (4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
            (4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
            (4, [0, 1, 2, 2, 3]),
            (3, [0, 0, 1, 2]),
            (5, [0, 1, 2, 3, 4]),
            (1, [0, 0, 0]),
        ],
    )
    def test_tables(self, count, expected):
        assert [residual_conv_index(scale, len(expected), count) for scale in range(len(expected))] == expected

    def test_equals_numpy_where_rounding_decides(self):
        for count in range(1, 17):
            for scales in range(2, 17):
                for scale in range(scales):
                    assert residual_conv_index(scale, scales, count) == numpy_conv_index(scale, scales, count)

    def test_single_scale(self):
        assert residual_conv_index(0, 1, 4) == 0


def build(**changes):
    torch.manual_seed(0)
    quantizer = MultiScaleResidualQuantizer(**{"num_codes": 32, "code_dim": 6, "patch_nums": (1, 2, 3, 5), **changes})
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


class TestMultiScaleResidualQuantizer:
    @pytest.mark.parametrize(
        "changes", [{}, {"cosine_codes": True}, {"num_residual_convs": 0}, {"residual_conv_ratio": 0.0}]
    )
    def test_follows_algorithm_1(self, changes):
        quantizer = build(**changes).eval()
        latents = randn(2, 6, 5, 5)
        residual, total, codes, sums = latents, 0, [], []
        codebook = quantizer.embedding.weight.detach()
        ratio = quantizer.residual_conv_ratio
        for scale, size in enumerate((1, 2, 3, 5)):
            rows = F.adaptive_avg_pool2d(residual, size).flatten(2).transpose(1, 2)
            if changes.get("cosine_codes"):
                chosen = F.cosine_similarity(rows[:, :, None], codebook[None, None], dim=-1).argmax(-1)
            else:
                chosen = (rows[:, :, None] - codebook).square().sum(-1).argmin(-1)
            added = F.interpolate(codebook[chosen].transpose(1, 2).unflatten(2, (size, size)), (5, 5), mode="bicubic")
            if ratio:
                conv = quantizer.residual_convs[numpy_conv_index(scale, 4, len(quantizer.residual_convs))]
                added = (1 - ratio) * added + ratio * conv(added)
            residual, total = residual - added, total + added
            codes.append(chosen)
            sums.append(total)
        with torch.no_grad():
            output = quantizer(latents)
        assert torch.equal(output.codes, torch.cat(codes, 1)) and torch.equal(quantizer.encode(latents), output.codes)
        torch.testing.assert_close(torch.stack(quantizer.f_hat_per_scale(output.codes)), torch.stack(sums))
        torch.testing.assert_close(output.latents, total.detach())
        loss = sum(F.mse_loss(part, latents) for part in sums) / 4
        assert output.loss.item() == pytest.approx(1.25 * loss.item(), rel=1e-5)
        assert output.losses["commitment"].item() == pytest.approx(0.25 * loss.item(), rel=1e-5)

    @pytest.mark.parametrize("patch_nums", [None, (1, 3, 5), ((1, 2), (2, 3), (4, 6))])
    def test_decode_steps_and_teacher_forcing_agree(self, patch_nums):
        quantizer = build().eval()
        height, width = (5, 5) if patch_nums != ((1, 2), (2, 3), (4, 6)) else (4, 6)
        latents = randn(2, 6, height, width)
        with torch.no_grad():
            output = quantizer(latents, patch_nums)
            assert torch.equal(quantizer.decode(output.codes, patch_nums), output.latents)
            f_hat, inputs = torch.zeros(2, 6, height, width), []
            scales = quantizer.split(output.codes, patch_nums)
            sizes = [(s, s) if isinstance(s, int) else s for s in patch_nums or (1, 2, 3, 5)]
            for scale, (codes, size) in enumerate(zip(scales, sizes)):
                embeddings = quantizer.lookup(codes).transpose(1, 2).unflatten(2, size)
                f_hat, following = quantizer.accumulate(f_hat, embeddings, scale, patch_nums)
                if following is not None:
                    assert following.shape[2:] == sizes[scale + 1]
                    inputs.append(following.flatten(2).transpose(1, 2))
        assert following is None
        assert torch.equal(f_hat, output.latents)
        assert torch.equal(quantizer.generator_inputs(output.codes, patch_nums), torch.cat(inputs, 1))

    def test_gradient_routes(self):
        quantizer = build()
        latents, upstream = randn(2, 6, 5, 5).requires_grad_(), randn(2, 6, 5, 5, seed=1)
        output = quantizer(latents)
        output.latents.backward(upstream, retain_graph=True)
        assert torch.equal(latents.grad, upstream)
        assert all(weight.grad is None for weight in quantizer.parameters())
        latents.grad = None
        output.loss.backward()
        sums = quantizer.f_hat_per_scale(output.codes)
        expected = sum(latents - f_hat for f_hat in sums) * 0.25 * 2 / latents.numel() / 4
        torch.testing.assert_close(latents.grad, expected.detach())
        assert all(weight.grad.abs().max() > 0 for weight in quantizer.parameters())

    def test_single_scale_is_a_plain_vector_quantizer(self):
        quantizer = build(patch_nums=(5,), residual_conv_ratio=0.0).eval()
        plain = VectorQuantizer(32, 6).eval()
        plain.load_state_dict(quantizer.state_dict())
        latents = randn(2, 6, 5, 5)
        assert torch.equal(quantizer(latents).codes, plain(latents).codes)
        assert torch.equal(quantizer(latents).latents, plain(latents).latents)
        assert quantizer.generator_inputs(quantizer.encode(latents)).shape == (2, 0, 6)

    def test_growing_sum(self):
        quantizer = build(residual_conv_ratio=0.0).eval()
        codes = quantizer.encode(randn(2, 6, 5, 5))
        total = 0
        for part, size in zip(quantizer.split(codes), (1, 2, 3, 5)):
            total = F.interpolate(total, (size, size), mode="bicubic") if torch.is_tensor(total) else 0
            total = total + quantizer.lookup(part).transpose(1, 2).unflatten(2, (size, size))
        torch.testing.assert_close(quantizer.decode(codes, all_to_max_scale=False), total)

    def test_restart_revives_codes_of_the_shared_codebook(self):
        quantizer = build(restart_after=2)
        with torch.no_grad():
            quantizer.embedding.weight[4:] += 100
        latents = randn(2, 6, 5, 5)
        quantizer(latents)
        assert quantizer.embedding.weight[4:].min() > 50
        quantizer(latents)
        assert quantizer.embedding.weight.abs().max() < 10
        assert quantizer.encode(latents).unique().numel() > 10
        assert "restart.step" in quantizer.state_dict() and "restart.step" not in build().state_dict()

    def test_bad_arguments_are_named(self):
        quantizer = build()
        with pytest.raises(ValueError, match="residual_conv_ratio=2"):
            build(residual_conv_ratio=2.0)
        with pytest.raises(ValueError, match=r"patch_nums=\(1, 0\)"):
            build(patch_nums=(1, 0))
        with pytest.raises(ValueError, match=r"\(2, 6, 4, 4\).*6, 5, 5"):
            quantizer(randn(2, 6, 4, 4))
        with pytest.raises(ValueError, match=r"\(2, 38\).*\(batch, 39\)"):
            quantizer.decode(torch.zeros(2, 38, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\[-1, -1\].*\[0, 31\]"):
            quantizer.decode(torch.full((2, 39), -1))
