"""Read the bytes of input files: the same sentence for every kind of path that is not a readable file.

Datasets hold links whose content was not fetched (git-annex, DataLad), folders in place of files, and now and then a
named pipe or a link to a device, which would be read forever.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsiprep.errors import InputError, MetadataError

MAX_TEXT_BYTES = 64 * 2**20  # of a sidecar or table; b-tables of 10,000 volumes have 0.5 MB
KERNEL_FOLDERS = ("/proc", "/sys", "/dev")  # their files have no end, or other contents at every read
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path) -> None:
    """Check that a path is a regular file or a link to one, without opening it.

    Raises
    ------
    InputError
        If it does not exist, is a link whose target is missing, or is a folder, pipe, socket or device.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if Path(path).is_symlink():
            raise InputError(
                f"{path}: a link whose target does not exist; fetch its content (datalad get), or remove it"
            ) from None
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else _reason(error)
        raise InputError(f"{path}: {reason}") from None
    for is_kind, name in KINDS:
        if is_kind(mode):
            raise InputError(f"{path}: {name}; expected a file; replace or remove it")
    real = _real_path(Path(path))
    if any(real.startswith(f"{folder}/") for folder in KERNEL_FOLDERS) and not real.startswith("/dev/shm/"):
        raise InputError(f"{path}: a link to {real}, which is not a data file; replace it")


def file_state(path: Path) -> object:
    """Equal for the same path as long as the file or folder does not change; new at each call just after a change.

    Times of file systems are coarse, so a file that changed within the last second may change again unseen.
    """
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < 10**9:
        return object()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _real_path(path: Path) -> str:
    """The path without links; folders are followed once, because a dataset has many files in each."""
    if path.is_symlink():
        return os.path.realpath(path)
    return f"{_real_folder(str(path.parent))}/{path.name}"


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def content_digest(path: Path) -> bytes:
    """SHA-256 of the content of a file. Raises as `check_file`, and an OSError if it cannot be read."""
    check_file(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def read_bytes(path: Path) -> bytes:
    """Content of a file. Raises as `check_file`, and an InputError if it cannot be read."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}; check its permissions") from None


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, with or without byte-order mark, or Latin-1, with any line ends.

    Raises
    ------
    InputError
        As `check_file`, and if the file cannot be read, is too large for text or holds binary data.
    """
    check_file(path)
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}; check its permissions") from None
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than {MAX_TEXT_BYTES // 2**20} MB; expected a small text file")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16", "replace")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
    if "\0" in text:
        raise InputError(f"{path}: binary data; expected text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Fields of a JSON file.

    Raises
    ------
    MetadataError
        If it is missing or unreadable, not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(read_text(path))
    except InputError as error:
        raise MetadataError(str(error)) from None
    except RecursionError:
        raise MetadataError(f"{path}: lists or objects nested too deeply; correct the file") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise MetadataError(f"{path} cannot be read as JSON ({reason}); correct the file") from None
    if not isinstance(content, dict):
        raise MetadataError(f"{path} holds a {type(content).__name__}; expected a JSON object, {{...}}")
    return content


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
