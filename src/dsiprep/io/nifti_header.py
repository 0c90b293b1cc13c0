"""Read and check NIfTI headers without the voxels: shape, voxel grid, and whether sform and qform agree."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.errors import InputError
from dsiprep.io.files import check_file, file_state

FIRST_HEADER_BYTES, HEADER_BYTES = 348, 540  # of NIfTI-1 and NIfTI-2
MAX_AXIS = 2**20  # voxels along an axis; the largest images have some thousands
SAME_SIZE = 0.01  # fraction by which voxel sizes of sform, qform and pixdim differ by rounding at most
SAME_PLACE_MM = 0.1  # by which the corners of sform and qform differ by rounding at most


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    Attributes
    ----------
    shape : tuple of int
        Voxels along each axis, without trailing axes of one voxel beyond the third.
    dtype : dtype
        Of the stored voxels.
    data_start, data_end : int
        First byte of the voxels, and the first after them, uncompressed.
    grid : Grid or None
        None if the header has no orientation.
    note : str
        On differing sform and qform; empty if they agree.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    data_start: int
    data_end: int
    grid: Grid | None
    note: str = ""


def read_header(path: Path) -> Header:
    """Read and check the header of a NIfTI file from its first bytes.

    Raises
    ------
    InputError
        If the file is missing or not NIfTI, or the header is damaged or contradicts itself.
    """
    path = Path(path)
    check_file(path)
    return _header_of(path, file_state(path))


@lru_cache(maxsize=2**16)  # images of a large cohort; a header takes about a kilobyte
def _header_of(path: Path, state: object) -> Header:
    """The header of a file in this state: a plan asks for each several times."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged_stream(error, path) from None
    return parse_header(head, path)


def damaged_stream(error: BaseException, path: Path) -> InputError:
    """The error for a compressed file that cannot be decompressed."""
    return InputError(
        f"{path}: the compressed file is truncated or damaged ({first_line(error)}); copy or convert it again"
    )


def parse_header(content: bytes, path: Path) -> Header:
    """Check the header in the first bytes of a file. Raises as `read_header`."""
    try:
        size = nifti_class(content).header_class.sizeof_hdr
        header: Any = nifti_class(content).header_class(content[:size], check=False)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = float(header["vox_offset"])
        header.get_slope_inter()
    except Exception as error:  # nibabel raises many types
        raise InputError(f"{path}: not readable as NIfTI ({first_line(error)}); convert it again") from None
    if len(shape) < 3 or not all(1 <= n <= MAX_AXIS for n in shape):
        raise InputError(f"{path}: an image of {shape_text(shape)} voxels; expected a 3-D or 4-D image")
    if not math.isfinite(offset) or not 0 <= offset < 2**31:
        raise InputError(f"{path}: the header places the voxels at byte {offset:g}; convert the image again")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    grid, note = _grid(header, (shape[0], shape[1], shape[2]), path)
    return Header(shape, dtype, int(offset), int(offset) + math.prod(shape) * dtype.itemsize, grid, note)


def check_extent(header: Header, available: int, path: Path) -> None:
    """Raise an InputError unless the voxels lie behind the header and within a file of `available` bytes."""
    if header.data_start < FIRST_HEADER_BYTES:
        raise InputError(
            f"{path}: the header places the voxels at byte {header.data_start}, within itself; convert the image again"
        )
    if available < header.data_end:
        raise InputError(
            f"{path}: the file is truncated: {header.data_end:,} bytes are needed for "
            f"{shape_text(header.shape)} voxels, and there are {available:,}; copy or convert it again"
        )


def read_grid(path: Path) -> Grid:
    """Voxel grid of an image. Raises as `read_header`, and if it has no orientation."""
    return oriented(read_header(path), path)


def oriented(header: Header, path: Path) -> Grid:
    """The grid of a header; raises an InputError if it has no orientation."""
    if header.grid is None:
        raise InputError(
            f"{path}: the header has no orientation (sform and qform codes are 0), so left and right cannot "
            "be distinguished; convert the image again from DICOM"
        )
    return header.grid


