"""Read text tables of numbers as scanners, converters and editors write them."""

from __future__ import annotations

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
    lines = [line.partition("#")[0].replace(",", " ").replace(";", " ").split() for line in text.split("\n")]
    try:
        rows = [[float(word) for word in words] for words in lines if words]
    except ValueError as error:
        reason = str(error) if len(str(error)) < 80 else f"{str(error)[:77]}..."
        raise GradientError(f"{path}: not a table of numbers ({reason}); convert the series again") from None
    if not rows or len({len(row) for row in rows}) != 1:
        found = "empty" if not rows else "rows of different length"
        raise GradientError(f"{path}: {found}; expected a table of numbers; convert the series again")
    return np.array(rows)
