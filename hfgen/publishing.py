"""Folders to the Hub: the repository, the upload with its retries, and ``push_to_hub`` of models and pipelines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

import hfgen
from hfgen.cards import CARD_FILE, PLACEHOLDER, write_short_card

logger = logging.getLogger(__name__)

RETRY_WAITS = (5, 15, 60, 180, 300)  # seconds before each further attempt, on top of the client's own short ones
PIPELINE_FILE = "pipeline.py"
_UNFINISHED = ("*.tmp", "*.tmp/*", ".cache/*", ".git/*")  # what is no part of a saved folder
_TRANSIENT_STATUS = (408, 412, 425, 429)  # 412: somebody else's commit came first


def prepare_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Make sure that one can write to a model repository, which is created if it does not exist.

    Args:
        repo_id: ``"USER/NAME"``, or ``"NAME"`` in the namespace of the token.
        private: whether a new repository is private; None takes the default of the namespace.
        revision: branch to create if it does not exist; None is ``main``.
        token: access token of the Hub; None takes the stored one.

    Returns:
        The id with its namespace.

    Raises:
        PermissionError: no token, a wrong one, or one that may not write there.
        ConnectionError: the Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        api.whoami()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        _create_branch(api, repo_id, revision)
    except LocalTokenNotFoundError as error:
        raise PermissionError("There is no Hub token: run `hf auth login` or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept the token ({_line(error)}): run `hf auth login` or set HF_TOKEN."
            ) from error
        if status in (403, 404):
            raise PermissionError(
                f"The token may not write to {repo_id!r} ({_line(error)}): use a token with write access, and a name "
                "in your own namespace or in that of an organization of yours."
            ) from error
        raise ConnectionError(f"The Hub refused to prepare {repo_id!r}: {_line(error)}") from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(f"The Hub cannot be reached to prepare {repo_id!r}: {_line(error)}") from error
    return repo_id


def publish(
    folder: str | PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    commit_message: str | None = None,
    replace_card: bool = False,
    delete_patterns: Sequence[str] | None = None,
    token: str | bool | None = None,
    waits: Sequence[float] = (),
    pause: Callable[[float], object] = time.sleep,
) -> CommitInfo:
    """Upload a folder to an existing model repository in one commit; files that did not change are not sent.

    A card (README.md) that the repository has stays as it is, unless ``replace_card``.

    Args:
        folder: what to upload.
        repo_id: ``"USER/NAME"``.
        revision: branch, which is created if it does not exist; None is ``main``.
        create_pr: open a pull request instead of a commit to the branch.
        path_in_repo: folder of the repository; None is its root.
        commit_message: None takes that of huggingface_hub.
        replace_card: replace the card of the repository by that of the folder.
        delete_patterns: files of the repository, relative to ``path_in_repo``, that go unless ``folder`` has them.
        token: access token of the Hub; None takes the stored one.
        waits: seconds before each further attempt after one that the network or the Hub failed.
        pause: called with each of them.

    Raises:
        ConnectionError: all attempts failed; says how to finish.
        OSError: the Hub refused, such as for want of rights.
    """
    api = HfApi(token=token)

    def upload() -> CommitInfo:
        _create_branch(api, repo_id, revision)
        keep_card = (
            path_in_repo is None and not replace_card and api.file_exists(repo_id, CARD_FILE, revision=revision)
        )
        if not keep_card:
            _name_repository(Path(folder), repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=[*_UNFINISHED, *((CARD_FILE,) if keep_card else ())],
            delete_patterns=None if delete_patterns is None else list(delete_patterns),
        )

    for attempt, wait in enumerate((*waits, None), start=1):
        try:
            return upload()
        except Exception as error:
            if not _is_transient(error):
                raise
            if wait is None:
                raise ConnectionError(
                    f"{folder} could not be uploaded to {repo_id} ({attempt} attempts, the last: {_line(error)})"
                ) from error
            logger.warning("Upload to %s failed (%s); trying again in %g s.", repo_id, _line(error), wait)
            pause(wait)
    raise AssertionError("the last attempt returns or raises")


def push_command(folder: str | PathLike, repo_id: str, *, revision: str | None = None) -> str:
    """The command that uploads ``folder``, for messages."""
    return f"hfgen push {folder} {repo_id}" + (f" --revision {revision}" if revision else "")


class PublishMixin:
    """``push_to_hub`` with a card of hfgen. It goes before the classes of diffusers among the base classes."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        max_shard_size: int | str = "10GB",
        with_pipeline_file: bool = False,
    ) -> CommitInfo:
        """Upload the weights and the configuration in one commit.

        The arguments of diffusers, and three more. A repository without a card gets a short one; a card that is there
        stays as it is.

        Args:
            repo_id: ``"USER/NAME"``, or ``"NAME"`` in your own namespace; created if it does not exist.
            commit_message: of the commit or the pull request.
            private: whether a new repository is private.
            token: access token of the Hub; None takes the stored one.
            create_pr: open a pull request instead of a commit to the branch.
            safe_serialization: False writes pickles, which hfgen does not load.
            variant: suffix of the weight files, such as ``"fp16"``; the dtype is that of the model.
            subfolder: folder of the repository, for a model inside a pipeline.
            revision: branch, which is created if it does not exist.
            max_shard_size: weights are split into files of at most this size.
            with_pipeline_file: add a ``pipeline.py`` of one line, with which plain
                ``DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`` loads.

        Raises:
            OSError: the Hub refused or cannot be reached.
        """
        repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
            )
            if subfolder is None:
                write_short_card(Path(folder), repo_id)
            if with_pipeline_file:
                write_pipeline_file(Path(folder))
            return publish(
                folder,
                repo_id,
                revision=revision,
                create_pr=create_pr,
                path_in_repo=subfolder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
            )

    def _upload_folder(
        self,
        working_dir: str | PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        # save_pretrained(..., push_to_hub=True) of diffusers ends here, with the card of diffusers in the folder.
        if subfolder is None:
            write_short_card(Path(working_dir), repo_id)
        return publish(
            working_dir,
            repo_id,
            create_pr=create_pr,
            path_in_repo=subfolder,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            token=token,
        )


def write_pipeline_file(folder: Path) -> None:
    """Add the module with which ``DiffusionPipeline`` of diffusers finds the class of a saved pipeline.

    Raises:
        ValueError: the folder holds no pipeline of hfgen.
    """
    index = folder / "model_index.json"
    class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else None
    if class_name not in hfgen.__all__:
        raise ValueError(f"{folder} holds no pipeline of hfgen, so there is no {PIPELINE_FILE} to write for it.")
    (folder / PIPELINE_FILE).write_text(f"from hfgen import {class_name}\n", encoding="utf-8")


def _create_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _name_repository(folder: Path, repo_id: str) -> None:
    """A card that was written before the repository had a name gets the name."""
    card = folder / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if PLACEHOLDER in text:
            card.write_text(text.replace(PLACEHOLDER, repo_id), encoding="utf-8")


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt can succeed: the network or the Hub failed, not the request."""
    if isinstance(error, RuntimeError):  # what huggingface_hub wraps the error of one file in
        return error.__cause__ is None or _is_transient(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in _TRANSIENT_STATUS
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError)) and not isinstance(
        error, OfflineModeIsEnabled
    )


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