def check_kind(header: Header, path: Path, kind: str = "image") -> None:
    """Check that an image has real-valued voxels and the dimensions of its kind.

    Parameters
    ----------
    header : Header
    path : Path
    kind : str
        "image" (3-D or 4-D), "series" (4-D) or "volume" (3-D).

    Raises
    ------
    InputError
    """
    shape = header.shape
    if len(shape) > 4:
        raise InputError(f"{path}: an image of {shape_text(shape)} voxels; expected a 3-D or 4-D image")
    if header.dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are of type {header.dtype}; expected real numbers")
    if kind == "series" and len(shape) == 3:
        raise InputError(
            f"{path}: a single volume of {shape_text(shape)} voxels; expected a diffusion-weighted series (4-D); "
            "convert the whole series, or exclude this file with --bids-filter-file"
        )
    if kind == "volume" and len(shape) == 4:
        raise InputError(f"{path}: {shape[3]} volumes; expected a single 3-D image")


def read_shape(path: Path) -> tuple[int, ...]:
    """Image shape, (i, j, k) or (i, j, k, n)."""
    return read_header(path).shape


def read_spacing(path: Path) -> tuple[float, float, float]:
    """Voxel size in mm."""
    i, j, k = read_grid(path).voxel_sizes
    return float(i), float(j), float(k)


def count_volumes(path: Path, unreadable: int) -> int:
    """Number of volumes, or `unreadable` for invalid files, whose errors are raised on reading."""
    try:
        shape = read_shape(path)
    except InputError:
        return unreadable
    return shape[3] if len(shape) > 3 else 1


def nifti_class(content: bytes) -> Any:
    """nibabel's image class for the first bytes of a file; raises a ValueError if they are not of a NIfTI file."""
    sizes = {struct.unpack(order + "i", content[:4])[0] for order in "<>"} if len(content) >= 4 else set()
    for size, image in ((540, nib.Nifti2Image), (348, nib.Nifti1Image)):
        if size in sizes:
            if len(content) < size:
                raise ValueError("the header is truncated")
            return image
    raise ValueError("it does not start with a NIfTI header" if content else "the file is empty")


def _grid(header: Any, shape: tuple[int, int, int], path: Path) -> tuple[Grid | None, str]:
    """Grid of a header and a note, or None without orientation.

    The sform is taken where there is one, as in nibabel, FSL and SPM; the qform and the voxel sizes have to agree.
    """
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        return None, ""
    sizes = np.array([float(size) for size in header["pixdim"][1:4]])
    sform, qform = np.asarray(header.get_sform(), float) if has_sform else None, None
    note = ""
    if has_qform:
        try:
            qform = np.asarray(header.get_qform(), float)
        except Exception as error:  # nibabel raises many types
            if sform is None:
                raise InputError(f"{path}: the qform is invalid ({first_line(error)}); convert it again") from None
            note = f"{path.name}: the qform is invalid; the sform was taken."
    affine = sform if sform is not None else qform
    assert affine is not None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the header's affine is singular; convert the image again from DICOM")
    grid = Grid(shape, affine)
    if sform is not None and sizes.any():
        _check_sizes(grid.voxel_sizes, sizes, path)
    if sform is not None and qform is not None:
        note = _difference(grid, qform, path.name)
    return grid, note


def _check_sizes(of_sform: np.ndarray, of_header: np.ndarray, path: Path) -> None:
    """Raise an InputError if the voxel sizes of the sform differ from those of pixdim, which are those of the qform."""
    if not np.isfinite(of_header).all() or (np.abs(of_sform - np.abs(of_header)) > SAME_SIZE * of_sform).any():
        raise InputError(
            f"{path}: the header gives voxels of {_sizes(of_sform)} mm in its sform but {_sizes(of_header)} mm in "
            "pixdim (the qform), so the size of the head is unknown; convert the image again, or correct the header"
        )


def _difference(grid: Grid, qform: np.ndarray, name: str) -> str:
    """Note on how far the corners of the image are apart by sform and qform; empty if it is by rounding."""
    last = np.array(grid.shape) - 1
    corners = np.array([[i, j, k] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])], float)
    by_qform = corners @ qform[:3, :3].T + qform[:3, 3]
    distance = float(np.linalg.norm(grid.to_world(corners) - by_qform, axis=1).max())
    if not distance > SAME_PLACE_MM:
        return ""
    return (
        f"{name}: sform and qform place the image up to {distance:.1f} mm apart; the sform was taken, as in nibabel, "
        "FSL and SPM. If the coregistration fails, convert the image again from DICOM."
    )


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def shape_text(shape: tuple[int, ...]) -> str:
    """Format a shape as "4 x 5 x 3"."""
    return " x ".join(str(n) for n in shape)


def first_line(error: BaseException) -> str:
    """First line of an error message, or the type of an error without one."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
