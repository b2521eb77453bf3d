"""What the measurements of benchmarks/paradigms.py say about claims, by the rules of benchmarks/verdicts.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from verdicts import FAILS, HOLDS, UNDECIDED, below, criterion, spread, together

FEW_STEPS = (2, 4, 8)
COLLAPSED, VARIED = 0.25, 0.5  # shares of the variance within a class that true images have
FLAT, STEEP = 2.5, 3.5  # exponents of the cost of a pass in the side of the image

# method -> seed -> what benchmarks/paradigms_sampling.py measured
Measures = Mapping[str, Mapping[str, Mapping]]


def values(measures: Measures, method: str, quantity: str, sampler: str | None = None, steps: int | None = None):
    """A quantity for each seed, of a point or (without ``sampler``) of the method; empty if it was not measured."""
    found = []
    for result in measures.get(method, {}).values():
        if sampler is None:
            found += [result[quantity]] if quantity in result else []
        else:
            found += [
                point[quantity]
                for point in result["points"]
                if point["sampler"] == sampler and (steps is None or point["steps"] == steps)
            ]
    return found


def few_step_flow(measures: Measures) -> str | None:
    """C13. Holds if Euler's Frechet distance with the flow is below that of DDIM with the same DiT trained for
    diffusion, at all of 2, 4 and 8 steps that were measured."""
    pairs = {
        steps: tuple(
            values(measures, *which, steps) for which in (("flow", "frechet", "euler"), ("dit", "frechet", "ddim"))
        )
        for steps in FEW_STEPS
    }
    pairs = {steps: pair for steps, pair in pairs.items() if all(pair)}
    if not pairs:
        return None
    verdict = together([below(*pair) for pair in pairs.values()])
    numbers = "; ".join(
        f"{steps} steps {spread(flow)} against {spread(diffusion)}" for steps, (flow, diffusion) in pairs.items()
    )
    return (
        f"C13, with few steps a rectified flow is better than diffusion with the same network: **{verdict}**. "
        f"Frechet distance by Euler and by DDIM: {numbers}."
    )


def reflow_straightens(measures: Measures) -> str | None:
    """C14. Holds if the paths of the 2-rectified flow are straighter, and its one-step Frechet distance and that of
    its distillation are below that of the flow."""
    bent = [values(measures, name, "straightness") for name in ("reflow", "flow")]
    one = {name: values(measures, name, "frechet", "euler", 1) for name in ("flow", "reflow", "distilled")}
    if not (all(bent) and all(one.values())):
        return None
    verdict = together([below(*bent), below(one["reflow"], one["flow"]), below(one["distilled"], one["flow"])])
    return (
        f"C14, reflow straightens the paths and makes one step possible: **{verdict}**. Straightness (0 is straight) "
        f"{spread(bent[1], '{:.4f}')} before and {spread(bent[0], '{:.4f}')} after; one-step Frechet distance "
        f"{spread(one['flow'])} of the flow, {spread(one['reflow'])} after reflow, {spread(one['distilled'])} after "
        "distillation."
    )


def transformers_scale(measures: Measures) -> str | None:
    """C15, the part on size. Holds if from the small to the large model the Frechet distance by DDIM with the most
    steps falls by a larger factor for DiT than for the U-Net, seed by seed of each."""
    gains = {}
    for name in ("unet", "dit"):
        sizes = {}
        for model in (f"{name}_s", name):
            most = max(values(measures, model, "steps", "ddim"), default=None)
            sizes[model] = [] if most is None else values(measures, model, "frechet", "ddim", most)
        gains[name] = [small / large for small, large in zip(*sizes.values())]
    if not all(gains.values()):
        return None
    verdict = below(gains["unet"], gains["dit"])
    return (
        f"C15, transformers gain more from size than U-Nets: **{verdict}**. From 0.14 to 1.0 million parameters the "
        f"Frechet distance falls by a factor of {spread(gains['dit'])} for DiT and {spread(gains['unet'])} for the "
        "U-Net. Relations of distant objects were not measured here."
    )


def one_step_mean_flow(measures: Measures) -> str | None:
    """C17. Holds if with one pass MeanFlow, and trajectory matching on pairs of a flow, have a lower Frechet distance
    than the flow and keep over half of the variance of true images within a class, while trajectory matching on
    independent pairs keeps less than a quarter of it (the collapse)."""
    flow = values(measures, "flow", "frechet", "euler", 1)
    one = {
        name: [values(measures, name, quantity, "mean-flow", 1) for quantity in ("frechet", "spread")]
        for name in ("mean_flow", "matching", "matching_pairs")
    }
    if not flow or not all(each for pair in one.values() for each in pair):
        return None
    verdicts = [below(one["matching"][1], [COLLAPSED] * 2)]
    for name in ("mean_flow", "matching_pairs"):
        verdicts += [below(one[name][0], flow), below([VARIED] * 2, one[name][1])]
    kept = {name: spread(pair[1], "{:.0%}") for name, pair in one.items()}
    return (
        f"C17, MeanFlow generates with one pass, and matching the end of the trajectory works for coupled pairs only: "
        f"**{together(verdicts)}**. One-step Frechet distance: flow {spread(flow)}, MeanFlow "
        f"{spread(one['mean_flow'][0])}, matching on pairs {spread(one['matching_pairs'][0])}, on independent noise "
        f"{spread(one['matching'][0])}. Variance within a class, as a share of that of true images: "
        f"{kept['mean_flow']}, {kept['matching_pairs']} and {kept['matching']}."
    )


def cost_exponents(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The exponent of the cost of a pass in the side of the image, between the two largest sides."""
    result = {}
    for name, by_side in seconds.items():
        (small, before), (large, after) = sorted((int(side), cost) for side, cost in by_side.items())[-2:]
        result[name] = math.log(after / before) / math.log(large / small)
    return result


