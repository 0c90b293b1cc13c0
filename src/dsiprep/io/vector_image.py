"""Images of vectors in NIfTI: one vector of three numbers per voxel, as warps are kept.

What the numbers mean is told by the formats: `io.itk`, `io.freesurfer`, `io.fsl`.
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
    "FREESURFER_CODE",
    "SHARE",
    "VectorImage",
    "absolute_or_displacement",
    "distance_from_identity",
    "finite",
    "read_vectors",
    "write_vectors",
]

FREESURFER_CODE = 14  # of the header extension in which FreeSurfer keeps geometries
SHARE = 0.6  # one reading of the values must fit this much better than the other to be taken


@dataclass(frozen=True, eq=False)
class VectorImage:
    """Three numbers per voxel, and what the header says of them.

    Attributes
    ----------
    data : ndarray, (3, i, j, k), float32
    grid : Grid
    axes : int
        Of the array in the file: 5 as NIfTI wants it for vectors, or 4.
    intent : int
        NIfTI's intent code; 0 where there is none.
    extension : bytes
        FreeSurfer's header extension, empty where there is none.
    description : str
        The header's text.
    path : Path
        Where it came from, for messages.
    """

    data: np.ndarray
    grid: Grid
    axes: int
    intent: int
    extension: bytes
    description: str
    path: Path


def read_vectors(path: Path | str, instead: Grid | None = None) -> VectorImage:
    """An image of (i, j, k, 1, 3) or (i, j, k, 3) voxels.

    Parameters
    ----------
    path : Path
    instead : Grid, optional
        Taken where the header does not say where the voxels are, if it has as many.

    Raises
    ------
    InputError
        If the file cannot be read, has another shape, does not say where its voxels are, or holds values that are not
        numbers.
    """
    path = Path(path)
    image = open_nifti(path)
    shape = tuple(int(n) for n in image.shape)
    if shape[3:] not in ((1, 3), (3,)) or 0 in shape or image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: {' x '.join(map(str, shape))} voxels of type {image.get_data_dtype()}; a warp has three real "
            "numbers per voxel: i x j x k x 1 x 3, or i x j x k x 3"
        )
    try:
        data = np.asarray(image.dataobj, np.float32).reshape(*shape[:3], 3)
    except (OSError, ValueError, EOFError) as problem:
        raise InputError(f"{path}: the file is truncated ({problem}); copy or convert it again") from None
    finite(data, path)
    extension = b"".join(e.get_content() for e in image.header.extensions if e.get_code() == FREESURFER_CODE)
    header = image.header
    description = header["descrip"].tobytes().split(b"\0")[0].decode("latin-1")
    placed = int(header["sform_code"]) or int(header["qform_code"])
    if not placed and (instead is None or instead.shape != shape[:3]):
        raise InputError(
            f"{path}: the header does not say where the voxels are (sform and qform codes are 0); name an image of "
            "the same voxels with --reference"
        )
    grid = grid_of(image, path) if placed or instead is None else instead
    data = np.ascontiguousarray(np.moveaxis(data, 3, 0))
    return VectorImage(data, grid, len(shape), int(header["intent_code"]), extension, description, path)


def write_vectors(path: Path | str, data: np.ndarray, grid: Grid, intent: int, extension: bytes = b"") -> None:
    """Vectors as i x j x k x 1 x 3 voxels of float32, all of the file or nothing.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    data : ndarray, (3, i, j, k)
    grid : Grid
    intent : int
        NIfTI's intent code.
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
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nib.save(image, beside)
        beside.replace(path)
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror}; make room or check the rights, then run again") from None
    finally:
        beside.unlink(missing_ok=True)


def finite(data: np.ndarray, path: Path) -> None:
    """Raise `InputError` where values are not numbers."""
    bad = int((~np.isfinite(data)).sum())
    if bad:
        raise InputError(f"{path}: {bad} values are not numbers (NaN or infinite); make the warp again")


def absolute_or_displacement(values: np.ndarray, points: np.ndarray) -> str | None:
    """Whether a warp holds the places it leads to or the way there, by how its values grow along the image.

    The places of a map grow like the points themselves, a displacement hardly. The best linear fit of the values to the
    points is compared with both; zeros are left out, as background.

    Parameters
    ----------
    values, points : ndarray, (3, ...)
        The warp, and the voxels' own places in the same frame.

    Returns
    -------
    str or None
        "absolute", "displacement", or None where neither fits clearly: maps turned by more than about 45 degrees.
    """
    used = (values.reshape(3, -1) != 0).any(axis=0)
    if not used.any():
        return "displacement"
    values, points = values.reshape(3, -1)[:, used], points.reshape(3, -1)[:, used]
    to_absolute = distance_from_identity(values, points)
    to_displacement = distance_from_identity(values + points, points)
    if to_absolute < SHARE * to_displacement:
        return "absolute"
    return "displacement" if to_displacement < SHARE * to_absolute else None


def distance_from_identity(places: np.ndarray, points: np.ndarray) -> float:
    """How far the linear part of a map (3, ...) -> (3, ...) is from the identity, as a norm; shifts do not count."""
    change = (places.reshape(3, -1) - points.reshape(3, -1)).astype(float)
    points = points.reshape(3, -1).astype(float)
    change, points = (x - x.mean(axis=1, keepdims=True) for x in (change, points))
    return float(np.linalg.norm(np.linalg.lstsq(points.T, change.T, rcond=None)[0]))
