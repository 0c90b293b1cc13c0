"""Read and write NIfTI images, with an error message for every kind of invalid file.

Files are read and decompressed in one step, which is faster than streaming and detects every truncation.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import isal_zlib

from dsiprep.data.grid import Grid, Volume
from dsiprep.errors import InputError, OutputError
from dsiprep.io.files import read_bytes
from dsiprep.io.nifti_header import (
    check_extent,
    check_kind,
    damaged_stream,
    first_line,
    nifti_class,
    oriented,
    parse_header,
    read_header,
    shape_text,
)

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
    return _read(path, "image")


def read_series(path: Path) -> tuple[np.ndarray, Grid]:
    """Read a series, (n, i, j, k) float32, and its grid. Raises as `read_image`, and for single volumes."""
    return _read(path, "series")


def read_volume(path: Path) -> Volume:
    """Read a single 3-D image, float32. Raises as `read_image`, and for series."""
    data, grid = _read(path, "volume")
    return Volume(torch.from_numpy(data.reshape(grid.shape)), grid)


def _read(path: Path, kind: str) -> tuple[np.ndarray, Grid]:
    """Voxels and grid of an image of a kind (`nifti_header.check_kind`)."""
    image = open_nifti(path)
    header = parse_header(image.header.binaryblock, path)
    check_kind(header, path, kind)
    grid, image = oriented(header, path), _without_single_axes(image)
    shape = tuple(int(n) for n in image.shape)
    volumes = shape[3] if len(shape) == 4 else 1
    data = np.empty((volumes, *shape[:3]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # scaled values that are not numbers are found below
        for v in range(volumes):
            data[v] = image.dataobj[..., v] if len(shape) == 4 else image.dataobj[...]
    _check_finite(data, path)
    return (data if len(shape) == 4 else data[0]), grid


def write_image(
    path: Path,
    data: np.ndarray | torch.Tensor,
    grid: Grid,
    discrete: bool = False,
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
        parts = _compressed(header, volumes, kind)
    else:
        parts = chain([header], (_block(volume, kind) for volume in volumes))
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
    content = read_bytes(path)
    try:
        if content[:2] == b"\x1f\x8b":
            content = _decompressed(content, read_header(path).data_end)
    except (EOFError, zlib.error, OSError, struct.error) as error:
        raise damaged_stream(error, path) from None
    header = parse_header(content, path)
    check_extent(header, len(content), path)
    try:
        return nifti_class(content).from_bytes(content)
    except Exception as error:  # nibabel raises many types
        raise InputError(f"{path}: not readable as NIfTI ({first_line(error)}); convert it again") from None


def _decompressed(content: bytes, needed: int) -> bytes:
    """At least `needed` bytes of a gzip stream, or all that it has; what follows the voxels is not decompressed."""
    parts: list[bytes] = []
    size = 0
    while content and size <= needed:
        stream = zlib.decompressobj(31)  # gzip, with a check of its sum
        parts.append(stream.decompress(content, needed - size + 1))
        size += len(parts[-1])
        if not stream.eof and size <= needed:
            raise EOFError("it ends before the end-of-stream marker")
        content = stream.unused_data.lstrip(b"\0")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _without_single_axes(image: Any) -> Any:
    """The image without axes of one voxel after the fourth."""
    return image if len(image.shape) <= 4 else image.slicer[(..., *([0] * (len(image.shape) - 4)))]


def grid_of(image: Any, path: Path) -> Grid:
    """Grid of a nibabel image. Raises an InputError if its header has no valid orientation or contradicts itself."""
    return oriented(parse_header(image.header.binaryblock, path), path)


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
        raise ValueError(f"data of {shape_text(array.shape[-3:])} voxels on a grid of {shape_text(grid.shape)}")
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


def _compressed(header: bytes, volumes: np.ndarray, kind: np.dtype) -> Iterator[bytes]:
    """A standard gzip stream, as chunks, whose blocks are compressed in parallel."""

    def deflate(content: bytes) -> bytes:
        compressor = isal_zlib.compressobj(wbits=-15)  # no header
        return compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH)

    yield GZIP_HEADER + deflate(header)
    crc, size, threads = isal_zlib.crc32(header), len(header), max(1, min(8, torch.get_num_threads()))
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(volumes), threads):
            contents = [_block(volume, kind) for volume in volumes[first : first + threads]]
            blocks = pool.map(deflate, contents)
            for content in contents:  # meanwhile
                crc, size = isal_zlib.crc32(content, crc), size + len(content)
            yield from blocks
    yield b"\x03\x00" + struct.pack("<II", crc, size & 0xFFFFFFFF)


def _block(volume: np.ndarray, kind: np.dtype) -> bytes:
    values, block = np.asarray(volume), np.empty(volume.shape[::-1], kind)
    for j in range(values.shape[1]):  # by planes, of which both orders stay in the processor's cache
        block[:, j] = values[:, j].T
    return block.tobytes()


def _label_type(array: np.ndarray) -> np.dtype:
    fits_uint8 = array.size == 0 or (array.min() >= 0 and array.max() <= 255)
    return np.dtype(np.uint8 if fits_uint8 else np.int16)
