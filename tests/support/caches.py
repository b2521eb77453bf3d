"""Small cache folders, written without the package's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hfgen.data.cache_format import INFO_FILE, CacheInfo, TokenizerIdentity

CLASS_NAMES = ("cat", "dog", "owl")
CODEBOOK_SIZE = 1000


def make_cache(folder: Path, *, num_rows: int = 6, num_variants: int = 2, captions: bool = True) -> Path:
    """Codes ``100 * row + 50 * variant + position`` in rows of 5; labels count modulo 3."""
    rows = np.arange(num_rows)[:, None, None]
    codes = 100 * rows + 50 * np.arange(num_variants)[None, :, None] + np.arange(5)
    arrays = {"codes": codes.astype(np.uint16), "labels": (np.arange(num_rows) % 3).astype(np.int32)}
    if captions:
        texts = [f"r\u00f6w {row}\n".encode() for row in range(num_rows)]
        arrays["captions"] = np.frombuffer(b"".join(texts), np.uint8)
        arrays["caption_ends"] = np.cumsum([len(text) for text in texts])
    info = CacheInfo(
        kind="codes",
        dtype="uint16",
        row_shape=(5,),
        num_rows=num_rows,
        num_variants=num_variants,
        codebook_size=CODEBOOK_SIZE,
        num_caption_bytes=len(arrays["captions"]) if captions else None,
        class_names=CLASS_NAMES,
        num_skipped=0,
        tokenizer=TokenizerIdentity("SomeTokenizer", {"num_codes": CODEBOOK_SIZE}, "0" * 64, "tester/tokenizer"),
        preprocessing={"dataset": "animals", "resolution": 64, "flip": True, "seed": 0},
    )
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / INFO_FILE).write_text(info.to_json())
    return folder
