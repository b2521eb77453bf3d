"""Learn a text tokenizer from the captions of a data set.

    python examples/train_text_tokenizer.py --dataset shapes:double --vocab_size 128 --output_dir runs/text_tokenizer

The defaults fit the built-in shapes. The result is a folder for transformers.AutoTokenizer.from_pretrained, with the
sentencepiece model beside it.
"""

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from hfgen.data.sources import load_images
from hfgen.data.text import make_tokenizer, read_captions, train_sentencepiece
from hfgen.training import REQUIRED, flag, script
from hfgen.training.checkpoints import write_folder
from hfgen.training.config import check_least

logger = logging.getLogger("train_text_tokenizer")

MODEL_FILE = "sentencepiece.model"


@dataclass(kw_only=True)
class Config:
    output_dir: str = flag(REQUIRED, "folder of the tokenizer", group="run")
    overwrite: bool = flag(False, "replace the tokenizer that --output_dir holds", group="run")
    progress: bool = flag(True, "show a progress bar while the captions are read", group="run")

    dataset: str = flag(
        "shapes:double", "built-in shapes, a folder with metadata.jsonl, a Hub id or tar files", group="data"
    )
    dataset_config_name: str | None = flag(None, "configuration of a Hub data set", group="data")
    dataset_revision: str | None = flag(None, "branch, tag or commit of a Hub data set", group="data")
    split: str = flag("train", "split or sub-folder", group="data")
    caption_column: str | None = flag(None, "column with the text; by default 'caption' or 'text'", group="data")
    max_captions: int = flag(1_000_000, "learn from the first N captions", group="data", least=1)

    vocab_size: int = flag(128, "number of tokens, with <pad>, <s>, </s> and <unk>", least=5)
    model_type: Literal["unigram", "bpe"] = flag("bpe", "unigram language model or byte-pair encoding")
    character_coverage: float = flag(
        1.0, "share of characters with a token; 0.9995 for languages with many, such as Chinese"
    )
    max_length: int = flag(77, "tokens that truncation keeps and padding fills, with <s> and </s>", least=3)

    def __post_init__(self) -> None:
        check_least(self)


@script(Config, __doc__)
def main(config: Config) -> None:
    folder = Path(config.output_dir)
    if folder.exists() and not (config.overwrite and (folder / MODEL_FILE).is_file()):
        raise ValueError(f"--output_dir {folder} exists: choose another, or --overwrite a folder of this script.")
    data = load_images(
        config.dataset,
        resolution=8,  # the images are not looked at
        split=config.split,
        caption_column=config.caption_column,
        config_name=config.dataset_config_name,
        revision=config.dataset_revision,
    )
    captions = tqdm(islice(read_captions(data), config.max_captions), unit=" captions", disable=not config.progress)
    model = train_sentencepiece(
        captions,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
    )
    tokenizer = make_tokenizer(model, model_type=config.model_type, max_length=config.max_length)

    def write(target: Path) -> None:
        tokenizer.save_pretrained(target)
        (target / MODEL_FILE).write_bytes(model)

    write_folder(folder, write)
    logger.info("Saved %d tokens to %s; load them with transformers.AutoTokenizer.", len(tokenizer), folder)


if __name__ == "__main__":
    main()
