"""Programs that people may own: found, told apart by version, run with their output in a log, failures explained."""

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

__all__ = ["Workplace", "find", "require", "require_memory", "run", "threads", "workplace"]

LAST_LINES = 6  # of a log, in the sentence about a failure
GB = 1e9
EXPLAINED = {  # what programs print, in lower case, and what it means
    "too many resources requested for launch": "the GPU has too few registers for this build of the program",
    "out of memory": "the memory of the GPU did not suffice",
    "cuda_error_out_of_memory": "the memory of the GPU did not suffice",
    "oom when allocating": "the memory did not suffice",
    "bad_alloc": "the memory did not suffice",
    "failed to allocate memory": "the memory did not suffice",
    "no kernel image is available": "this build of the program does not know the GPU",
    "no cuda-capable device": "the program found no GPU",
    "cuda driver version is insufficient": "the GPU's driver is older than the program wants",
    "license file": "the program misses its licence file",
    "no space left on device": "the disk is full",
}


def find(name: str, variable: str) -> Path | None:
    """A program by its name.

    Parameters
    ----------
    name : str
        "antsRegistration".
    variable : str
        Environment variable that may name the folder where the package lies (with or without a bin/ in it), or
        the program itself. It goes before PATH.

    Returns
    -------
    Path or None
    """
    named = os.environ.get(variable)
    if named:
        place = Path(named)
        for candidate in (place / "bin" / name, place / name, place):
            if candidate.name == name and candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    found = shutil.which(name)
    return Path(found) if found else None


def require(name: str, variable: str, package: str, option: str) -> Path:
    """As `find`.

    Raises
    ------
    EngineError
        If the program is not there.
    """
    path = find(name, variable)
    if path is None:
        raise EngineError(
            f"{option}: {name} of {package} is neither in the folder that {variable} names nor on PATH; install "
            f"{package}, set {variable} to where it lies, or take the native engine, which needs nothing"
        )
    return path


def require_memory(needed: float, who: str, option: str) -> None:
    """Say at once that memory will not do.

    Parameters
    ----------
    needed : float
        Bytes.
    who : str
        What needs them.
    option : str
        The option that asked for it.

    Raises
    ------
    EngineError
        If less than that is free.
    """
    free = free_bytes(torch.device("cpu"))
    if free < needed:
        raise EngineError(
            f"{option}: {who} needs about {needed / GB:.0f} GB of memory, and {free / GB:.1f} GB are free; run fewer "
            "subjects at once, give the job more memory, or take the native engine"
        )


def threads() -> dict[str, str]:
    """Environment that holds OpenMP and ITK to as many threads as torch was given."""
    count = str(torch.get_num_threads())
    return {"OMP_NUM_THREADS": count, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": count}


@dataclass(frozen=True)
class Workplace:
    """Where a program works.

    Attributes
    ----------
    folder : Path
        For its files; removed at the end.
    logs : Path or None
        Where its output stays for people to read; None where there is no such place.
    """

    folder: Path
    logs: Path | None


@contextmanager
def workplace(name: str, inside: Path | None) -> Iterator[Workplace]:
    """An empty folder for the files of a program: in `inside`, whose disk has room for large files, where it is given.

    Logs are kept beside it, in `inside`; without it only their last lines reach people, in the sentence of an error.
    """
    if inside is not None:
        inside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=inside))
    try:
        yield Workplace(folder, inside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    command: Sequence[str | Path],
    place: Workplace,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    fine: tuple[int, ...] = (0,),
) -> str:
    """Run a program to its end.

    Parameters
    ----------
    command : sequence of str or Path
        The program and its arguments; no shell is between.
    place : Workplace
        It runs in `place.folder`; what it prints goes to `<name>.log`.
    environment : mapping, optional
        Added to that of this process.
    name : str, optional
        What to call it; the program's own name by default.
    fine : tuple of int
        Exit statuses that mean that all went well.

    Returns
    -------
    str
        What it printed.

    Raises
    ------
    EngineError
        If it cannot be started, or ends with another exit status: with the reason, as far as its output
        tells, and its last lines.
    """
    words = [str(word) for word in command]
    name = name or Path(words[0]).name
    log = (place.logs or place.folder) / f"{name}.log"
    surroundings = {**os.environ, **threads(), **(environment or {})}
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(words)}\n".encode())
        stream.flush()
        start = stream.tell()
        try:
            ended = subprocess.run(
                words, cwd=place.folder, env=surroundings, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        except OSError as problem:
            raise EngineError(f"{name} cannot be started ({problem.strerror}); install it again: {words[0]}") from None
    with log.open("rb") as stream:
        stream.seek(start)
        printed = stream.read().decode(errors="replace")
    if ended.returncode not in fine:
        where = f" The whole output is in {log}." if place.logs else ""
        raise EngineError(f"{name} {_how(ended.returncode, printed)}.{where}{_last_lines(printed)}")
    return printed


def _how(status: int, printed: str) -> str:
    """The exit status in words, and the reason where the output tells a known one."""
    known = next((why for said, why in EXPLAINED.items() if said in printed.lower()), None)
    if status < 0:
        stopped = f"was stopped by {signal.Signals(-status).name}"
        known = known or ("most likely the memory did not suffice" if -status == signal.SIGKILL else None)
    else:
        stopped = f"ended with exit status {status}"
    return f"{stopped}: {known}" if known else stopped


def _last_lines(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return f" It last said: {' / '.join(lines[-LAST_LINES:])}" if lines else ""
