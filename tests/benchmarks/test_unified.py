"""The comparison of text and images in one transformer runs, continues, and says what its criteria say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import PIL.Image
import pytest

from support.benchmark_modules import benchmark_modules
from support.example_runs import run_script
from support.small_autoencoder import save_autoencoder

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ("0", "1", "2")


@pytest.fixture(scope="module")
def modules():
    found = benchmark_modules("unified", "unified_claims", "unified_training", "trainings")
    return {name.removeprefix("unified_"): module for name, module in found.items()}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def compare(modules, vae, monkeypatch, tmp_path):
    """Run the comparison, with the trainings in this process; the names of the folders that they wrote."""

    def call(*arguments):
        trained = []

        def launch(launcher, script, arguments, log, threads):
            place = arguments.index("--output_dir")
            trained.append(Path(arguments[place + 1]).name)
            small = ["--width", "16", "--num_layers", "1", "--num_heads", "2"] if "transfusion" in script else []
            run_script(script, Path(arguments[place + 1]), *arguments[:place], *arguments[place + 2 :], *small)

        monkeypatch.setattr(modules["trainings"], "launch", launch)
        flags = ["--runs", tmp_path, "--vae", vae, "--quick", "--no_progress", "--seeds", 0, *arguments]
        monkeypatch.setattr(sys, "argv", ["unified.py", *map(str, flags)])
        modules["unified"].main()
        return trained

    return call


def test_all_parts_are_trained_and_measured_once(compare, modules, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("Above.\n\n<!-- unified: begin -->\nstale\n<!-- unified: end -->\n\nBelow.\n")
    assert compare("--models", "robust", "text") == ["robust", "text"]
    trained = compare("--page", page)
    assert "robust" not in trained and trained.index("codes-0.3") < trained.index("discrete-0.3")
    results = json.loads((tmp_path / "unified.json").read_text())
    models = {*modules["training"].CONTINUOUS, *modules["training"].DISCRETE}
    assert results["measures"].keys() == models | {"robust", "text", "joint"}
    for name in models:
        measured = results["measures"][name]["0"]
        assert measured["frechet"] > 0 and 0 <= measured["draw_attributes"] <= 1, name
        assert 0 <= measured["write_attributes"] <= 1 and measured["captioning_loss"] > 0
        assert (tmp_path / "pictures" / f"seed-0-{name}.png").stat().st_size > 100
    content = page.read_text()
    assert content.startswith("Above.") and content.endswith("Below.\n") and "stale" not in content
    assert (
        "| codes of latents with noise 0.3 |" in content and "| continuous, linear, patches of 2, causal |" in content
    )
    claims = [line for line in content.replace("\n  ", " ").splitlines() if line.startswith("- C")]
    assert sum(": **is undecided**" in line for line in claims) == len(modules["claims"].CLAIMS)  # with one seed
    assert (tmp_path / "images" / "noise_robust_decoder.png").stat().st_size > 5000
    with (
        PIL.Image.open(tmp_path / "images" / "unified.png") as drawn,
        PIL.Image.open(tmp_path / "pictures" / "seed-0-unet-4.png") as row,
    ):
        assert drawn.size == (2 * row.width, 2 * len(models) * row.height)
    assert str(tmp_path) not in content and capsys.readouterr().out.strip().splitlines()[-1] in content

    assert compare() == []  # everything is there
    again = ["unified.py", "--from_results", str(tmp_path / "unified.json"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", again)
    page.write_text(content.replace("Frechet", "stale"))
    modules["unified"].main()
    assert page.read_text() == content


def _measures(**models):
    """Values of a model by seed; each seed's differ by up to 4 %, unless they are lists by seed."""
    return {
        name.replace("_", "-").replace("-p", "."): {
            seed: {
                quantity: value[i] if isinstance(value, list) else value * (0.96 + 0.04 * i)
                for quantity, value in quantities.items()
            }
            for i, seed in enumerate(SEEDS)
        }
        for name, quantities in models.items()
    }


