"""Read and write NIfTI images, with an error message for every kind of invalid file.

Files are read and decompressed in one step, which is faster than streaming and detects every truncation.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.errors import InputError, OutputError

T = TypeVar("T")
SCANNER, ALIGNED, MNI = 1, 2, 4  # NIfTI's codes for the space of an affine
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"  # no file name or time stamp: equal data, identical files


def read_image(path: Path) -> tuple[np.ndarray, Grid]:
    """Read the voxels and the grid of an image.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`, NIfTI-1 or NIfTI-2, 3-D or 4-D.

    Returns
    -------
    data : ndarray, (i, j, k) or (n, i, j, k), float32
        Scaled intensities, volumes along the first axis.
    grid : Grid

    Raises
    ------
    InputError
        If the file is missing, unreadable, truncated, not real-valued or not 3-D or 4-D, contains NaN or infinite
        values, or has no orientation.
    """
    image = _as_3d_or_4d(open_nifti(path), path)
    grid = grid_of(image, path)
    shape = tuple(int(n) for n in image.shape)
    volumes = shape[3] if len(shape) == 4 else 1
    data = np.empty((volumes, *shape[:3]), np.float32)
    try:
        for v in range(volumes):
            data[v] = image.dataobj[..., v] if len(shape) == 4 else image.dataobj[...]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: the file is truncated ({_first_line(error)}); copy or convert it again") from None
    _check_finite(data, path)
    return (data if len(shape) == 4 else data[0]), grid


def read_series(path: Path) -> tuple[np.ndarray, Grid]:
    """Read a series, (n, i, j, k) float32, and its grid. Raises as `read_image`, and for single volumes."""
    data, grid = read_image(path)
    if data.ndim != 4 or len(data) < 2:
        raise InputError(
            f"{path}: a single volume of {_shape_text(grid.shape)} voxels; expected a diffusion-weighted series (4-D); "
            "convert the whole series, or exclude this file with --bids-filter-file"
        )
    return data, grid


def read_volume(path: Path) -> Volume:
    """Read a single 3-D image, float32. Raises as `read_image`, and for series."""
    data, grid = read_image(path)
    if data.ndim == 4 and len(data) > 1:
        raise InputError(f"{path}: {len(data)} volumes; expected a single 3-D image")
    return Volume(torch.from_numpy(data.reshape(grid.shape)), grid)


def read_shape(path: Path) -> tuple[int, ...]:
    """Image shape from the header, (i, j, k) or (i, j, k, n), without reading the voxels."""
    return _from_header(path, lambda header: tuple(int(n) for n in header.get_data_shape()))


def read_spacing(path: Path) -> tuple[float, float, float]:
    """Voxel size in mm from the header, without reading the voxels."""

    def sizes(header: Any) -> tuple[float, float, float]:
        i, j, k = (float(size) for size in header.get_zooms()[:3])
        return i, j, k

    return _from_header(path, sizes)


def read_grid(path: Path) -> Grid:
    """Voxel grid from the header, without reading the voxels. Raises as `read_image`."""
    return _from_header(path, lambda header: grid_of(_HeaderOnly(header), path))


def count_volumes(path: Path, unreadable: int) -> int:
    """Number of volumes from the header, or `unreadable` for invalid files, whose errors are raised on reading."""
    try:
        shape = read_shape(path)
    except InputError:
        return unreadable
    return shape[3] if len(shape) > 3 else 1


def write_image(
    path: Path,
    data: np.ndarray | torch.Tensor,
    grid: Grid,
    discrete: bool = False,
    level: int = 1,
    space: int = SCANNER,
    repetition_time: float | None = None,
) -> None:
    """Write an image under a temporary name, then rename it, so that the file is never incomplete.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    data : ndarray or Tensor, (i, j, k) or (n, i, j, k)
        Volumes along the first axis.
    grid : Grid
    discrete : bool
        Store labels and masks as uint8, or int16 if a label requires it; otherwise float32.
    level : int
        gzip compression level.
    space : int
        `SCANNER`, `ALIGNED` (to another image, such as ACPC space) or `MNI`: the code of qform and sform.
    repetition_time : float, optional
        Of a series, s. Without it the header names no unit of time, as it then holds no time.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    array = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
    volumes = array[None] if array.ndim == 3 else array
    kind = _label_type(array) if discrete else np.dtype(np.float32)
    header = _file_header(array, grid, kind, space, repetition_time)
    if path.suffix == ".gz":
        parts = _compressed(header, volumes, kind, level)
    else:
        parts = [header, *(_block(volume, kind) for volume in volumes)]
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as stream:
            for part in parts:
                stream.write(part)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; free disk space or check permissions, then run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def to_lps(data: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """Reorient an image to the axis order and directions closest to L, P, S.

    Parameters
    ----------
    data : ndarray, (..., i, j, k)
    grid : Grid

    Returns
    -------
    data : ndarray, (..., i', j', k')
        A view with permuted and flipped axes; nothing is interpolated.
    grid : Grid
        Voxels keep their world coordinates.
    """
    order, flipped = lps_axes(grid)
    leading = data.ndim - 3
    reoriented = data.transpose(*range(leading), *(leading + a for a in order))
    i, j, k = (slice(None, None, -1 if flip else 1) for flip in flipped)
    reoriented = reoriented[..., i, j, k]
    shape = tuple(grid.shape[a] for a in order)
    new_to_old = np.zeros((4, 4))
    new_to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flipped, strict=True)):
        new_to_old[old, new] = -1 if flip else 1
        new_to_old[old, 3] = grid.shape[old] - 1 if flip else 0
    return reoriented, Grid((shape[0], shape[1], shape[2]), grid.affine @ new_to_old)


def lps_axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The voxel axes closest to L, P and S, and whether their indices run in the opposite direction."""
    order, (r, a, s) = grid.ras_axes()
    return order, (not r, not a, s)


def open_nifti(path: Path) -> Any:
    """Read a file with any number of dimensions into a nibabel image. Raises as `read_image` for unreadable files."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; if it is a dangling link, fetch it with datalad get"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: the compressed file is truncated or damaged ({_first_line(error)}); copy or convert it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        is_nifti2 = _header_class(content) is nib.Nifti2Header
        return (nib.Nifti2Image if is_nifti2 else nib.Nifti1Image).from_bytes(content)
    except Exception as error:  # nibabel raises many types
        raise InputError(f"{path}: not readable as NIfTI ({_first_line(error)}); convert it again") from None


def _as_3d_or_4d(image: Any, path: Path) -> Any:
    """The image without trailing singleton axes; raises an InputError unless it is then 3-D or 4-D and real-valued."""
    shape = image.shape
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(f"{path}: an image of {_shape_text(image.shape)} voxels; expected a 3-D or 4-D image")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels are of type {image.get_data_dtype()}; expected real numbers")
    return image if shape == image.shape else image.slicer[(..., *([0] * (len(image.shape) - 4)))]


def _from_header(path: Path, extract: Callable[[Any], T]) -> T:
    """`extract` applied to the header, which is read from the first bytes of the file."""
    path = Path(path)
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as stream:
            head = stream.read(540)
        return extract(_header_class(head).from_fileobj(_ByteStream(head), check=False))
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        struct.error,
        nib.spatialimages.HeaderDataError,
    ) as error:
        raise InputError(f"{path}: not readable as NIfTI ({_first_line(error)})") from None


def _header_class(content: bytes) -> Any:
    sizes = {struct.unpack(order + "i", content[:4])[0] for order in "<>"} if len(content) >= 4 else set()
    if 540 in sizes:
        return nib.Nifti2Header
    if 348 in sizes:
        return nib.Nifti1Header
    raise ValueError("it does not start with a NIfTI header" if content else "the file is empty")


class _HeaderOnly:
    """What `grid_of` needs of an image, from its header."""

    def __init__(self, header: Any) -> None:
        self.header = header
        self.affine = header.get_best_affine()
        self.shape = (*header.get_data_shape(), 1, 1)


class _ByteStream:
    """Minimal file object from which nibabel can read a header."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def read(self, count: int = -1) -> bytes:
        stop = len(self.content) if count < 0 else self.position + count
        chunk = self.content[self.position : stop]
        self.position += len(chunk)
        return chunk

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        self.position = position


def grid_of(image: Any, path: Path) -> Grid:
    """Grid of a nibabel image; raises an InputError if its header has no orientation or a singular affine."""
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise InputError(
            f"{path}: the header has no orientation (sform and qform codes are 0), so left and right cannot be "
            "distinguished; convert the image again from DICOM"
        )
    affine = np.asarray(image.affine, float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the header's affine is singular; convert the image again from DICOM")
    shape = image.shape
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _check_finite(data: np.ndarray, path: Path) -> None:
    volumes = data.reshape(len(data), -1)
    # a volume with a finite sum has only finite values; a sum can also overflow, hence the count
    suspects = np.flatnonzero(~np.isfinite(volumes.sum(1)))
    bad = [(int(v), int((~np.isfinite(volumes[v])).sum())) for v in suspects]
    bad = [(v, count) for v, count in bad if count]
    if bad:
        total = sum(count for _, count in bad)
        where = f" in {volume_list([v for v, _ in bad])}" if len(data) > 1 else ""
        raise InputError(f"{path}: {total} values{where} are not numbers (NaN or infinite); convert the image again")


def volume_list(volumes: list[int]) -> str:
    """Format volume indices as "volume 3 (counted from 0)" or "volumes 3, 7, ... (41 in total) (counted from 0)"."""
    shown = ", ".join(str(int(v)) for v in volumes[:8])
    more = f", ... ({len(volumes)} in total)" if len(volumes) > 8 else ""
    return f"volume{'s' if len(volumes) > 1 else ''} {shown}{more} (counted from 0)"


def _file_header(array: np.ndarray, grid: Grid, kind: np.dtype, space: int, repetition_time: float | None) -> bytes:
    shape = grid.shape if array.ndim == 3 else (*grid.shape, len(array))
    if array.shape[-3:] != grid.shape:
        raise ValueError(f"data of {_shape_text(array.shape[-3:])} voxels on a grid of {_shape_text(grid.shape)}")
    header = nib.Nifti1Header() if max(shape) < 2**15 else nib.Nifti2Header()
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header.set_qform(grid.affine, space)  # also sets the voxel sizes
    header.set_sform(grid.affine, space)
    timed = len(shape) == 4 and repetition_time is not None
    header.set_xyzt_units("mm", "sec" if timed else None)
    if timed:
        header["pixdim"][4] = repetition_time
    header.set_slope_inter(1, 0)
    header["vox_offset"] = int(header.sizeof_hdr) + 4
    return header.binaryblock + b"\x00\x00\x00\x00"


def _compressed(header: bytes, volumes: np.ndarray, kind: np.dtype, level: int) -> list[bytes]:
    """A standard gzip stream, as chunks, whose blocks are compressed in parallel."""

    def deflate(index: int) -> bytes:
        compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
        return compressor.compress(_block(volumes[index], kind)) + compressor.flush(zlib.Z_FULL_FLUSH)

    first = zlib.compressobj(level, zlib.DEFLATED, -15)
    blocks = [first.compress(header) + first.flush(zlib.Z_FULL_FLUSH)]
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        blocks += pool.map(deflate, range(len(volumes)))
    crc, size = zlib.crc32(header), len(header)
    for volume in volumes:
        content = _block(volume, kind)
        crc, size = zlib.crc32(content, crc), size + len(content)
    trailer = b"\x03\x00" + struct.pack("<II", crc, size & 0xFFFFFFFF)
    return [GZIP_HEADER, *blocks, trailer]


def _block(volume: np.ndarray, kind: np.dtype) -> bytes:
    return np.asarray(volume).astype(kind).tobytes("F")


def _label_type(array: np.ndarray) -> np.dtype:
    fits_uint8 = array.size == 0 or (array.min() >= 0 and array.max() <= 255)
    return np.dtype(np.uint8 if fits_uint8 else np.int16)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
