"""The picture of a run: every logged quantity over the steps, what belongs together in one panel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VALIDATION = "validation"
SPEED = ("images_per_second", "data_wait_fraction", "model_flops_utilisation")
FIRST = ("loss", "accuracy")
LOGARITHMIC = ("loss", "norm", "l1", "l2", "lpips", "commitment", "codebook", "error")
Series = list[tuple[int, float]]


def panels(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Series]]:
    """Series of (step, value) by panel title and legend text.

    Quantities of a phase whose names begin with the same word share a panel ("loss" and "loss_2x2"). A validation
    quantity that is also logged in training lies beside its training values, under the legend text "validation".
    """
    series: dict[str, Series] = {}
    for record in records:
        for name, value in record.items():
            if ("/" in name or name in SPEED) and value is not None:
                series.setdefault(name, []).append((record["step"], value))
    trained = {name.partition("/")[2]: name.partition("/")[0] for name in series if not name.startswith(VALIDATION)}
    result: dict[str, dict[str, Series]] = {}
    for name, points in series.items():
        phase, _, quantity = name.rpartition("/")
        label = quantity
        if phase == VALIDATION and quantity in trained:
            phase, label = trained[quantity], VALIDATION
        family = quantity if phase == "" else re.split(r"_(?=\d)", quantity)[0].split("_")[0]
        result.setdefault(f"{phase}: {family}" if phase else quantity.replace("_", " "), {})[label] = points
    for title, lines in list(result.items()):
        if len(lines) == 1 and title.partition(": ")[2]:  # the whole name instead of its first word
            phase, (name,) = title.partition(": ")[0], lines
            result[f"{phase}: {name.replace('_', ' ')}"] = result.pop(title)
    return dict(sorted(result.items(), key=lambda item: _rank(item[0])))


def _rank(title: str) -> int:
    """Training losses first, then validation, then rates, norms and speed."""
    phase, _, family = title.partition(": ")
    if not family:
        return 5
    if family.startswith(("learning", "grad")):
        return 4
    if phase == VALIDATION:
        return 3
    return FIRST.index(family.split()[0]) if family.split()[0] in FIRST else 2


def smooth(values: Sequence[float], span: float) -> list[float]:
    """The exponential moving average with the given span in points, without the bias of its start."""
    average = weight = 0.0
    keep = 1.0 - 2.0 / (span + 1.0)
    result = []
    for value in values:
        average, weight = keep * average + (1.0 - keep) * value, keep * weight + (1.0 - keep)
        result.append(average / weight)
    return result


def draw_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with a panel for each quantity or family of quantities; nothing if there is none.

    Long curves are smoothed over a fortieth of their length, with the raw values behind a single one. The value axis
    of losses and norms that vary more than tenfold is logarithmic.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    contents = panels(records)
    if not contents:
        return
    columns = min(4, len(contents))
    rows = math.ceil(len(contents) / columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, lines) in enumerate(contents.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        alone = sum(label != VALIDATION for label in lines) == 1
        for number, (label, points) in enumerate(lines.items()):
            steps, values = zip(*points)
            colour = "C0" if alone else colormaps["viridis"](0.92 * number / max(len(lines) - 1, 1))
            family = title.partition(": ")[2]
            if label == family and not alone:  # the mean of the others
                colour = "black"
            text = None if len(lines) == 1 else (label.removeprefix(f"{family}_") or label).replace("_", " ")
            if label == VALIDATION or title.startswith(VALIDATION):
                colour = "C1" if label == VALIDATION or alone else colour
                axes.plot(steps, values, "o-", markersize=3, linewidth=1, color=colour, label=text, zorder=3)
                continue
            is_long = len(points) > 60 and not title.endswith("learning rate")
            if is_long and alone:
                axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=colour)
            drawn = smooth(values, len(points) / 40) if is_long else values
            axes.plot(steps, drawn, linewidth=1.4, color=colour, label=text, marker="." if len(points) < 20 else None)
        _finish(axes, title, [value for points in lines.values() for _, value in points])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def _finish(axes: Any, title: str, values: Sequence[float]) -> None:
    words = title.replace(":", "").split()
    if min(values) > 0 and max(values) > 10 * min(values) and set(words) & set(LOGARITHMIC):
        axes.set_yscale("log")
    axes.set_title(title[0].upper() + title[1:], fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5, frameon=False, ncols=1 + (len(axes.lines) > 5))
