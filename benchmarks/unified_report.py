"""The table, the picture and the page of benchmarks/unified.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import PIL.Image
from pages import with_section
from unified_claims import CLAIMS, values
from unified_training import ROBUST_SIGMA
from verdicts import criterion, listed

from hfgen.images import save_png
from hfgen.training.history import write_text
from hfgen.training.noise_curve import draw_noise_curves

ENLARGED = 2  # the pixels of what is drawn
BEGIN, END = "<!-- unified: begin -->", "<!-- unified: end -->"
TITLES = {
    "linear": "continuous, linear, patches of {}",
    "unet": "continuous, U-Net, patches of {}",
    "discrete": "codes of latents with noise {}",
}
COLUMNS = {
    "M parameters": ("parameters", "{:.2f}", 1e-6),
    "Frechet": ("frechet", "{:.2f}", 1),
    "drawn: shape": ("draw_shape", "{:.0%}", 1),
    "colour": ("draw_colour", "{:.0%}", 1),
    "size": ("draw_size", "{:.0%}", 1),
    "position": ("draw_cell", "{:.0%}", 1),
    "written: shape": ("write_shape", "{:.0%}", 1),
    " colour": ("write_colour", "{:.0%}", 1),
    " size": ("write_size", "{:.0%}", 1),
    " position": ("write_cell", "{:.0%}", 1),
}


def title(name: str) -> str:
    """A model as a reader names it."""
    kind, _, rest = name.partition("-")
    number, _, causal = rest.partition("-")
    return TITLES[kind].format(number) + (", causal" if causal else "")


def table(results: Mapping) -> str:
    """Markdown: a row for each model that draws and writes, means over the seeds; nothing if there is none."""
    head = ["model", "training s", *(name.strip() for name in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, by_seed in results["measures"].items():
        if not all("frechet" in each for each in by_seed.values()):
            continue
        seconds = results["training_seconds"][name].values()
        cells = [title(name), f"{_mean(seconds):.0f}"]
        cells += [
            form.format(scale * _mean(values(results["measures"], name, key))) for key, form, scale in COLUMNS.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return ""
    limit = results["true_images"]
    cells = [form.format(limit[key]) if key in limit else "" for key, form, _ in COLUMNS.values()]
    return "\n".join([*lines, f"| {' | '.join(['unseen true images', '', *cells])} |"])


def page_part(results: Mapping) -> str:
    """What the page shows between its markers, without the picture."""
    judged = [(claim, sentence) for claim in CLAIMS if (sentence := claim(results["measures"])) is not None]
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        f"Measured by `{results['command']}` with the seeds {seeds}.",
        listed("The criteria, fixed before these models were trained:", [criterion(claim) for claim, _ in judged]),
        (shown := table(results)),
        "Means over the seeds; the shares are of attributes that are right in images drawn for captions, and in texts "
        "written about images. Training seconds are those of the CPU, without autoencoder and codes."
        if shown
        else "",
        listed("What follows for the claims:", [sentence for _, sentence in judged]),
    ]
    return "\n\n".join(part for part in parts if part)


def picture_name(seed: str, model: str) -> str:
    """The file with what a model draws."""
    return f"{seed}-{model}.png"


def drawn_by_all(pictures: Path, models: Iterable[str], seed: str) -> tuple[PIL.Image.Image | None, list[str]]:
    """What the models draw with one seed, a row each, and which these are; None without their pictures."""
    files = {name: pictures / picture_name(seed, name) for name in models}
    rows = {name: PIL.Image.open(file) for name, file in files.items() if file.is_file()}
    if not rows:
        return None, []
    width, height = next(iter(rows.values())).size
    picture = PIL.Image.new("RGB", (width, height * len(rows)), "white")
    for index, row in enumerate(rows.values()):
        picture.paste(row, (0, index * height))
    return picture.resize((ENLARGED * picture.width, ENLARGED * picture.height), PIL.Image.Resampling.NEAREST), [*rows]


def write_page(page: Path, results: Mapping, pictures: Path) -> None:
    """Renew what stands between the markers of a page, and the pictures in ``images/`` beside it.

    Args:
        page: Markdown.
        results: of the comparison.
        pictures: folder with what each model draws.

    Raises:
        OSError: there is no such page.
        ValueError: it lacks the markers.
    """
    content = page.read_text(encoding="utf-8")
    with_section(content, BEGIN, END, "")  # raises before anything is drawn
    text = page_part(results)
    drawn, models = drawn_by_all(pictures, results["measures"], f"seed-{results['seeds'][0]}")
    if drawn is not None:
        picture = page.parent / "images" / "unified.png"
        save_png(drawn, picture)
        order = "; ".join(map(title, models))
        text += f"\n\n![A row of images by each model](images/{picture.name})"
        text += f"\n\nDrawn for the same captions with seed {results['seeds'][0]}, from top to bottom: {order}."
    curves = noise_curves(results["measures"])
    if curves is not None:
        picture = page.parent / "images" / "noise_robust_decoder.png"
        save_png(draw_noise_curves(*curves), picture)
        text += f"\n\n![PSNR of decoded latents against their noise](images/{picture.name})"
    write_text(page, with_section(content, BEGIN, END, f"\n{text}\n"))


def noise_curves(measures: Mapping) -> tuple[list[float], dict[str, list[float]], float] | None:
    """Noise, and PSNR before and after fine-tuning, means over the seeds; None if they were not measured."""
    if "robust" not in measures:
        return None
    first = next(iter(measures["robust"].values()))
    sigmas = sorted({float(name.rpartition("_")[2]) for name in first if name.startswith("psnr_before_")})
    curves = {
        when: [_mean(values(measures, "robust", f"psnr_{when}_{sigma:g}")) for sigma in sigmas]
        for when in ("before", "after")
    }
    return sigmas, curves, ROBUST_SIGMA


def _mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)
