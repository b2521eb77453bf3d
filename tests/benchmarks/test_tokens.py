"""The page about tokens: trainings run once, and its sentences and tables follow from the numbers."""

import json
import os
import sys
from pathlib import Path

import pytest

from hfgen import MaskedTokenScheduler, MaskGITPipeline, MaskGITTransformer, TiTok
from hfgen.data.shapes import CLASS_NAMES
from support.benchmark_modules import benchmark_modules
from support.example_runs import run_script

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "train_titok": ["--encoder", "8,1,1", "--decoder", "8,1,1"],
    "train_maskgit_vqgan": ["--base_channels", "8", "--num_codes", "16"],
}


@pytest.fixture(scope="module")
def modules():
    """The modules beside the script, by name."""
    found = benchmark_modules("pages", "tokens", "tokens_page", "trainings")
    return {
        "pages": found["pages"],
        "tokens": found["tokens"],
        "page": found["tokens_page"],
        "training": found["trainings"],
    }


@pytest.fixture
def started(modules, monkeypatch):
    """The scripts that were started, in this process and with small models."""
    scripts = []

    def launch(launcher, script, arguments, log, threads):
        scripts.append(script)
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        run_script(script, folder, *arguments, *SMALL[script])

    monkeypatch.setattr(modules["training"], "launch", launch)
    return scripts


@pytest.fixture
def run(modules, monkeypatch, tmp_path):
    """Call the script; the folder of the runs."""

    def run_main(*arguments):
        folder = tmp_path / "runs"
        command = ["tokens.py", "--runs", str(folder), "--quick", "--no_progress", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        modules["tokens"].main()
        return folder

    return run_main


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name}: begin")[1].split("-->")[1].split("<!--")[0]


def test_all_trainings_run_once_and_fill_the_page(run, started, modules, capsys):
    folder = run("--parts", "grid", "stages", "--seeds", "0")
    assert started == ["train_titok", "train_maskgit_vqgan"] * 2 + ["train_maskgit_vqgan"] + ["train_titok"] * 3
    results = json.loads((folder / "results.json").read_text())
    assert [(row["tokens"], row["kind"]) for row in results["grid"]["rows"]] == [
        (4, "sequence"), (4, "grid"), (16, "sequence"), (16, "grid"),
    ]  # fmt: skip
    assert [row["tokens"] for row in results["stages"]["rows"]] == [16, 16]
    page = (folder / "tokens.md").read_text()
    assert "| 16 | grid |" in between(page, "grid") and "| two stages | 0 |" in between(page, "stages")
    for part in results.values():
        assert part["pictures"] and all((folder / "images" / name).stat().st_size > 100 for name in part["pictures"])

    started.clear()
    (folder / "tokens.md").unlink()
    assert run("--parts", "grid", "stages", "--seeds", "0") == folder and not started
    assert (folder / "tokens.md").read_text() == page
    (folder / "proxy-vqgan.json").unlink()  # not done: it is trained again, and stage 2 from it keeps its result
    run("--parts", "stages", "--seeds", "0")
    assert started == ["train_maskgit_vqgan"]


def test_a_training_is_repeated_when_what_it_reads_changes(modules, started, tmp_path, monkeypatch):
    training = modules["training"]
    monkeypatch.setattr(training, "launch", lambda *_: started.append("run"))
    runs = training.Runs(tmp_path)

    def train(steps, **settings):
        proxy = training.Training("proxy", "train_maskgit_vqgan", {"max_train_steps": steps})
        after = training.Training("stage1", "train_titok", settings, (proxy,))
        runs.final(after).mkdir(parents=True, exist_ok=True)
        runs.train(after)
        return len(started)

    assert [train(2), train(2), train(3), train(3, seed=1), train(3, seed=1)] == [1, 1, 2, 3, 3]


def test_launcher_and_a_failing_script(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(modules["training"], "ROOT", tmp_path)
    script, log = tmp_path / "examples" / "train.py", tmp_path / "train.log"
    script.parent.mkdir()
    script.write_text(
        "import os, sys\nprint(os.environ['PREFIX'], os.environ['OMP_NUM_THREADS'])\nsys.exit(sys.argv[1])"
    )
    with pytest.raises(RuntimeError, match=r"train.py the reason\nended with status 1(.|\n)*\nset 1\nthe reason"):
        modules["training"].launch(["env", "PREFIX=set"], "train", ["the reason"], log)
    script.write_text("print('done')")
    modules["training"].launch([], "train", [], log)
    assert log.read_text() == "done\n"


def test_the_time_of_a_training_is_that_of_its_process(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(modules["training"], "ROOT", tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "train.py").write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1], 'final').mkdir(parents=True)\n"
        "while time.process_time() < 0.5: pass\n"
    )
    runs = modules["training"].Runs(tmp_path / "runs")
    training = modules["training"].Training("a", "train", {"flag": None, "value": 1})
    assert training.arguments() == ["--flag", "--value", "1"]
    seconds = runs.train(training)
    assert 0.4 < seconds < 30 and runs.train(training) == seconds  # the second call only reads it


