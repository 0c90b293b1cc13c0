"""Read a table of gradients at which a series is to be evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.errors import GradientError
from dsiprep.io.number_tables import read_numbers

__all__ = ["NAMED", "read_q_grid"]

NAMED = ("none", "acquired", "dsi257", "dsi515")  # of --q-grid; anything else is a file
UNIT = 0.02  # by which the length of a b-vector may differ from 1


def read_q_grid(name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """b-values (n,) in s/mm² and unit b-vectors (n, 3) of the file that --q-grid names; None for a named grid.

    The file has one row x y z b per volume in world RAS+ of the output, as MRtrix's `.b`; zero vectors have b=0.

    Raises
    ------
    GradientError
        If there is no such file, or it holds anything else.
    """
    if name in NAMED:
        return None
    path = Path(name)
    if not path.is_file():
        raise GradientError(f"--q-grid {name}: neither a file nor one of {', '.join(NAMED)}")
    table = read_numbers(path)
    if table.shape[1] != 4:
        raise GradientError(f"{path}: {table.shape[1]} columns; --q-grid takes rows of x y z b, in world RAS+")
    bvecs, bvals = table[:, :3], table[:, 3]
    length = np.linalg.norm(bvecs, axis=1)
    if not np.isfinite(table).all() or (bvals < 0).any():
        raise GradientError(f"{path}: values that are not finite, or negative b-values; correct the table")
    if ((np.abs(length - 1) > UNIT) & (bvals > 0)).any():
        raise GradientError(f"{path}: b-vectors that are not of unit length although b > 0; correct the table")
    return bvals, np.where(bvals[:, None] > 0, bvecs / np.where(length > 0, length, 1)[:, None], 0.0)