def attention_is_quadratic(seconds: Mapping[str, Mapping[str, float]]) -> str | None:
    """C30. The cost of a pass grows with a power of the side, 2 if it is linear in the pixels and 4 if quadratic.
    Holds if between the two largest sides the power is above 3.5 for DiT and below 2.5 for the U-Net; does not hold
    if it is below 2.5 for DiT or above 3.5 for the U-Net; else undecided."""
    if not seconds or any(len(by_side) < 2 for by_side in seconds.values()):
        return None
    powers = cost_exponents(seconds)
    if powers["dit"] > STEEP and powers["unet"] < FLAT:
        verdict = HOLDS
    else:
        verdict = FAILS if powers["dit"] < FLAT or powers["unet"] > STEEP else UNDECIDED
    return (
        f"C30, the cost of attention is quadratic in the pixels, that of convolutions linear: **{verdict}**. The cost "
        f"of a pass grows with the side to the power {powers['dit']:.1f} for DiT with patches of 2 and "
        f"{powers['unet']:.1f} for the U-Net (2 is linear in the pixels, 4 quadratic)."
    )


CLAIMS: tuple[Callable[[Measures], str | None], ...] = (
    few_step_flow,
    reflow_straightens,
    transformers_scale,
    one_step_mean_flow,
)


def _judged(measures: Measures, seconds: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[Callable, str]]:
    """The claims whose methods were measured, each with its sentence."""
    pairs = [*((claim, measures) for claim in CLAIMS), (attention_is_quadratic, seconds)]
    for claim, numbers in pairs:
        sentence = claim(numbers)
        if sentence is not None:
            yield claim, sentence


def sentences(measures: Measures, seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each claim whose methods were measured."""
    return [sentence for _, sentence in _judged(measures, seconds)]


def criteria(measures: Measures, seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """When each of these claims holds."""
    return [criterion(claim) for claim, _ in _judged(measures, seconds)]
