"""Read and write NIfTI images with one 3-vector per voxel, the container of warps.

The meaning of the vectors depends on the format; see `io.itk`, `io.freesurfer` and `io.fsl`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.errors import InputError, OutputError
from dsiprep.io.nifti import grid_of, open_nifti

__all__ = [
    "DECISIVE_RATIO",
    "FREESURFER_CODE",
    "VectorImage",
    "absolute_or_displacement",
    "check_finite",
    "distance_from_identity",
    "read_vectors",
    "write_vectors",
]

FREESURFER_CODE = 14  # header extension code of FreeSurfer's geometries
DECISIVE_RATIO = 0.6  # the better interpretation of the values must have a misfit below this fraction of the other's


@dataclass(frozen=True, eq=False)
class VectorImage:
    """One 3-vector per voxel, with its header information.

    Attributes
    ----------
    data : ndarray, (3, i, j, k), float32
    grid : Grid
    axes : int
        Number of dimensions of the array in the file: 5, as the NIfTI standard requires for vectors, or 4.
    intent : int
        NIfTI intent code; 0 if there is none.
    extension : bytes
        FreeSurfer's header extension; empty if there is none.
    description : str
        `descrip` field of the header.
    path : Path
        File it was read from, for error messages.
    """

    data: np.ndarray
    grid: Grid
    axes: int
    intent: int
    extension: bytes
    description: str
    path: Path


def read_vectors(path: Path | str, fallback_grid: Grid | None = None) -> VectorImage:
    """Read a vector image of shape (i, j, k, 1, 3) or (i, j, k, 3).

    Parameters
    ----------
    path : Path
    fallback_grid : Grid, optional
        Used if the header has no orientation (sform and qform codes are 0) and the shape matches.

    Raises
    ------
    InputError
        If the file cannot be read, has another shape, has no orientation, or contains NaN or infinite values.
    """
    path = Path(path)
    image = open_nifti(path)
    shape = tuple(int(n) for n in image.shape)
    if shape[3:] not in ((1, 3), (3,)) or 0 in shape or image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: {' x '.join(map(str, shape))} voxels of type {image.get_data_dtype()}; expected a warp, with "
            "three real numbers per voxel: i x j x k x 1 x 3, or i x j x k x 3"
        )
    try:
        data = np.asarray(image.dataobj, np.float32).reshape(*shape[:3], 3)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: the file is truncated ({error}); copy or convert it again") from None
    check_finite(data, path)
    extension = b"".join(e.get_content() for e in image.header.extensions if e.get_code() == FREESURFER_CODE)
    header = image.header
    description = header["descrip"].tobytes().split(b"\0")[0].decode("latin-1")
    oriented = int(header["sform_code"]) or int(header["qform_code"])
    if not oriented and (fallback_grid is None or fallback_grid.shape != shape[:3]):
        raise InputError(
            f"{path}: the header has no orientation (sform and qform codes are 0); give an image on the same voxel "
            "grid with --reference"
        )
    grid = grid_of(image, path) if oriented or fallback_grid is None else fallback_grid
    data = np.ascontiguousarray(np.moveaxis(data, 3, 0))
    return VectorImage(data, grid, len(shape), int(header["intent_code"]), extension, description, path)


def write_vectors(path: Path | str, data: np.ndarray, grid: Grid, intent: int, extension: bytes = b"") -> None:
    """Write vectors as float32 of shape (i, j, k, 1, 3).

    The file is written under a temporary name and then renamed, so that it is never incomplete.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    data : ndarray, (3, i, j, k)
    grid : Grid
    intent : int
        NIfTI intent code.
    extension : bytes
        FreeSurfer's header extension.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    image = nib.Nifti1Image(np.moveaxis(np.asarray(data, np.float32), 0, 3)[:, :, :, None, :], None)
    image.set_qform(grid.affine, 1)
    image.set_sform(grid.affine, 1)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm", None)
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(FREESURFER_CODE, extension))
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; free disk space or check permissions, then run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_finite(data: np.ndarray, path: Path) -> None:
    """Raise an InputError if values are NaN or infinite."""
    count = int((~np.isfinite(data)).sum())
    if count:
        raise InputError(f"{path}: {count} values are not numbers (NaN or infinite); create the warp again")


def absolute_or_displacement(values: np.ndarray, points: np.ndarray) -> str | None:
    """Whether a warp contains absolute coordinates or displacements, from the linear trend of its values.

    Absolute coordinates increase across the image like the voxel coordinates themselves; displacements hardly change.
    The linear fit of the values to the voxel coordinates is compared with both. All-zero vectors are background and are
    left out.

    Parameters
    ----------
    values, points : ndarray, (3, ...)
        The warp, and the voxel coordinates in the same frame.

    Returns
    -------
    str or None
        "absolute", "displacement", or None if neither clearly fits, as for rotations of more than about 45 degrees.
    """
    nonzero = (values.reshape(3, -1) != 0).any(axis=0)
    if not nonzero.any():
        return "displacement"
    values, points = values.reshape(3, -1)[:, nonzero], points.reshape(3, -1)[:, nonzero]
    to_absolute = distance_from_identity(values, points)
    to_displacement = distance_from_identity(values + points, points)
    if to_absolute < DECISIVE_RATIO * to_displacement:
        return "absolute"
    return "displacement" if to_displacement < DECISIVE_RATIO * to_absolute else None


def distance_from_identity(mapped: np.ndarray, points: np.ndarray) -> float:
    """Frobenius norm of the linear part of `points` -> `mapped`, both (3, ...), less the identity."""
    change = (mapped.reshape(3, -1) - points.reshape(3, -1)).astype(float)
    points = points.reshape(3, -1).astype(float)
    change, points = (x - x.mean(axis=1, keepdims=True) for x in (change, points))
    return float(np.linalg.norm(np.linalg.lstsq(points.T, change.T, rcond=None)[0]))
