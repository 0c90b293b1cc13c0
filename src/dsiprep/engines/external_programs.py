"""Third-party programs: locate them, check requirements, run them with a log, and explain failures."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsiprep.device import free_bytes
from dsiprep.errors import EngineError

__all__ = ["WorkingDirectory", "find", "require", "require_memory", "run", "thread_environment", "working_directory"]

LAST_LINES = 6  # of the output that an error message quotes
GB = 1e9
FAILURE_REASONS = {  # text in a program's output, in lower case, and what it means
    "too many resources requested for launch": "the GPU has too few registers for this build of the program",
    "out of memory": "the GPU ran out of memory",
    "cuda_error_out_of_memory": "the GPU ran out of memory",
    "oom when allocating": "not enough memory",
    "bad_alloc": "not enough memory",
    "failed to allocate memory": "not enough memory",
    "no kernel image is available": "this build of the program does not support the GPU",
    "no cuda-capable device": "the program found no GPU",
    "cuda driver version is insufficient": "the GPU driver is too old for the program",
    "license file": "the program did not find its licence file",
    "no space left on device": "the disk is full",
}


def find(name: str, variable: str) -> Path | None:
    """Path of a program; None if it is not installed.

    Parameters
    ----------
    name : str
        File name of the program, such as "antsRegistration".
    variable : str
        Environment variable with the folder of the package (with or without bin/) or the path of the program itself.
        It takes precedence over PATH.

    Returns
    -------
    Path or None
    """
    setting = os.environ.get(variable)
    if setting:
        location = Path(setting)
        for candidate in (location / "bin" / name, location / name, location):
            if candidate.name == name and candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def require(name: str, variable: str, package: str, option: str) -> Path:
    """Path of a program, as from `find`.

    Raises
    ------
    EngineError
        If the program is not installed.
    """
    path = find(name, variable)
    if path is None:
        raise EngineError(
            f"{option}: {name} of {package} is neither in the folder given by {variable} nor on PATH; install "
            f"{package}, set {variable} to its folder, or use the native engine, which needs no other software"
        )
    return path


def require_memory(needed: float, consumer: str, option: str) -> None:
    """Check that enough memory is free.

    Parameters
    ----------
    needed : float
        Bytes.
    consumer : str
        What needs the memory, for the error message.
    option : str
        Command-line option that selected it, for the error message.

    Raises
    ------
    EngineError
        If less memory is free.
    """
    free = free_bytes(torch.device("cpu"))
    if free < needed:
        raise EngineError(
            f"{option}: {consumer} needs about {needed / GB:.0f} GB of memory, and {free / GB:.1f} GB are free; run "
            "fewer subjects at once, give the job more memory, or use the native engine"
        )


def thread_environment() -> dict[str, str]:
    """Environment variables that limit OpenMP and ITK to the number of threads of torch."""
    count = str(torch.get_num_threads())
    return {"OMP_NUM_THREADS": count, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": count}


@dataclass(frozen=True)
class WorkingDirectory:
    """Working directory of a program.

    Attributes
    ----------
    folder : Path
        For its files; deleted afterwards.
    logs : Path or None
        Where its log is kept; None if it is not kept.
    """

    folder: Path
    logs: Path | None


@contextmanager
def working_directory(name: str, parent: Path | None) -> Iterator[WorkingDirectory]:
    """Create an empty working directory in `parent`, or in the system's temporary folder if that is None.

    With `parent`, whose disk should have room for large files, logs are kept there; otherwise only the last lines of
    the output are reported, in the error message.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        yield WorkingDirectory(folder, parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    command: Sequence[str | Path],
    directory: WorkingDirectory,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    ok_statuses: tuple[int, ...] = (0,),
) -> str:
    """Run a program and wait for it.

    Parameters
    ----------
    command : sequence of str or Path
        The program and its arguments; no shell is involved.
    directory : WorkingDirectory
        The program runs in `directory.folder`; its output is appended to `<name>.log`.
    environment : mapping, optional
        Added to the environment of this process.
    name : str, optional
        Name for the log and for error messages; by default the file name of the program.
    ok_statuses : tuple of int
        Exit statuses that count as success.

    Returns
    -------
    str
        Output of the program.

    Raises
    ------
    EngineError
        If the program cannot be started, or ends with another exit status. The message gives the reason, if the
        output reveals it, and the last lines of the output.
    """
    words = [str(word) for word in command]
    name = name or Path(words[0]).name
    log = (directory.logs or directory.folder) / f"{name}.log"
    full_environment = {**os.environ, **thread_environment(), **(environment or {})}
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(words)}\n".encode())
        stream.flush()
        start = stream.tell()
        try:
            completed = subprocess.run(
                words, cwd=directory.folder, env=full_environment, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"{name} cannot be started ({error.strerror}); reinstall it: {words[0]}") from None
    with log.open("rb") as stream:
        stream.seek(start)
        output = stream.read().decode(errors="replace")
    if completed.returncode not in ok_statuses:
        full_output = f" The full output is in {log}." if directory.logs else ""
        raise EngineError(f"{name} {_failure(completed.returncode, output)}.{full_output}{_last_lines(output)}")
    return output


def _failure(status: int, output: str) -> str:
    """Description of the exit status, with the reason if the output reveals a known one."""
    reason = next((reason for text, reason in FAILURE_REASONS.items() if text in output.lower()), None)
    if status < 0:
        failure = f"was stopped by {signal.Signals(-status).name}"
        reason = reason or ("most likely not enough memory" if -status == signal.SIGKILL else None)
    else:
        failure = f"ended with exit status {status}"
    return f"{failure}: {reason}" if reason else failure


def _last_lines(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f" Last output: {' / '.join(lines[-LAST_LINES:])}" if lines else ""
