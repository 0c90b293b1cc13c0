"""NIfTI images in and out. Every way in which a file can be bad is told in a sentence.

Files are read whole and decompressed at once, which is faster than through a stream and finds every
truncation.
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
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"  # no name, no time: equal data give equal files


def read_image(path: Path) -> tuple[np.ndarray, Grid]:
    """Voxels and grid of an image.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`, NIfTI-1 or NIfTI-2, 3-D or 4-D.

    Returns
    -------
    data : ndarray, (i, j, k) or (n, i, j, k), float32
        Scaled intensities, volume first.
    grid : Grid

    Raises
    ------
    InputError
        If the file is missing, unreadable, truncated, not real-valued, not 3-D or 4-D, has values that are
        not numbers, or does not say where its voxels are.
    """
    image = _checked(open_nifti(path), path)
    grid = grid_of(image, path)
    shape = tuple(int(n) for n in image.shape)
    volumes = shape[3] if len(shape) == 4 else 1
    data = np.empty((volumes, *shape[:3]), np.float32)
    try:
        for v in range(volumes):
            data[v] = image.dataobj[..., v] if len(shape) == 4 else image.dataobj[...]
    except (OSError, ValueError, EOFError) as problem:
        raise InputError(f"{path}: the file is truncated ({_short(problem)}); copy or convert it again") from None
    _check_finite(data, path)
    return (data if len(shape) == 4 else data[0]), grid


def read_series(path: Path) -> tuple[np.ndarray, Grid]:
    """A series, (n, i, j, k) float32, and its grid; errors as `read_image`, and for 3-D images."""
    data, grid = read_image(path)
    if data.ndim != 4 or len(data) < 2:
        raise InputError(
            f"{path}: a single volume of {_times(grid.shape)} voxels, but a diffusion-weighted series (4-D) "
            "is wanted; convert the whole series, or leave this file out with --bids-filter-file"
        )
    return data, grid


def read_volume(path: Path) -> Volume:
    """A single 3-D image, float32; errors as `read_image`, and for series."""
    data, grid = read_image(path)
    if data.ndim == 4 and len(data) > 1:
        raise InputError(f"{path}: {len(data)} volumes, but a single 3-D image is wanted")
    return Volume(torch.from_numpy(data.reshape(grid.shape)), grid)


def read_shape(path: Path) -> tuple[int, ...]:
    """The shape that the header tells, (i, j, k) or (i, j, k, n), without reading the voxels."""
    return _from_header(path, lambda header: tuple(int(n) for n in header.get_data_shape()))


def read_spacing(path: Path) -> tuple[float, float, float]:
    """The voxel size in mm that the header tells, without reading the voxels."""

    def sizes(header: Any) -> tuple[float, float, float]:
        i, j, k = (float(size) for size in header.get_zooms()[:3])
        return i, j, k

    return _from_header(path, sizes)


def count_volumes(path: Path, unreadable: int) -> int:
    """How many volumes the header tells, or `unreadable`: what is wrong is told when the file is read."""
    try:
        shape = read_shape(path)
    except InputError:
        return unreadable
    return shape[3] if len(shape) > 3 else 1


def write_image(
    path: Path, data: np.ndarray | torch.Tensor, grid: Grid, discrete: bool = False, level: int = 1
) -> None:
    """Write an image, all of it or nothing: beside first, then renamed.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    data : ndarray or Tensor, (i, j, k) or (n, i, j, k)
        Volume first.
    grid : Grid
    discrete : bool
        Labels and masks: stored as uint8 (int16 where a label needs it); float32 otherwise.
    level : int
        gzip level.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    array = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
    volumes = array[None] if array.ndim == 3 else array
    kind = _label_type(array) if discrete else np.dtype(np.float32)
    header = _file_header(array, grid, kind)
    if path.suffix == ".gz":
        parts = _compressed(header, volumes, kind, level)
    else:
        parts = [header, *(_block(volume, kind) for volume in volumes)]
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with beside.open("wb") as stream:
            for part in parts:
                stream.write(part)
        beside.replace(path)
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror}; make room or check the rights, then run again") from None
    finally:
        beside.unlink(missing_ok=True)


def to_lps(data: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """The same voxels with their axes in the order and direction nearest to L, P, S.

    Parameters
    ----------
    data : ndarray, (..., i, j, k)
    grid : Grid

    Returns
    -------
    data : ndarray, (..., i', j', k')
        A view: axes are swapped and turned around, nothing is interpolated.
    grid : Grid
        Voxels keep their places in the world.
    """
    order, flipped = lps_axes(grid)
    leading = data.ndim - 3
    turned = data.transpose(*range(leading), *(leading + a for a in order))
    i, j, k = (slice(None, None, -1 if flip else 1) for flip in flipped)
    turned = turned[..., i, j, k]
    shape = tuple(grid.shape[a] for a in order)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flipped, strict=True)):
        change[old, new] = -1 if flip else 1
        change[old, 3] = grid.shape[old] - 1 if flip else 0
    return turned, Grid((shape[0], shape[1], shape[2]), grid.affine @ change)


def lps_axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The voxel axis nearest to L, P and S, and whether its index runs the other way."""
    order, (r, a, s) = grid.ras_axes()
    return order, (not r, not a, s)


def open_nifti(path: Path) -> Any:
    """The nibabel image of a file that was read whole, of any number of axes; errors as `read_image`."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; a dangling link? (datalad get fetches annexed files)"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise InputError(
            f"{path}: the compressed file is truncated or damaged ({_short(problem)}); copy or convert it again"
        ) from None
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from None
    try:
        return (nib.Nifti2Image if _header(content) is nib.Nifti2Header else nib.Nifti1Image).from_bytes(content)
    except Exception as problem:  # nibabel raises many kinds
        raise InputError(f"{path}: not readable as NIfTI ({_short(problem)}); convert it again") from None


def _checked(image: Any, path: Path) -> Any:
    shape = image.shape
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(f"{path}: an image of {_times(image.shape)} voxels, but 3-D or 4-D is wanted")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels are of type {image.get_data_dtype()}, but real numbers are wanted")
    return image if shape == image.shape else image.slicer[(..., *([0] * (len(image.shape) - 4)))]


def _from_header(path: Path, ask: Callable[[Any], T]) -> T:
    """What a header tells, from the first bytes of the file."""
    path = Path(path)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(540)
        return ask(_header(head).from_fileobj(_Bytes(head), check=False))
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        struct.error,
        nib.spatialimages.HeaderDataError,
    ) as problem:
        raise InputError(f"{path}: not readable as NIfTI ({_short(problem)})") from None


def _header(content: bytes) -> Any:
    sizes = {struct.unpack(order + "i", content[:4])[0] for order in "<>"} if len(content) >= 4 else set()
    if 540 in sizes:
        return nib.Nifti2Header
    if 348 in sizes:
        return nib.Nifti1Header
    raise ValueError("its first bytes are not those of a NIfTI header" if content else "the file is empty")


class _Bytes:
    """Just enough of a file for nibabel to read a header from."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def read(self, count: int = -1) -> bytes:
        stop = len(self.content) if count < 0 else self.place + count
        found = self.content[self.place : stop]
        self.place += len(found)
        return found

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        self.place = place


def grid_of(image: Any, path: Path) -> Grid:
    """Where the voxels of a nibabel image are; `InputError` where its header does not say."""
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise InputError(
            f"{path}: the header does not say where the voxels are (sform and qform codes are 0), so left "
            "and right cannot be told apart; convert the image again from DICOM"
        )
    affine = np.asarray(image.affine, float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the header's affine is singular; convert the image again from DICOM")
    shape = image.shape
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _check_finite(data: np.ndarray, path: Path) -> None:
    volumes = data.reshape(len(data), -1)
    # the sum of a volume is finite only if all of its values are (it may also overflow, hence the count)
    suspects = np.flatnonzero(~np.isfinite(volumes.sum(1)))
    bad = [(int(v), int((~np.isfinite(volumes[v])).sum())) for v in suspects]
    bad = [(v, count) for v, count in bad if count]
    if bad:
        total = sum(count for _, count in bad)
        where = f" in {listed([v for v, _ in bad])}" if len(data) > 1 else ""
        raise InputError(f"{path}: {total} values{where} are not numbers (NaN or infinite); convert the image again")


def listed(volumes: list[int]) -> str:
    """ "volume 3" or "volumes 3, 7, 9, ... (41 in all)", counted from 0."""
    shown = ", ".join(str(int(v)) for v in volumes[:8])
    more = f", ... ({len(volumes)} in all)" if len(volumes) > 8 else ""
    return f"volume{'s' if len(volumes) > 1 else ''} {shown}{more} (counted from 0)"


def _file_header(array: np.ndarray, grid: Grid, kind: np.dtype) -> bytes:
    shape = grid.shape if array.ndim == 3 else (*grid.shape, len(array))
    if array.shape[-3:] != grid.shape:
        raise ValueError(f"data of {_times(array.shape[-3:])} voxels on a grid of {_times(grid.shape)}")
    header = nib.Nifti1Header() if max(shape) < 2**15 else nib.Nifti2Header()
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm", "sec" if len(shape) == 4 else None)
    header.set_qform(grid.affine, 1)  # also sets the voxel sizes
    header.set_sform(grid.affine, 1)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = int(header.sizeof_hdr) + 4
    return header.binaryblock + b"\x00\x00\x00\x00"


def _compressed(header: bytes, volumes: np.ndarray, kind: np.dtype, level: int) -> list[bytes]:
    """One gzip stream whose blocks were compressed in parallel; any gzip reader takes it."""

    def deflate(index: int) -> bytes:
        pack = zlib.compressobj(level, zlib.DEFLATED, -15)
        return pack.compress(_block(volumes[index], kind)) + pack.flush(zlib.Z_FULL_FLUSH)

    first = zlib.compressobj(level, zlib.DEFLATED, -15)
    blocks = [first.compress(header) + first.flush(zlib.Z_FULL_FLUSH)]
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        blocks += pool.map(deflate, range(len(volumes)))
    crc, size = zlib.crc32(header), len(header)
    for volume in volumes:
        content = _block(volume, kind)
        crc, size = zlib.crc32(content, crc), size + len(content)
    end = b"\x03\x00" + struct.pack("<II", crc, size & 0xFFFFFFFF)
    return [GZIP_HEADER, *blocks, end]


def _block(volume: np.ndarray, kind: np.dtype) -> bytes:
    return np.asarray(volume).astype(kind).tobytes("F")


def _label_type(array: np.ndarray) -> np.dtype:
    fits = array.size == 0 or (array.min() >= 0 and array.max() <= 255)
    return np.dtype(np.uint8 if fits else np.int16)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _short(problem: BaseException) -> str:
    return str(problem).splitlines()[0].rstrip(".") if str(problem) else type(problem).__name__
