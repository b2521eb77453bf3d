from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from hfgen.data.sources import load_images
from hfgen.data.text import make_tokenizer, normalize, read_captions, train_sentencepiece
from support.tars import write_shards

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_text_tokenizer.py"
SIZES = {"unigram": 70, "bpe": 190}
OTHER_TEXT = [
    "Ein Bild \u2013 mit \u201cZeichen\u201d, 12345 & mehr \u2026",
    "a cat, sitting on the mat; it's red!",
] * 20


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [*read_captions(load_images("shapes:double", resolution=8, limit=1500)), *OTHER_TEXT]


@pytest.fixture(scope="module", params=sorted(SIZES))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(captions, kind) -> bytes:
    return train_sentencepiece(captions, vocab_size=SIZES[kind], model_type=kind)


@pytest.fixture
def tokenizer(model, kind):
    return make_tokenizer(model, model_type=kind, max_length=24)


def difficult_texts() -> list[str]:
    draws = random.Random(0)
    alphabet = "abcdehilmorst    AB,.'\u00e9\u6f22\U0001f600\u2581"
    return [
        "",
        " ",
        "  two   spaces ",
        "tab\tand\nnew line\u00a0hard\x1c\x85",
        "\u2581 a \u2581\u2581 mark",
        "unknown \u6f22\u5b57 q\u6f22x",
        "\uff26\uff35\uff2c\uff2c width \ufb01 ligature",
        "e\u0301 composed",
        "\U0001f600\U0001f600a",
        *("".join(draws.choices(alphabet, k=draws.randint(1, 60))) for _ in range(500)),
    ]


def test_ids_are_those_of_sentencepiece(captions, model, kind, tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(processor) == len(tokenizer) == SIZES[kind]
    for text in [*captions[:200], *OTHER_TEXT[:2], *difficult_texts()]:
        expected = processor.encode(normalize(text))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)
        if tokenizer.unk_token_id not in expected:
            assert tokenizer.decode(expected) == processor.decode(expected) == normalize(text), repr(text)


def test_round_trip_and_special_tokens(captions, tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0, 1, 2, 3,
    )  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    for text in captions[:50]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and ids[-1] == 2 and 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["a red circle", "a"], padding="max_length", truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 24)
    assert batch["input_ids"].eq(0).equal(batch["attention_mask"].eq(0))
    long = tokenizer("a small red circle " * 20, truncation=True)["input_ids"]
    assert len(long) == 24 and long[-1] == 2
    assert tokenizer("zq\u6f22")["input_ids"].count(3) >= 1


def test_equal_captions_give_equal_bytes(captions, model, kind):
    assert train_sentencepiece(iter(captions), vocab_size=SIZES[kind], model_type=kind) == model
    assert train_sentencepiece(captions[:500], vocab_size=SIZES[kind] // 2, model_type=kind) != model


class Captioner(DiffusionPipeline):
    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer)


def test_in_a_folder_and_in_a_pipeline(tokenizer, captions, tmp_path):
    expected = tokenizer(captions[:20])["input_ids"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded(captions[:20])["input_ids"] == expected and loaded.model_max_length == 24
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token, loaded.unk_token) == (
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
    )
    Captioner(tokenizer).save_pretrained(tmp_path / "pipeline")
    pipeline = Captioner.from_pretrained(tmp_path / "pipeline")
    assert pipeline.tokenizer(captions[:20])["input_ids"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 5000}, r"5000 is too large.*'bpe' it supports at most \d+ tokens"),
        ({"vocab_size": 10}, r"10 is too small.*alone need \d+"),
        ({"vocab_size": 64, "model_type": "word"}, "model_type 'word'"),
        ({"vocab_size": 64, "character_coverage": 2.0}, "character_coverage is 2.0"),
    ],
)
def test_vocabularies_that_do_not_fit(captions, options, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(captions[:300], **{"model_type": "bpe", **options})


def test_the_largest_vocabulary_is_the_one_that_the_message_names(captions, kind):
    with pytest.raises(ValueError) as caught:
        train_sentencepiece(captions, vocab_size=4000, model_type=kind)
    largest = int(str(caught.value).partition("at most ")[2].split()[0])
    assert train_sentencepiece(captions, vocab_size=largest, model_type=kind)


def test_no_text():
    for nothing in ([], ["", "  "]):
        with pytest.raises(ValueError, match="no text"):
            train_sentencepiece(nothing, vocab_size=64, model_type="bpe")
    with pytest.raises(ValueError, match="max_length is 2"):
        make_tokenizer(b"", model_type="bpe", max_length=2)


def test_rare_characters_can_be_left_out(captions):
    rare = [*captions[:300], "\u6f22"]
    for coverage, expected in ((1.0, False), (0.99, True)):
        model = train_sentencepiece(rare, vocab_size=100, model_type="bpe", character_coverage=coverage)
        tokenizer = make_tokenizer(model, model_type="bpe", max_length=24)
        assert (3 in tokenizer("\u6f22")["input_ids"]) is expected


# ------------------------------------------------------------------------------------------------------- the script


def run(monkeypatch, *arguments: str | Path) -> None:
    spec = importlib.util.spec_from_file_location("train_text_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--debug", "--no_progress", *map(str, arguments)])
    module.main()


def test_script(monkeypatch, tmp_path):
    folder = tmp_path / "tokenizer"
    run(monkeypatch, "--output_dir", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a small red circle at the top left"
    assert len(tokenizer) == 128 and tokenizer.model_max_length == 77
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    assert processor.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="exists: choose another"):
        run(monkeypatch, "--output_dir", folder)
    run(monkeypatch, "--output_dir", folder, "--overwrite")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    (folder / "sentencepiece.model").unlink()
    with pytest.raises(ValueError, match="exists: choose another"):
        run(monkeypatch, "--output_dir", folder, "--overwrite")


def test_script_reads_any_source(monkeypatch, tmp_path):
    shards = write_shards(tmp_path / "shards")
    run(monkeypatch, "--output_dir", tmp_path / "a", "--dataset", shards, "--vocab_size", 30, "--max_length", 9)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.decode(tokenizer("picture 7")["input_ids"], skip_special_tokens=True) == "picture 7"
    run(monkeypatch, "--output_dir", tmp_path / "b", "--dataset", shards, "--vocab_size", 30, "--max_captions", 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("7")["input_ids"].count(3) == 1
    (tmp_path / "plain" / "class").mkdir(parents=True)
    (tmp_path / "plain" / "class" / "0.png").write_bytes(b"never decoded")
    with pytest.raises(ValueError, match="no captions: add them to metadata.jsonl"):
        run(monkeypatch, "--output_dir", tmp_path / "c", "--dataset", tmp_path / "plain")
    assert not (tmp_path / "c").exists()
