"""What the measurements of benchmarks/unified.py say about claims, by the rules of benchmarks/verdicts.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from verdicts import FAILS, HOLDS, UNDECIDED, below, spread, together

# model -> seed -> the values that benchmarks/unified_measure.py found
Measures = Mapping[str, Mapping[str, Mapping[str, float]]]

# A random answer is right with the mean of 1/4, 1/6, 1/2 and 1/9; this much more is not chance.
CHANCE, ABOVE_CHANCE = (1 / 4 + 1 / 6 + 1 / 2 + 1 / 9) / 4, 0.1
LITTLE = 1.05  # a factor of the perplexity
RESTORED, LOST = 0.5, 0.75  # shares of the fall of PSNR that are left after the fine-tuning
CLEAN, NOISY = "discrete-0", "discrete-0.1"
ROBUST_SIGMA = "0.5"


def values(measures: Measures, model: str, quantity: str) -> list[float]:
    """A quantity for each seed; empty if it was not measured."""
    return [each[quantity] for each in measures.get(model, {}).values() if quantity in each]


def noisy_codes_are_easier(measures: Measures) -> str | None:
    """C22. Two comparisons of codes of latents with noise of 0.1 with codes of clean latents: the next code is
    likelier (nats per code), and the images drawn are better (Frechet distance). Holds if both are certainly better
    with noise; each has its own codes and decoder, so that the first alone says little: codes that say less about the
    image are likelier."""
    pairs = [[values(measures, model, name) for model in (NOISY, CLEAN)] for name in ("image_loss", "frechet")]
    if not all(each for pair in pairs for each in pair):
        return None
    verdict = together([below(*pair) for pair in pairs])
    models = [name for name in measures if name.startswith("discrete-")]
    trends = []
    for name, title, form in (
        ("image_loss", "Nats per code", "{:.2f}"),
        ("frechet", "Frechet distance", "{:.2f}"),
        ("draw_attributes", "Attributes drawn right", "{:.0%}"),
    ):
        found = [f"{spread(values(measures, model, name), form)} with noise {model.split('-')[1]}" for model in models]
        trends.append(f"{title}: {', '.join(found)}.")
    return f"C22, noisy tokens are easier to model than clean ones: **{verdict}**. {' '.join(trends)}"


def decoders_restore(measures: Measures) -> str | None:
    """C23. PSNR of images decoded from latents without noise, and with noise of standard deviation 0.5, before and
    after the decoder was fine-tuned on the latter. Holds if noise costs the fine-tuned decoder at most half of the
    decibels that it costs the other with every seed, does not hold if it costs over three quarters with every seed."""
    falls = {}
    for when in ("before", "after"):
        clean, noisy = (values(measures, "robust", f"psnr_{when}_{sigma}") for sigma in ("0", ROBUST_SIGMA))
        falls[when] = [one - other for one, other in zip(clean, noisy)]
    if not all(falls.values()):
        return None
    left = [after / before for before, after in zip(*falls.values())]
    verdict = UNDECIDED
    if len(left) > 1 and (max(left) <= RESTORED or min(left) > LOST):
        verdict = HOLDS if max(left) <= RESTORED else FAILS
    noisy = [values(measures, "robust", f"psnr_{when}_{ROBUST_SIGMA}") for when in falls]
    return (
        f"C23, a decoder restores noisy latents if it was fine-tuned on them: **{verdict}**. PSNR falls by "
        f"{spread(falls['before'])} dB before and {spread(falls['after'])} dB after, to {spread(noisy[0])} and "
        f"{spread(noisy[1])} dB."
    )


def text_costs_little(measures: Measures) -> str | None:
    """C24, cost to text. Perplexity of unseen captions, per token, of the model that saw text in every batch, and of
    the one that saw text in every second batch and images with captions in the others. Holds if beside images it is at
    most 5 % higher for all seeds, does not hold if it is more for all."""
    losses = [values(measures, model, "text_loss") for model in ("joint", "text")]
    if not all(losses):
        return None
    ratios = [math.exp(joint - text) for joint, text in zip(*losses)]
    verdict = UNDECIDED
    if len(ratios) > 1 and (max(ratios) <= LITTLE or min(ratios) > LITTLE):
        verdict = HOLDS if max(ratios) <= LITTLE else FAILS
    text, joint = ([math.exp(loss) for loss in losses[index]] for index in (1, 0))
    return (
        f"C24, images beside text cost the text little: **{verdict}**. Perplexity {spread(text, '{:.3f}')} of text "
        f"alone and {spread(joint, '{:.3f}')} beside images."
    )


def unet_takes_large_patches(measures: Measures) -> str | None:
    """C24, patch sizes. Holds if with four tokens for an image (patches of 4 latents) the U-Net has a lower Frechet
    distance than linear layers."""
    pair = [values(measures, model, "frechet") for model in ("unet-4", "linear-4")]
    if not all(pair):
        return None
    shown = [
        f"{model} {spread(values(measures, model, 'frechet'))}"
        for model in ("linear-1", "linear-2", "linear-4", "unet-2", "unet-4")
        if model in measures
    ]
    return (
        f"C24, few patches suffice with a U-Net: **{below(*pair)}**. Frechet distance by adapter and patch: "
        f"{'; '.join(shown)}."
    )


def images_want_both_directions(measures: Measures) -> str | None:
    """C24, causal against bidirectional images, patches of 2 latents. Holds if with linear layers the Frechet distance
    of bidirectional attention is lower. (In the paper a U-Net made the difference small.)"""
    pair = [values(measures, model, "frechet") for model in ("linear-2", "linear-2-causal")]
    if not all(pair):
        return None
    shown = [
        f"{model} {spread(values(measures, model, 'frechet'))}"
        for model in ("linear-2", "linear-2-causal", "unet-2", "unet-2-causal")
        if model in measures
    ]
    return f"C24, images want attention in both directions: **{below(*pair)}**. Frechet distance: {'; '.join(shown)}."


def one_model_both_ways(measures: Measures) -> str | None:
    """C25. Holds if the continuous model (U-Net, patches of 2) and the discrete one (noise 0.1) both draw and write
    attributes right at least 10 points above the 26 % of chance, with every seed, and the continuous one has the lower
    Frechet distance."""
    models = {"continuous": "unet-2", "discrete": NOISY}
    shares = {
        name: [values(measures, model, f"{task}_attributes") for task in ("draw", "write")]
        for name, model in models.items()
    }
    if not all(each for pair in shares.values() for each in pair):
        return None
    verdicts = [below([CHANCE + ABOVE_CHANCE] * 2, each) for pair in shares.values() for each in pair]
    verdicts.append(below(*(values(measures, model, "frechet") for model in models.values())))
    shown = "; ".join(
        f"{name} draws {spread(draw, '{:.0%}')} and writes {spread(write, '{:.0%}')} of the attributes right, Frechet "
        f"distance {spread(values(measures, models[name], 'frechet'))}"
        for name, (draw, write) in shares.items()
    )
    return (
        f"C25, one model draws and writes, the continuous one with the better images: **{together(verdicts)}**. "
        f"{shown[0].upper()}{shown[1:]}."
    )


CLAIMS: tuple[Callable[[Measures], str | None], ...] = (
    noisy_codes_are_easier,
    decoders_restore,
    text_costs_little,
    unet_takes_large_patches,
    images_want_both_directions,
    one_model_both_ways,
)
