"""Read text tables of numbers as scanners, converters and editors write them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from dsiprep.errors import GradientError, InputError
from dsiprep.io.files import read_text


def read_numbers(path: Path) -> np.ndarray:
    """Numbers of a text table, (rows, columns); NaN and infinity are passed on.

    Numbers are separated by spaces, tabs, commas or semicolons, rows by any line ends; `#` starts a comment.

    Raises
    ------
    GradientError
        If the file is missing, unreadable, empty, or not a table of numbers.
    """
    try:
        text = read_text(path)
    except InputError as error:
        raise GradientError(f"{error}; every diffusion-weighted series needs a .bval and a .bvec") from None
    try:
        return _parsed(text).copy()
    except ValueError as error:
        raise GradientError(f"{path}: {error}; convert the series again") from None


@lru_cache(maxsize=64)
def _parsed(text: str) -> np.ndarray:
    """Numbers of a text, which many subjects of a study share. Raises a ValueError with the reason."""
    lines = [line.partition("#")[0].replace(",", " ").replace(";", " ").split() for line in text.split("\n")]
    try:
        rows = [[float(word) for word in words] for words in lines if words]
    except ValueError as error:
        reason = str(error) if len(str(error)) < 80 else f"{str(error)[:77]}..."
        raise ValueError(f"not a table of numbers ({reason})") from None
    if not rows or len({len(row) for row in rows}) != 1:
        found = "empty" if not rows else "rows of different length"
        raise ValueError(f"{found}; expected a table of numbers")
    return np.array(rows)
