"""Numba's compiler with a cache that cannot be stale, wherever a folder can be written.

Numba keys machine code by the file of the compiled function alone, so code inlined from another file would stay as it
was. Here the folder is named after the source of every module that the function's own module reaches.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba

from dsiprep.sources import source_digest

__all__ = ["compiled", "inlined"]

# inlined by LLVM: kernels into whose source functions are copied take up to three times as long to compile
inlined = numba.njit(forceinline=True, fastmath=True)


def compiled(parallel: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that compiles a kernel; `parallel` lets `numba.prange` use all threads.

    Machine code is kept in NUMBA_CACHE_DIR, the user's cache folder or the system's temporary folder, the first that
    can be written, and nowhere if none can.
    """

    def compile_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
        folder = _cache_folder()
        if folder is None:
            return numba.njit(parallel=parallel, fastmath=True)(function)
        before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = str(folder / source_digest(function.__module__)[:16])  # type: ignore[attr-defined]
        try:
            return numba.njit(parallel=parallel, fastmath=True, cache=True)(function)
        finally:  # other packages' kernels stay where they were
            numba.config.CACHE_DIR = before  # type: ignore[attr-defined]

    return compile_kernel


@cache
def _cache_folder() -> Path | None:
    """The first folder that this user alone can write, or None."""
    for folder in _candidates():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError:
            continue
        if sys.platform == "win32" or folder.stat().st_uid == os.getuid():  # machine code of nobody else is run
            return folder
    return None


def _candidates() -> Iterator[Path]:
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given)
    home = Path(os.environ.get("HOME", "/nonexistent"))
    yield Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "dsiprep" / "kernels"
    user = os.getuid() if sys.platform != "win32" else "user"
    yield Path(tempfile.gettempdir()) / f"dsiprep-kernels-{user}"
