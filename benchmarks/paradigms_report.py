"""The table, the picture and the page of benchmarks/paradigms.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pages import with_section
from paradigms_claims import criteria, sentences, values
from paradigms_training import METHODS
from verdicts import listed, spread

from hfgen.training.history import write_text

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def rows(results: Mapping) -> list[dict]:
    """One row per method, sampler and number of steps: lists with a value per seed."""
    measures = results["measures"]
    found = []
    for name, by_seed in measures.items():
        first = next(iter(by_seed.values()))
        for point in first["points"]:
            which = (point["sampler"], point["steps"])
            row = {"method": name, "sampler": which[0], "steps": which[1], "nfe": point["nfe"]}
            row |= {key: values(measures, name, key, *which) for key in ("accuracy", "frechet", "seconds")}
            found.append(row)
    return found


def table(results: Mapping) -> str:
    """Markdown: a row per method and sampler, a column per number of passes; Frechet distance and accuracy."""
    measures, points = results["measures"], rows(results)
    budgets = sorted(set(results["steps"]))
    head = ["method", "sampler", "M parameters", "training s", "ms per pass", *(f"NFE {budget}" for budget in budgets)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, sampler in dict.fromkeys((row["method"], row["sampler"]) for row in points):
        own = [row for row in points if (row["method"], row["sampler"]) == (name, sampler)]
        longest = max(own, key=lambda row: row["nfe"])
        first = next(iter(measures[name].values()))
        cells = [METHODS[name].title, sampler, f"{first['parameters'] / 1e6:.2f}"]
        cells.append(f"{_mean(_training_seconds(results, name)):.0f}")
        cells.append(f"{1e3 * _mean(longest['seconds']) / longest['nfe']:.2f}")
        for budget in budgets:
            # Heun needs an odd number of passes: the largest that the budget allows, if no smaller budget has it.
            smaller = max((other for other in budgets if other < budget), default=0)
            fitting = [row for row in own if smaller < row["nfe"] <= budget]
            means = [f"{_mean(row['frechet']):.2f}, {_mean(row['accuracy']):.0%}" for row in fitting]
            cells.append(means[-1] if means else "")
        lines.append(f"| {' | '.join(cells)} |")
    limit = results["true_images"]
    filled = ["unseen true images", "", "", "", "", f"{limit['frechet']:.2f}, {limit['accuracy']:.0%}"]
    lines.append(f"| {' | '.join(filled + [''] * (len(head) - len(filled)))} |")
    return "\n".join(lines)


def text(results: Mapping) -> str:
    """What the page shows between its markers, without the picture."""
    seconds = results["pass_seconds"]
    parts = [
        f"Measured by `{results['command']}` with the seeds {', '.join(map(str, results['seeds']))}.",
        listed("The criteria, fixed before these models were trained:", criteria(results["measures"], seconds)),
        table(results),
        "The cells hold the Frechet distance and the accuracy, means over the seeds.",
        listed("What follows for the claims:", sentences(results["measures"], seconds)),
    ]
    bent = {name: values(results["measures"], name, "straightness") for name in results["measures"]}
    if any(bent.values()):
        each = "; ".join(f"{METHODS[name].title} {spread(found, '{:.4f}')}" for name, found in bent.items() if found)
        parts.append(f"Straightness per element, 0 for straight paths: {each}.")
    if seconds:
        sides = list(next(iter(seconds.values())))
        lines = [f"| ms per pass, side | {' | '.join(sides)} |", "|" + "---|" * (len(sides) + 1)]
        for name, by_side in seconds.items():
            lines.append(f"| {METHODS[name].title} | " + " | ".join(f"{1e3 * by_side[s]:.1f}" for s in sides) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part)


def write_page(page: Path, results: Mapping) -> Path:
    """Renew what stands between the markers of a page, and the picture in ``images/`` beside it.

    Returns:
        The picture.

    Raises:
        OSError: there is no such page.
        ValueError: it lacks the markers.
    """
    content = page.read_text(encoding="utf-8")
    picture = page.parent / "images" / f"{page.stem}.png"
    with_section(content, BEGIN, END, "")  # raises before anything is drawn
    shown = f"![Quality against passes and seconds](images/{picture.name})"
    content = with_section(content, BEGIN, END, f"\n{text(results)}\n\n{shown}\n")
    picture.parent.mkdir(exist_ok=True)
    draw(picture, results)
    write_text(page, content)
    return picture


def draw(path: Path, results: Mapping) -> None:
    """Frechet distance and accuracy against passes and against CPU seconds; the bands are the ranges over seeds."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    points = [row for row in rows(results) if not row["method"].endswith(("_s", "_m"))]
    series = list(dict.fromkeys((row["method"], row["sampler"]) for row in points))
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, (name, sampler) in enumerate(series):
        own = sorted((r for r in points if (r["method"], r["sampler"]) == (name, sampler)), key=lambda r: r["nfe"])
        colour = colormaps["tab20"](number % 20)
        for row, quantity in enumerate(("frechet", "accuracy")):
            for column in range(2):
                x = [r["nfe"] if column == 0 else 1e3 * _mean(r["seconds"]) for r in own]
                means = [_mean(r[quantity]) for r in own]
                panel = axes[row][column]
                panel.plot(x, means, marker="o", ms=4, color=colour, label=f"{METHODS[name].title}, {sampler}")
                low, high = ([pick(r[quantity]) for r in own] for pick in (min, max))
                panel.fill_between(x, low, high, color=colour, alpha=0.15)
                panel.vlines(x, low, high, color=colour, alpha=0.4)
    for column, label in enumerate(("passes of the network (NFE)", "CPU milliseconds per image, one thread")):
        axes[1][column].set_xlabel(label)
        for row, (quantity, name) in enumerate((("frechet", "Frechet distance"), ("accuracy", "class accuracy"))):
            panel = axes[row][column]
            panel.set_xscale("log", base=2 if column == 0 else 10)
            panel.axhline(results["true_images"][quantity], color="grey", ls=":", lw=1)
            panel.grid(alpha=0.3)
            axes[row][0].set_ylabel(name)
    axes[0][0].set_yscale("log")
    for axis in (axes[0][0].yaxis, axes[1][1].xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes[1][0].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure)
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)


def _training_seconds(results: Mapping, name: str) -> list[float]:
    """CPU seconds of the training with that of the methods that it builds on, per seed."""
    trained = results["training_seconds"]
    chain = [name]
    while METHODS[chain[-1]].parent is not None:
        chain.append(METHODS[chain[-1]].parent)
    return [sum(trained[each][seed] for each in chain) for seed in trained[name]]


def _mean(numbers) -> float:
    return sum(numbers) / len(numbers)