def test_no_time_is_not_a_little_less_than_none(modules, monkeypatch, tmp_path):
    training = modules["training"]
    monkeypatch.setattr(training, "launch", lambda *_: None)  # 0.01 + 0.02 - 0.01 - 0.02 is -3e-18
    monkeypatch.setattr(training.os, "times", lambda: os.times_result((0.0, 0.0, 0.01, 0.02, 0.0)))
    assert training.Runs(tmp_path).train(training.Training("a", "train", {})) == 0


def test_sampling_steps_stop_at_the_number_of_tokens(run, tmp_path):
    tokenizer = TiTok(
        image_size=32, encoder_patch_size=8, decoder_patch_size=8, encoder_width=8, encoder_layers=1, encoder_heads=1,
        decoder_width=8, decoder_layers=1, decoder_heads=1, num_latent_tokens=5, latent_channels=4, num_codes=16,
        two_stage=False, num_proxy_codes=1,
    )  # fmt: skip
    transformer = MaskGITTransformer(
        num_codes=16, num_tokens=5, num_classes=len(CLASS_NAMES), hidden_size=8, num_layers=1,
        num_attention_heads=1, intermediate_size=8, class_dropout=0.1, unconditional_class=True,
    )  # fmt: skip
    scheduler = MaskedTokenScheduler(**{**MaskedTokenScheduler.presets["maskgit"], "num_inference_steps": 2})
    MaskGITPipeline(tokenizer, transformer, scheduler).save_pretrained(tmp_path / "pipe")
    folder = run("--parts", "steps", "--titok_pipeline", tmp_path / "pipe")
    rows = json.loads((folder / "results.json").read_text())["steps"]["rows"]
    assert [row["steps"] for row in rows] == [row["nfe"] for row in rows] == [1, 2, 4]
    assert (
        all(row["milliseconds"] > 0 for row in rows)
        and "| sequence of 5 | 4 | 4 |" in (folder / "tokens.md").read_text()
    )


def test_a_missing_pipeline_is_named(run, capsys):
    with pytest.raises(SystemExit):
        run("--parts", "steps")
    assert "--titok_pipeline" in capsys.readouterr().err


def shown(sentences):
    return ["Not shown" not in sentence for sentence in sentences]


def test_claims_about_numbers_and_grids_follow_from_the_numbers(modules):
    page = modules["page"]
    rows = [{"tokens": 4 * 2**k, "psnr": 20.0 + k, "judge": 0.5 + 0.2 * k} for k in range(3)]
    result = {"rows": rows, "judge_on_images": 1.0}
    assert shown(page.number_claims(result)) == [True, False]
    rows[2] |= {"psnr": 21.2, "judge": 0.985}
    assert shown(page.number_claims(result)) == [False, True]
    assert "16 tokens keep" in page.number_claims(result)[1] and "8 to 16: +0.20 dB" in page.number_claims(result)[0]

    rows = [{"tokens": n, "kind": kind, "psnr": value, "judge": 0.9} for n, kind, value in (
        (4, "sequence", 22.0), (4, "grid", 20.0), (16, "sequence", 24.0), (16, "grid", 23.9),
    )]  # fmt: skip
    assert shown(page.grid_claims({"rows": rows})) == [True, False]


def test_claims_about_stages_need_more_than_the_spread_of_seeds(modules):
    def claims(two, direct):
        rows = [
            {"kind": kind, "psnr": value}
            for kind, values in (("two stages", two), ("direct", direct))
            for value in values
        ]
        return shown(modules["page"].stages_claims({"rows": rows}))

    assert claims([25.0, 25.1, 24.9], [22.0, 23.0, 24.0]) == [True, True]
    assert claims([23.0, 25.0, 24.0], [22.5, 24.5, 23.5]) == [False, False]
    assert (
        "One seed"
        in modules["page"].stages_claims({"rows": [{"kind": k, "psnr": 1.0} for k in ("two stages", "direct")]})[0]
    )


def test_claims_about_sampling_steps(modules):
    def claims(judged):
        rows = [
            {"kind": kind, "steps": steps, "judge": value, "milliseconds": steps * cost}
            for kind, cost in (("sequence", 1), ("grid", 3))
            for steps, value in zip((1, 4, 8, 16), judged)
        ]
        return shown(modules["page"].steps_claims({"rows": rows}))

    assert claims([0.5, 0.9, 0.95, 0.9]) == [True, True] * 2 + [True]
    assert claims([0.1, 0.3, 0.5, 0.9]) == [False, False] * 2 + [True]


def test_the_documented_page_has_the_markers_of_all_parts(modules):
    text = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
    for name in modules["tokens"].PARTS:
        markers = modules["page"].markers(name)
        changed = modules["pages"].with_section(text, *markers, "new")
        assert between(changed, name) == "\nnew\n"
        restored = modules["pages"].with_section(changed, *markers, between(text, name).strip("\n"))
        assert restored.split() == text.split()
    with pytest.raises(ValueError, match="needs the lines <!-- number: begin"):
        modules["pages"].with_section("text", *modules["page"].markers("number"), "new")
