"""The measured parts of docs/tokens.md: tables, and sentences that follow from the numbers by a stated criterion."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
ENOUGH_DB = 0.3  # a difference of PSNR that counts
ENOUGH_ACCURACY = 0.02  # of judge accuracy: about two standard errors of a difference between 1000 images each


def verdict(shown: bool, claim: str, numbers: str) -> str:
    return f"- {'Shown' if shown else '**Not shown**'} at this scale: {claim} ({numbers})."


def number_claims(result: Row) -> list[str]:
    """More tokens are better: every step to the next number raises PSNR by 0.3 dB or more.
    A number of tokens is enough for the class: judge accuracy at most 2 points below that on the images themselves."""
    rows = result["rows"]
    gains = [after["psnr"] - before["psnr"] for before, after in zip(rows, rows[1:])]
    numbers = ", ".join(
        f"{before['tokens']} to {after['tokens']}: {gain:+.2f} dB"
        for before, after, gain in zip(rows, rows[1:], gains)
    )
    sentences = [verdict(min(gains) >= ENOUGH_DB, "every doubling of the tokens improves the reconstruction", numbers)]
    ceiling = result["judge_on_images"]
    enough = [row for row in rows if row["judge"] >= ceiling - ENOUGH_ACCURACY]
    judged = ", ".join(f"{row['judge']:.1%}" for row in rows)
    numbers = f"judge accuracy on the images {ceiling:.1%}, on reconstructions {judged}"
    least = f"{enough[0]['tokens']} tokens keep the class of the image" if enough else "some number keeps the class"
    return [*sentences, verdict(bool(enough), least, numbers)]


def grid_claims(result: Row) -> list[str]:
    """A sequence beats a grid of as many codes: its PSNR is 0.3 dB or more higher."""
    sentences = []
    for sequence, grid in _pairs(result["rows"], "sequence", "grid"):
        gain = sequence["psnr"] - grid["psnr"]
        claim = f"{sequence['tokens']} tokens of a sequence reconstruct better than a grid of {grid['tokens']}"
        numbers = f"{sequence['psnr']:.2f} against {grid['psnr']:.2f} dB, judge {sequence['judge']:.1%} against "
        sentences.append(verdict(gain >= ENOUGH_DB, claim, numbers + f"{grid['judge']:.1%}"))
    return sentences


def stages_claims(result: Row) -> list[str]:
    """Two stages are better: their mean PSNR over the seeds is higher by more than two standard errors of the
    difference. They are steadier: the standard deviation over the seeds is at most half."""
    two, one = ([row["psnr"] for row in result["rows"] if row["kind"] == kind] for kind in ("two stages", "direct"))
    if min(len(two), len(one)) < 2:
        return ["- One seed shows neither a difference nor a spread: measure with more `--seeds`."]
    spreads = [statistics.stdev(two), statistics.stdev(one)]
    gain = statistics.mean(two) - statistics.mean(one)
    error = math.sqrt(spreads[0] ** 2 / len(two) + spreads[1] ** 2 / len(one))
    return [
        verdict(
            gain > 2 * error,
            "two stages reconstruct better than direct training with as many steps",
            f"{gain:+.2f} dB with a standard error of {error:.2f} dB",
        ),
        verdict(
            spreads[0] <= spreads[1] / 2,
            "two stages vary less from seed to seed",
            f"standard deviation {spreads[0]:.2f} against {spreads[1]:.2f} dB over {len(two)} seeds",
        ),
    ]


def steps_claims(result: Row) -> list[str]:
    """Eight steps are enough: with at most 8, judge accuracy is at most 2 points below the best of all numbers.
    Too many steps harm: the largest number of steps is more than 2 points below the best.
    A sequence is sampled faster: less CPU time per image at the largest common number of steps."""
    sentences, kinds = [], {}
    for row in result["rows"]:
        kinds.setdefault(row["kind"], []).append(row)
    for kind, rows in kinds.items():
        best = max(row["judge"] for row in rows)
        least = next(row for row in rows if row["judge"] >= best - ENOUGH_ACCURACY)
        numbers = f"{least['steps']} reach {least['judge']:.1%}, the best of all is {best:.1%}"
        sentences.append(verdict(least["steps"] <= 8, f"{kind}: eight steps are enough", numbers))
        last = rows[-1]
        numbers = f"{last['steps']} steps: {last['judge']:.1%}"
        harmed = last["judge"] < best - ENOUGH_ACCURACY
        sentences.append(verdict(harmed, f"{kind}: quality falls again with too many steps", numbers))
    if len(kinds) == 2:
        (first, ones), (second, others) = kinds.items()
        times = [{row["steps"]: row["milliseconds"] for row in rows} for rows in (ones, others)]
        steps = max(times[0].keys() & times[1].keys())
        ratio = times[1][steps] / times[0][steps]
        numbers = f"{ratio:.2f} times as fast, {steps} steps"
        sentences.append(verdict(ratio > 1, f"{first} is sampled faster than {second}, decoder included", numbers))
    return sentences


RECONSTRUCTION = {
    "PSNR dB": ("psnr", "{:.2f}"),
    "SSIM": ("ssim", "{:.4f}"),
    "judge accuracy": ("judge", "{:.1%}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "parameters": ("parameters", "{:,}"),
    "training, CPU s": ("cpu_seconds", "{:.0f}"),
}
COLUMNS = {
    "number": {"tokens": ("tokens", "{}")} | RECONSTRUCTION,
    "grid": {"tokens": ("tokens", "{}"), "form": ("kind", "{}")} | RECONSTRUCTION,
    "stages": {"training": ("kind", "{}"), "seed": ("seed", "{}")} | RECONSTRUCTION,
    "steps": {
        "tokens": ("kind", "{}"),
        "steps": ("steps", "{}"),
        "NFE": ("nfe", "{}"),
        "judge accuracy": ("judge", "{:.1%}"),
        "CPU ms per image": ("milliseconds", "{:.2f}"),
    },
}
CLAIMS: dict[str, Callable[[Row], list[str]]] = {
    "number": number_claims,
    "grid": grid_claims,
    "stages": stages_claims,
    "steps": steps_claims,
}


def section(name: str, result: Row) -> str:
    """The settings, pictures, table and sentences of a part, as Markdown."""
    pictures = [f"![{title}](images/{file})" for file, title in result["pictures"].items()]
    sentences = CLAIMS[name](result)
    return "\n\n".join([result["settings"], *pictures, table(COLUMNS[name], result["rows"]), "\n".join(sentences)])


def table(columns: Mapping[str, tuple[str, str]], rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[form.format(row[key]) for key, form in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markers(name: str) -> tuple[str, str]:
    """The lines of the page around a part."""
    return f"<!-- {name}: begin (written by benchmarks/tokens.py) -->", f"<!-- {name}: end -->"


def _pairs(rows: Sequence[Row], first: str, second: str) -> list[tuple[Row, Row]]:
    """Rows of two kinds with as many tokens."""
    others = {row["tokens"]: row for row in rows if row["kind"] == second}
    return [(row, others[row["tokens"]]) for row in rows if row["kind"] == first and row["tokens"] in others]
