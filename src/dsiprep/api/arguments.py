"""Checks of what a caller hands to the library: arrays, affines, gradient tables, encodings, settings, sidecars.

Every problem raises InputError with what was found, what is wanted and what to do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.errors import InputError
from dsiprep.io.files import read_json
from dsiprep.io.sidecar_values import clean_metadata

__all__ = [
    "Array",
    "check_affine",
    "check_bvals",
    "check_bvecs",
    "check_phase_encoding",
    "check_series",
    "check_type",
    "read_sidecar",
]

Array = np.ndarray | torch.Tensor
UNIT_LENGTH = 0.05  # largest deviation of the length of a b-vector from 1
T = TypeVar("T")


def check_series(data: Any, name: str = "data") -> Array:
    """A series (i, j, k, n) of real intensities, at least one of which is not zero."""
    if isinstance(data, str | os.PathLike):
        raise InputError(f"{name} is a path, {data}; give the array: nibabel.load({str(data)!r}).get_fdata()")
    if not isinstance(data, np.ndarray | torch.Tensor):
        kind = type(data).__name__
        hint = "; give its array: image.get_fdata()" if hasattr(data, "get_fdata") else ""
        raise InputError(f"{name} is a {kind}; a NumPy array or a torch tensor is wanted{hint}")
    if data.ndim != 4:
        raise InputError(f"{name} has {data.ndim} dimensions; four are wanted: i, j, k and volume")
    if np.iscomplexobj(data) if isinstance(data, np.ndarray) else data.is_complex():
        raise InputError(f"{name} is complex; give magnitudes: abs({name})")
    if 0 in data.shape:
        raise InputError(f"{name} is empty, with shape {tuple(data.shape)}; give at least one voxel and one volume")
    if not bool((data != 0).any()):
        raise InputError(f"{name} is zero everywhere; check how it was loaded")
    return data


def check_affine(affine: Any, shape: tuple[int, ...]) -> Grid:
    """The grid of a series of this shape; `affine` (4, 4) maps voxels to world RAS+ mm."""
    matrix = np.asarray(affine, float)
    if matrix.shape != (4, 4):
        raise InputError(f"affine has shape {matrix.shape}; (4, 4) is wanted, such as nibabel's image.affine")
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
        raise InputError("affine cannot be inverted; give the map from voxels to world RAS+ mm of the image")
    if not np.allclose(matrix[3], [0, 0, 0, 1]):
        raise InputError(f"the last row of affine is {matrix[3].tolist()}; 0 0 0 1 is wanted: is it transposed?")
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), matrix)


def check_bvals(bvals: Any, n: int, b0_threshold: float) -> np.ndarray:
    """One b-value (s/mm²) per volume, (n,), at least one of them not above the threshold."""
    values = np.asarray(bvals, float).ravel()
    if len(values) != n:
        raise InputError(f"there are {len(values)} b-values for {n} volumes; give one for each volume")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError("bvals has negative or non-finite values; correct them")
    if values.min() > b0_threshold:
        raise InputError(f"no volume has b <= {b0_threshold:g}, the lowest is {values.min():g}; raise b0_threshold")
    return values


def check_bvecs(bvecs: Any, bvals: np.ndarray, b0_threshold: float) -> np.ndarray:
    """b-vectors (n, 3) from (n, 3) or (3, n), of unit length where b is above the threshold."""
    n, table = len(bvals), np.asarray(bvecs, float)
    table = table.T if table.shape == (3, n) and n != 3 else table
    if table.shape != (n, 3):
        raise InputError(f"bvecs has shape {table.shape}; ({n}, 3) or (3, {n}) is wanted for {n} volumes")
    weighted = bvals > b0_threshold
    if not np.isfinite(table[weighted]).all():
        raise InputError("bvecs of volumes above the b=0 threshold have non-finite values; correct them")
    length = np.linalg.norm(table, axis=1)
    wrong = np.flatnonzero(weighted & (np.abs(length - 1) > UNIT_LENGTH))
    if len(wrong):
        raise InputError(
            f"the b-vector of volume {wrong[0]} has length {length[wrong[0]]:.3g} at b = {bvals[wrong[0]]:g}; unit "
            "length is wanted: scale b-values, not b-vectors, and raise b0_threshold if the volume is a b=0"
        )
    return np.nan_to_num(table)


def check_phase_encoding(direction: Any, name: str = "phase_encoding") -> PhaseEncoding | None:
    """A phase encoding as BIDS writes it; None stays None."""
    if direction is None:
        return None
    if not isinstance(direction, str) or not re.fullmatch(r"[ijk]-?", direction):
        raise InputError(
            f"{name} is {direction!r}; BIDS' PhaseEncodingDirection is wanted, a voxel axis with the sign of its "
            "direction: i, i-, j, j-, k or k- (nibabel.aff2axcodes(affine) says which anatomical axis each one is)"
        )
    return PhaseEncoding.from_bids(direction)


def check_type(value: T, kind: type[T], name: str) -> T:
    """`value` itself where it is of the right type."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {type(value).__name__}; {kind.__name__} is wanted, as in {name}={kind.__name__}()")
    return value


def read_sidecar(path: Path) -> dict[str, Any]:
    """The fields of a JSON sidecar as they are meant; none if there is no such file."""
    if not path.exists() and not path.is_symlink():
        return {}
    return clean_metadata(read_json(path), path.name)[0]
