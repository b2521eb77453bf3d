"""``hfgen push``: a saved model, pipeline or run to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from hfgen.auto import AutoModel, AutoPipeline
from hfgen.cards import CARD_FILE, write_short_card
from hfgen.commands.shared import torch_dtype
from hfgen.publishing import RETRY_WAITS, prepare_repository, publish, push_command, write_pipeline_file

INDEX_FILES = ("model_index.json", "config.json")


def run(options: argparse.Namespace) -> str:
    """Nothing is sent before the folder and the rights are known to be good."""
    folder = find_folder(options.folder)
    if options.variant and not options.dtype:
        raise ValueError("--variant names weight files of another dtype: give that --dtype too.")
    repo_id = prepare_repository(options.repo, private=options.private or None, revision=options.revision)
    with TemporaryDirectory() as temporary:
        if options.dtype or options.max_shard_size or options.with_pipeline_file:
            folder = rewrite(folder, Path(temporary), options)
        if is_saved(folder) and not (folder / CARD_FILE).is_file():
            write_short_card(folder, repo_id)
        try:
            commit = publish(
                folder,
                repo_id,
                revision=options.revision,
                create_pr=options.create_pr,
                path_in_repo=options.path_in_repo,
                commit_message=options.message,
                replace_card=options.replace_card,
                waits=RETRY_WAITS,
            )
        except ConnectionError as error:
            command = push_command(options.folder, repo_id, revision=options.revision)
            raise ConnectionError(f"{error}. Try again later: {command}") from error
    return f"{repo_id}: {commit.pr_url or commit.commit_url}"


def find_folder(path: Path) -> Path:
    """The folder to upload; of a training run that is its result.

    Raises:
        ValueError: there is nothing that could be published.
    """
    if is_saved(path) or (path / "training_state.pt").is_file():
        return path
    if is_saved(path / "final"):
        return path / "final"
    raise ValueError(
        f"{path} is neither a saved model or pipeline ({' or '.join(INDEX_FILES)}) nor a finished run with `final`."
    )


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in INDEX_FILES)


def rewrite(folder: Path, target: Path, options: argparse.Namespace) -> Path:
    """A copy whose weights have the dtype, variant and size of files that were asked for."""
    loader = AutoPipeline if (folder / INDEX_FILES[0]).is_file() else AutoModel
    saved = loader.from_pretrained(folder, dtype=torch_dtype(options.dtype) if options.dtype else None)
    saved.save_pretrained(target, variant=options.variant, max_shard_size=options.max_shard_size or "10GB")
    for path in folder.iterdir():  # the card, its pictures and the record of the training
        if path.is_file() and path.suffix in (".md", ".png", ".json") and not (target / path.name).exists():
            if not path.name.endswith(".index.json"):
                (target / path.name).write_bytes(path.read_bytes())
    if options.with_pipeline_file:
        write_pipeline_file(target)
    return target
