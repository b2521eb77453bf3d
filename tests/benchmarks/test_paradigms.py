"""The comparison of paradigms runs, continues, and says about claims what its criteria say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from support.benchmark_modules import benchmark_modules
from support.example_runs import run_script

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ("0", "1", "2")


@pytest.fixture(scope="module")
def modules():
    parts = ("claims", "report", "sampling", "training")
    found = benchmark_modules("paradigms", *(f"paradigms_{part}" for part in parts), "trainings", "verdicts")
    return {name.removeprefix("paradigms_"): module for name, module in found.items()}


@pytest.fixture
def compare(modules, monkeypatch, tmp_path):
    """Run the comparison, with the trainings in this process; the names of the scripts that ran."""

    def call(*arguments):
        scripts = []

        def launch(launcher, script, arguments, log, threads):
            scripts.append(script)
            place = arguments.index("--output_dir")
            run_script(script, Path(arguments[place + 1]), *arguments[:place], *arguments[place + 2 :])

        monkeypatch.setattr(modules["trainings"], "launch", launch)
        flags = ["--runs", tmp_path, "--quick", "--no_progress", *arguments]
        monkeypatch.setattr(sys, "argv", ["paradigms.py", *map(str, flags)])
        modules["paradigms"].main()
        return scripts

    return call


@pytest.fixture
def report(modules, monkeypatch):
    """Make the report of stored numbers again, where nothing can be trained."""

    def call(results, page=None):
        flags = [] if page is None else ["--page", page]
        with monkeypatch.context() as patch:
            patch.setattr(modules["trainings"], "launch", None)
            patch.setattr(sys, "argv", ["paradigms.py", "--from_results", *map(str, [results, *flags])])
            modules["paradigms"].main()

    return call


def test_every_method_trains_and_is_measured_once(compare, report, modules, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("Above.\n\n<!-- measured: begin -->\nstale\n<!-- measured: end -->\n\nBelow.\n")
    methods = modules["training"].METHODS
    large = [name for name in methods if not name.endswith(("_s", "_m"))]
    scripts = compare("--seeds", 0, "--methods", *large, "--page", page)
    assert scripts[0] == "cache_latents" and len(scripts) == 1 + len(large)
    results = json.loads((tmp_path / "paradigms.json").read_text())
    assert results["measures"].keys() == set(large)
    for name, by_seed in results["measures"].items():
        measured = by_seed["0"]
        samplers = {point["sampler"] for point in measured["points"]}
        assert samplers == set(methods[name].samplers), name
        assert all(point["seconds"] > 0 and point["frechet"] >= 0 for point in measured["points"])
        assert {point["nfe"] for point in measured["points"]} <= {1, 3, 4}
        assert ("straightness" in measured) == (name in ("flow", "reflow", "distilled"))
        assert 0.8e6 < measured["parameters"] < 1.2e6, name
    content = page.read_text()
    assert content.startswith("Above.") and content.endswith("Below.\n") and "stale" not in content
    assert re.search(r"\| DiT, rectified flow \| euler \| \d\.\d\d \| 0 \|", content)
    joined = content.replace("\n  ", " ")  # items of lists, without their line breaks
    claims = [line for line in joined.splitlines() if line.startswith("- C")]
    verdicts = {line[2:5]: line for line in claims if ": **" in line}
    criteria = {line[2:5]: line for line in claims if ": **" not in line}
    assert criteria.keys() == verdicts.keys() and all("olds if" in line for line in criteria.values())
    assert joined.index(criteria["C30"]) < joined.index("| method |") < joined.index(verdicts["C13"])
    assert verdicts.keys() == {"C13", "C14", "C17", "C30"}
    assert all("**is undecided**" in verdicts[claim] for claim in ("C13", "C14", "C17"))  # with one seed
    assert str(tmp_path) not in content
    assert (tmp_path / "images" / "page.png").stat().st_size > 10_000
    assert capsys.readouterr().out.strip() in content

    (tmp_path / "images" / "page.png").unlink()
    page.write_text(content.replace("Frechet", "stale"))
    report(tmp_path / "paradigms.json", page)
    assert page.read_text() == content and (tmp_path / "images" / "page.png").is_file()
    report(tmp_path / "paradigms.json")
    assert (tmp_path / "paradigms.png").stat().st_size > 10_000

    assert compare("--seeds", 0, "--methods", "distilled") == []  # everything is there


def test_a_stopped_or_changed_comparison_continues(compare, tmp_path):
    measures = tmp_path / "seed-0" / "dit_s-measures.json"
    assert compare("--seeds", 0, "--methods", "dit_s") == ["cache_latents", "train_diffusion"]
    first = measures.read_text()
    assert compare("--seeds", 0, "--methods", "dit_s", "--learning_rate", "0.1") == ["train_diffusion"]
    assert measures.read_text() != first  # of the new weights
    (tmp_path / "seed-0" / "dit_s.json").unlink()  # as if it had been killed just before the end
    assert compare("--seeds", 0, "--methods", "dit_s", "unet_s") == ["train_diffusion"] * 2


def test_parents_come_first(modules):
    assert modules["training"].with_parents(["distilled", "dit", "flow"]) == ["flow", "reflow", "distilled", "dit"]


def test_true_images_are_judged_right_and_their_spread_is_one(modules):
    sampling = modules["sampling"]
    settings = sampling.SamplingSettings((1,), 8, 480, resolution=32, guidance=1.0, batch_size=8)
    quality = sampling.Quality(settings)
    true = quality.of_true_images()
    assert true["accuracy"] > 0.98 and true["spread"] == pytest.approx(1, abs=0.15)
    images, labels = quality._true_images("validation", 192)
    means = torch.stack([images[labels == label].float().mean(dim=0) for label in labels])
    collapsed = quality(means.round().to(torch.uint8), labels)
    assert collapsed["spread"] < 1e-3 and collapsed["frechet"] > 3 * true["frechet"]


def _point(sampler, steps, frechet, spread=1.0):
    return {"sampler": sampler, "steps": steps, "frechet": frechet, "spread": spread}


def _measures(**methods):
    """``name=(points of the first seed, straightness)``; other seeds differ by up to 10 %."""
    found = {}
    for name, (points, bent) in methods.items():
        found[name] = {
            seed: {
                "points": [point | {"frechet": point["frechet"] * (0.95 + 0.05 * i)} for point in points],
                "straightness": bent * (0.95 + 0.05 * i),
            }
            for i, seed in enumerate(SEEDS)
        }
    return found


@pytest.mark.parametrize(
    ("flow", "verdict"), [((1.0, 0.5), "holds"), ((4.0, 3.0), "does not hold"), ((1.0, 2.0), "undecided")]
)
def test_few_steps(flow, verdict, modules):
    measures = _measures(
        flow=([_point("euler", steps, value) for steps, value in zip((2, 8), flow)], 0),
        dit=([_point("ddim", steps, 2.0) for steps in (2, 8)], 0),
    )
    assert f"{verdict}" in modules["claims"].few_step_flow(measures).partition("**.")[0]


@pytest.mark.parametrize(
    ("bent", "one", "verdict"),
    [
        (0.1, (1.0, 0.5), "holds"),
        (0.1, (4.0, 0.5), "does not hold"),
        (0.5, (1.0, 0.5), "undecided"),
        (0.9, (1.0, 0.5), "does not hold"),
    ],
)
def test_reflow(bent, one, verdict, modules):
    measures = _measures(
        flow=([_point("euler", 1, 2.0)], 0.5),
        reflow=([_point("euler", 1, one[0])], bent),
        distilled=([_point("euler", 1, one[1])], bent),
    )
    assert verdict in modules["claims"].reflow_straightens(measures).partition("**.")[0]


@pytest.mark.parametrize(("dit", "verdict"), [(1.0, "holds"), (6.0, "does not hold"), (3.0, "undecided")])
def test_size(dit, verdict, modules):
    points = {"unet_s": 6.0, "unet": 3.0, "dit_s": 6.0, "dit": dit}
    measures = _measures(
        **{name: ([_point("ddim", 1, 50.0), _point("ddim", 64, value)], 0) for name, value in points.items()}
    )
    for i, seed in enumerate(SEEDS):  # the gains of _measures are equal for all seeds
        measures["dit"][seed]["points"][1]["frechet"] *= 0.9 + 0.1 * i
    assert verdict in modules["claims"].transformers_scale(measures).partition("**.")[0]


@pytest.mark.parametrize(
    ("kept", "verdict"), [((0.9, 0.1), "holds"), ((0.9, 0.8), "does not hold"), ((0.3, 0.1), "does not hold")]
)
def test_one_step(kept, verdict, modules):
    measures = _measures(
        flow=([_point("euler", 1, 9.0)], 0.5),
        mean_flow=([_point("mean-flow", 1, 1.0, kept[0])], 0),
        matching=([_point("mean-flow", 1, 9.0, kept[1])], 0),
        matching_pairs=([_point("mean-flow", 1, 2.0, 0.9)], 0),
    )
    assert verdict in modules["claims"].one_step_mean_flow(measures).partition("**.")[0]


@pytest.mark.parametrize(("dit", "verdict"), [(3.8, "holds"), (2.1, "does not hold"), (3.0, "undecided")])
def test_cost_of_a_pass(dit, verdict, modules):
    seconds = {
        name: {str(side): side**power for side in (16, 32, 64)} for name, power in (("dit", dit), ("unet", 2.0))
    }
    assert modules["claims"].cost_exponents(seconds) == pytest.approx({"dit": dit, "unet": 2.0})
    assert verdict in modules["claims"].attention_is_quadratic(seconds).partition("**.")[0]


def test_one_seed_decides_nothing_and_missing_methods_give_no_sentence(modules):
    verdicts = modules["verdicts"]
    assert verdicts.below([1.0], [2.0]) == verdicts.UNDECIDED
    assert verdicts.below([1.0, 1.1], [2.0, 2.1]) == verdicts.HOLDS
    assert modules["claims"].sentences({}, {}) == []


def test_bad_input(compare, modules, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="measured: begin"):
        modules["report"].write_page(page, {})
    for flags, message in (
        (["--guidance", "0.5"], "--guidance is 0.5"),
        (["--methods", "gan"], "invalid choice: 'gan'"),
        (["--vae", "nothing"], "--vae nothing is not a folder"),
    ):
        with pytest.raises(SystemExit):
            compare(*flags)
        assert message in capsys.readouterr().err