def verdict(sentence: str) -> str:
    return sentence.split("**")[1]


@pytest.mark.parametrize(
    ("nats", "frechet", "expected"),
    [(2.0, 1.0, "holds"), (2.0, 9.0, "does not hold at this scale"), (3.0, 1.0, "is undecided")],
)
def test_noisy_codes(nats, frechet, expected, modules):
    measures = _measures(
        discrete_0={"image_loss": 3.0, "frechet": 5.0, "draw_attributes": 0.5},
        discrete_0_p1={"image_loss": nats, "frechet": frechet, "draw_attributes": 0.5},
    )
    sentence = modules["claims"].noisy_codes_are_easier(measures)
    assert verdict(sentence) == expected
    assert "Frechet distance: " in sentence and "50% (48% to 52%) with noise 0.1." in sentence


@pytest.mark.parametrize(
    ("after", "expected"),
    [(26.0, "holds"), (21.0, "does not hold at this scale"), ([24.0, 26.0, 21.0], "is undecided")],
)
def test_decoder(after, expected, modules):
    after = after if isinstance(after, list) else [after] * 3
    curve = {"psnr_before_0": [30.0] * 3, "psnr_before_0.5": [20.0] * 3}
    measures = _measures(robust=curve | {"psnr_after_0": [30.0] * 3, "psnr_after_0.5": after})
    assert verdict(modules["claims"].decoders_restore(measures)) == expected


@pytest.mark.parametrize(
    ("joint", "expected"), [(1.01, "holds"), (1.2, "does not hold at this scale"), ([1.0, 1.04, 1.2], "is undecided")]
)
def test_cost_to_text(joint, expected, modules):
    measures = _measures(
        text={"text_loss": [1.0] * 3}, joint={"text_loss": joint if isinstance(joint, list) else [joint] * 3}
    )
    assert verdict(modules["claims"].text_costs_little(measures)) == expected


@pytest.mark.parametrize(
    ("better", "worse", "claim"),
    [
        ("unet-4", "linear-4", "unet_takes_large_patches"),
        ("linear-2", "linear-2-causal", "images_want_both_directions"),
    ],
)
def test_adapters_and_attention(better, worse, claim, modules):
    judged = getattr(modules["claims"], claim)

    def measures(first, second):
        return _measures(
            **{better.replace("-", "_"): {"frechet": first}, worse.replace("-", "_"): {"frechet": second}}
        )

    assert verdict(judged(measures(1.0, 2.0))) == "holds"
    assert verdict(judged(measures(2.0, 1.0))) == "does not hold at this scale"
    assert verdict(judged(measures(1.0, 1.01))) == "is undecided"


@pytest.mark.parametrize(
    ("write", "frechet", "expected"),
    [(0.9, 1.0, "holds"), (0.2, 1.0, "does not hold at this scale"), (0.9, 4.0, "is undecided")],
)
def test_one_model_both_ways(write, frechet, expected, modules):
    measures = _measures(
        unet_2={"draw_attributes": 0.9, "write_attributes": write, "frechet": frechet},
        discrete_0_p1={"draw_attributes": 0.6, "write_attributes": 0.7, "frechet": 4.0},
    )
    assert verdict(modules["claims"].one_model_both_ways(measures)) == expected


def test_nothing_measured_gives_no_sentence_and_bad_input_is_named(compare, modules, capsys):
    assert all(claim({}) is None for claim in modules["claims"].CLAIMS)
    for flags, message in (
        (["--guidance", "0.5"], "--guidance is 0.5"),
        (["--models", "gan"], "invalid choice: 'gan'"),
        (["--vae", "nothing"], "--vae nothing is not a folder"),
    ):
        with pytest.raises(SystemExit):
            compare(*flags)
        assert message in capsys.readouterr().err
