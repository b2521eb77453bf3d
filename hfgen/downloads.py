"""Downloads from the Hub whose every byte is compared with what the Hub says the file is."""

from __future__ import annotations

import hashlib
import re
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm  # has the switches of huggingface_hub: HF_HUB_DISABLE_PROGRESS_BARS and others

_CHUNK = 2**22  # bytes


def download_file(
    repo_id: str,
    path: str,
    *,
    revision: str = "main",
    sha256: str | None = None,
    cache_dir: str | PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """One file of a model repository, in the cache of huggingface_hub.

    Args:
        repo_id: ``"USER/NAME"``.
        path: inside the repository.
        revision: branch, tag or commit.
        sha256: expected, beside the size and the sha256 that the Hub names for the file.
        cache_dir: folder of downloaded files; None is that of huggingface_hub.
        token: access token of the Hub; None takes the stored one.
        local_files_only: use only what was downloaded before.
        force_download: download again what is in the cache.

    Raises:
        OSError: there is no such file, or the Hub cannot be reached.
        ValueError: what arrived is not the file; it is deleted.
    """
    size = None
    try:
        if not local_files_only:
            metadata = get_hf_file_metadata(hf_hub_url(repo_id, path, revision=revision), token=token)
            size = metadata.size
            # The tag of a large file is its sha256; that of a small one is a git hash of 40 digits.
            sha256 = sha256 or (metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None)
        file = hf_hub_download(
            repo_id,
            path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except HTTPError as error:
        raise _unreachable(repo_id, error) from error
    check_file(Path(file), size=size, sha256=sha256)
    return Path(file)


def download_repository(
    repo_id: str,
    *,
    output: str | PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """All files of a model repository, in ``output`` or in the cache of huggingface_hub.

    Raises:
        OSError: there is no such repository or revision, or the Hub cannot be reached.
        ValueError: a file is not what the Hub says it is; it is deleted.
    """
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        folder = Path(snapshot_download(repo_id, revision=revision, local_dir=output, token=token))
    except HTTPError as error:
        raise _unreachable(repo_id, error) from error
    for file in info.siblings:
        sha256 = file.lfs.sha256 if file.lfs else None
        check_file(folder / file.rfilename, size=file.size, sha256=sha256, git_oid=None if sha256 else file.blob_id)
    return folder


def check_file(path: Path, *, size: int | None, sha256: str | None, git_oid: str | None = None) -> None:
    """Compare a file with its size and hash, each of which may be unknown.

    Raises:
        ValueError: they differ; the file is deleted, so that the next attempt downloads it again.
    """
    found = path.stat().st_size
    if size is not None and found != size:
        _reject(path, f"it has {found} bytes instead of {size}")
    for expected, digest in ((sha256, hashlib.sha256()), (git_oid, hashlib.sha1(b"blob %d\0" % found))):
        if expected is None:
            continue
        with (
            path.open("rb") as file,
            tqdm(total=found, unit="B", unit_scale=True, desc=f"checking {path.name}") as bar,
        ):
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != expected:
            _reject(path, f"its {digest.name} is {digest.hexdigest()} instead of {expected}")


def _reject(path: Path, reason: str) -> None:
    path.resolve().unlink()  # in the cache the name is a link to the content
    path.unlink(missing_ok=True)
    raise ValueError(f"The download of {path.name} is damaged: {reason}. It was deleted; run the same again.")


def loading_reason(error: BaseException) -> str:
    """Why a folder or repository was not read; diffusers reports a Hub that cannot be reached as a missing file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "the Hub cannot be reached, and it was not downloaded before"
        cause = cause.__cause__ or cause.__context__
    return str(error).removesuffix(".")


def _unreachable(repo_id: str, error: Exception) -> OSError:
    if isinstance(error, HfHubHTTPError):  # an OSError already, with what the Hub said
        return error
    return ConnectionError(f"The Hub cannot be reached for {repo_id}: {error}")
