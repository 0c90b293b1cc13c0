"""Read and write warps and linear transforms of FreeSurfer and SynthMorph.

A warp is defined on the grid of the fixed image and maps its voxels to the moving image. A tag names one of four
layouts of the values; older files have no tag, and the layout is inferred from the values. Geometries are stored as the
centre (the point at half the image size), voxel sizes, axes and, in newer files, shears. A linear transform (`.lta`)
has the opposite direction, from the moving to the fixed image.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, DisplacementField
from dsiprep.errors import InputError
from dsiprep.io.vector_image import VectorImage, absolute_or_displacement, check_finite, read_vectors, write_vectors

__all__ = ["LAYOUTS", "FreeSurferWarp", "is_mgh", "mgh_grid", "read_lta", "read_warp", "warp_of", "write_warp"]

LAYOUTS = ("voxel-absolute", "voxel-displacement", "absolute", "displacement")  # in the order of their codes
INTENT = 1006  # NIFTI_INTENT_DISPVECT
WARP_INTENT = 3  # FreeSurfer's own intent code, in the version field of .mgz files and in the header extension
GEOMETRY, META, GEOMETRY_SHEARED, LAST = 10, 13, 15, -1  # tag numbers
MGH_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
MGH_HEADER_SIZE, MGH_NAME_SIZE = 284, 512  # bytes
LTA_VOXEL, LTA_WORLD = 0, 1


@dataclass(frozen=True, eq=False)
class FreeSurferWarp:
    """A warp with the geometry of its moving image.

    Attributes
    ----------
    field : DisplacementField
        From points of the fixed image to points of the moving image, on the grid of the fixed image, RAS+ mm.
    moving : Grid or None
        Grid of the moving image, if the file contains it.
    layout : str
        Layout of the values in the file, one of `LAYOUTS`.
    """

    field: DisplacementField
    moving: Grid | None
    layout: str


def read_warp(path: Path | str, layout: str | None = None, moving: Grid | None = None) -> FreeSurferWarp:
    """Read a warp from `.nii`, `.nii.gz`, `.mgz` or `.mgh`.

    Parameters
    ----------
    path : Path
    layout : str, optional
        One of `LAYOUTS`, for files without a layout tag; by default "absolute" or "displacement" (RAS), inferred from
        the values.
    moving : Grid, optional
        Grid of the moving image, for layouts in voxels; by default from the file.

    Returns
    -------
    FreeSurferWarp

    Raises
    ------
    InputError
        If the file is not a warp, or information is missing or ambiguous.
    """
    path = Path(path)
    if is_mgh(path):
        image, tags = _read_mgh(path)
        return _warp(image, tags, 0, layout, moving)
    return warp_of(read_vectors(path), layout, moving)


def warp_of(image: VectorImage, layout: str | None = None, moving: Grid | None = None) -> FreeSurferWarp:
    """Convert a NIfTI image that is already in memory; parameters are as for `read_warp`."""
    return _warp(image, dict(_extension_tags(image.extension)), 4, layout, moving)


def _warp(
    image: VectorImage, tags: dict[int, bytes], name_length: int, layout: str | None, moving: Grid | None
) -> FreeSurferWarp:
    path = image.path
    source, target = _geometries(tags, name_length, path)
    grid = image.grid if target is None else target
    if grid.shape != image.data.shape[1:]:
        raise InputError(
            f"{path}: {_shape_text(image.data.shape[1:])} vectors, but the fixed image in its header has "
            f"{_shape_text(grid.shape)} voxels; write the warp again with one vector per voxel"
        )
    moving = moving or source
    layout = _tagged_layout(tags, path) or layout or _inferred_layout(image, grid)
    return FreeSurferWarp(_displacement(image.data, grid, layout, moving, path), moving, layout)


def write_warp(path: Path | str, field: DisplacementField, moving: Grid) -> None:
    """Write a warp in the format of SynthMorph and FreeSurfer after 7.4.

    It contains RAS displacements, intent code 1006 and both geometries.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    field : DisplacementField
        On the grid of the fixed image.
    moving : Grid
        Grid of the moving image, which FreeSurfer requires.
    """
    geometries = {shear: b"".join(_packed_geometry(g, shear) for g in (moving, field.grid)) for shear in (False, True)}
    tags = [
        (GEOMETRY, geometries[False]),
        (GEOMETRY_SHEARED, geometries[True]),
        (META, struct.pack(">iif", LAYOUTS.index("displacement"), 1, 0.0)),
        (LAST, b"*"),  # nonzero, so that readers that strip trailing zeros stop here
    ]
    content = struct.pack(">cHB", b">", WARP_INTENT, 1)
    content += b"".join(struct.pack(">iq", tag, len(data)) + data for tag, data in tags)
    write_vectors(path, field.data.detach().cpu().numpy(), field.grid, INTENT, content)


def read_lta(path: Path | str, source: str = "moving", target: str = "fixed") -> Affine:
    """Read the linear transform of an `.lta` file, stored as voxels to voxels or RAS to RAS.

    Parameters
    ----------
    path : Path
    source, target : str
        Names of the two spaces.

    Returns
    -------
    Affine
        From points of the destination image to points of the source image, the inverse of the matrix in the file.

    Raises
    ------
    InputError
        If the file is not such a transform.
    """
    path = Path(path)
    try:
        text = re.sub(r"#.*", "", path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({error}); expected an .lta transform") from None
    kind = _number(text, r"type\s*=\s*(-?\d+)", path)
    if _number(text, r"nxforms\s*=\s*(\d+)", path) != 1:
        raise InputError(f"{path}: contains several transforms; expected exactly one")
    rows = re.search(r"^\s*1\s+4\s+4\s*\n((?:.*\n){4})", text, re.MULTILINE)
    try:
        matrix = np.array([row.split() for row in rows[1].splitlines()], float) if rows else np.empty(0)
    except ValueError:
        matrix = np.empty(0)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise InputError(f"{path}: no invertible matrix of 4 x 4 numbers; expected an .lta transform")
    if kind == LTA_VOXEL:
        moving, fixed = (_lta_grid(text, name, path) for name in ("src", "dst"))
        matrix = fixed.affine @ matrix @ np.linalg.inv(moving.affine)
    elif kind != LTA_WORLD:
        raise InputError(
            f"{path}: type {kind}; expected 0 (voxels to voxels) or 1 (RAS to RAS); "
            f"convert it to RAS to RAS with lta_convert --inlta {path.name} --outlta new.lta"
        )
    return Affine(np.linalg.inv(matrix), source, target)


def is_mgh(path: Path | str) -> bool:
    """Whether a file starts like an .mgh or .mgz file, warp or image."""
    try:
        with Path(path).open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else Path(path).open("rb") as stream:
            start = stream.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == 4 and start[0] == 0 and start[3] == 1


def mgh_grid(path: Path | str) -> Grid:
    """Voxel grid of an .mgz image or warp."""
    return _mgh_grid(_read_decompressed(Path(path)), Path(path))


def _mgh_grid(content: bytes, path: Path) -> Grid:
    i, j, k, valid = *struct.unpack_from(">3i", content, 4), struct.unpack_from(">h", content, 28)[0]
    if not valid:
        raise InputError(f"{path}: the header has no orientation; convert the image again")
    return _grid((i, j, k), struct.unpack_from(">15f", content, 30))


def _read_decompressed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); copy it again") from None
    if len(content) < MGH_HEADER_SIZE:
        raise InputError(f"{path}: the file is truncated; copy it again")
    return content


def _read_mgh(path: Path) -> tuple[VectorImage, dict[int, bytes]]:
    """Vectors and tags of an .mgh or .mgz warp.

    nibabel accepts only version 1; warps store their intent code in the next byte: 769 = 3 * 256 + 1.
    """
    content = _read_decompressed(path)
    version, i, j, k, frames, kind = struct.unpack_from(">6i", content)
    intent = version >> 8
    if frames != 3 or intent not in (0, WARP_INTENT) or kind not in MGH_TYPES:
        raise InputError(
            f"{path}: {frames} frames of type {kind} and intent {intent}; expected 3 frames of real numbers"
        )
    dtype = np.dtype(MGH_TYPES[kind])
    stop = MGH_HEADER_SIZE + dtype.itemsize * 3 * i * j * k
    if min(i, j, k) < 1 or len(content) < stop:
        raise InputError(f"{path}: the file is truncated; copy it again")
    data = np.frombuffer(content[MGH_HEADER_SIZE:stop], dtype).astype(np.float32).reshape(3, k, j, i)
    check_finite(data, path)
    grid = _mgh_grid(content, path)
    image = VectorImage(np.ascontiguousarray(data.transpose(0, 3, 2, 1)), grid, 4, intent, b"", "", path)
    return image, dict(_mgh_tags(content[stop + 20 :]))  # the tags follow five scan parameters


def _mgh_tags(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags of an .mgh file, each preceded by its length, except for the geometry tag."""
    geometry_size = 2 * (struct.calcsize(">4i15f") + MGH_NAME_SIZE)
    offset = 0
    while offset + 4 <= len(content):
        tag = struct.unpack_from(">i", content, offset)[0]
        offset += 4
        if tag == GEOMETRY:
            length = geometry_size
        elif tag > 0 and offset + 8 <= len(content):
            length = struct.unpack_from(">q", content, offset)[0]
            offset += 8
        else:
            return
        yield tag, content[offset : offset + length]
        offset += max(0, length)


def _extension_tags(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags of the NIfTI header extension, which follow four bytes: byte order, intent, version."""
    offset = 4
    while offset + 12 <= len(content):
        tag, length = struct.unpack_from(">iq", content, offset)
        if tag in (0, LAST):
            return
        yield tag, content[offset + 12 : offset + 12 + length]
        offset += 12 + max(0, length)


def _geometries(tags: dict[int, bytes], name_length: int, path: Path) -> tuple[Grid | None, Grid | None]:
    """Grids of the moving and the fixed image, None where missing or marked invalid.

    A file name follows each geometry: in NIfTI it is preceded by its length, stored in `name_length` bytes; in .mgz it
    has a fixed size and `name_length` is 0.
    """
    sheared = GEOMETRY_SHEARED in tags
    content = tags.get(GEOMETRY_SHEARED, tags.get(GEOMETRY))
    if content is None:
        return None, None
    layout = ">4i18f" if sheared else ">4i15f"
    grids: list[Grid | None] = []
    offset = 0
    try:
        for _ in range(2):
            valid, i, j, k, *numbers = struct.unpack_from(layout, content, offset)
            offset += struct.calcsize(layout)
            name_size = struct.unpack_from(">i", content, offset)[0] if name_length else MGH_NAME_SIZE
            offset += name_length + name_size
            grids.append(_grid((i, j, k), numbers) if valid else None)
    except struct.error:
        raise InputError(f"{path}: the geometries in the header are truncated; copy or create the warp again") from None
    return grids[0], grids[1]


def _grid(shape: tuple[int, int, int], numbers: tuple[float, ...] | list[float]) -> Grid:
    """Grid from `numbers`: voxel sizes (3), axes (9, one after the other), centre (3) and optionally shears (3)."""
    sizes, axes, centre = np.array(numbers[:3]), np.array(numbers[3:12]).reshape(3, 3).T, np.array(numbers[12:15])
    shear = np.eye(3)
    if len(numbers) > 15:
        shear[0, 1], shear[0, 2], shear[1, 2] = numbers[15:18]
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(sizes) @ shear
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


def _packed_geometry(grid: Grid, with_shear: bool) -> bytes:
    """A geometry in the format of the header extension, with an empty file name."""
    axes, upper = np.linalg.qr(grid.affine[:3, :3])
    signs = np.sign(np.diag(upper))
    axes, upper = axes * signs, signs[:, None] * upper
    sizes = np.diag(upper)
    shear = upper / sizes[:, None]
    centre = grid.to_world(np.array(grid.shape) / 2)
    numbers = [*sizes, *axes.T.ravel(), *centre]
    if with_shear:
        numbers += [shear[0, 1], shear[0, 2], shear[1, 2]]
    return struct.pack(f">4i{len(numbers)}fi", 1, *grid.shape, *numbers, 0)


def _tagged_layout(tags: dict[int, bytes], path: Path) -> str | None:
    if META not in tags:
        return None
    code = struct.unpack_from(">i", tags[META])[0] if len(tags[META]) >= 4 else -1
    if code not in range(len(LAYOUTS)):
        raise InputError(f"{path}: unknown warp format {code}; supported formats are 0 to 3")
    return LAYOUTS[code]


def _inferred_layout(image: VectorImage, grid: Grid) -> str:
    layout = absolute_or_displacement(image.data, _voxel_points(grid))
    if layout is None and image.intent == INTENT:
        return "displacement"
    if layout is None:
        raise InputError(
            f"{image.path}: the values could be displacements or coordinates; specify "
            "--kind freesurfer or --kind easyreg"
        )
    return layout


def _voxel_points(grid: Grid) -> np.ndarray:
    """World coordinates of the voxels, (3, i, j, k)."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return np.moveaxis(grid.to_world(voxels), -1, 0)


def _displacement(data: np.ndarray, grid: Grid, layout: str, moving: Grid | None, path: Path) -> DisplacementField:
    if layout == "displacement":
        return DisplacementField(torch.from_numpy(data), grid)
    values = data.astype(float)
    if layout.startswith("voxel"):
        if moving is None:
            raise InputError(
                f"{path}: the warp is in voxels of the moving image, whose geometry is not in the file; "
                "give that image with --source"
            )
        if layout == "voxel-displacement":
            values += np.indices(grid.shape)
        values = np.moveaxis(moving.to_world(np.moveaxis(values, 0, -1)), -1, 0)
    return DisplacementField(torch.from_numpy((values - _voxel_points(grid)).astype(np.float32)), grid)


def _lta_grid(text: str, name: str, path: Path) -> Grid:
    section = re.search(rf"{name} volume info(.*?)(?:dst volume info|$)", text, re.DOTALL)
    fields = {} if section is None else dict(re.findall(r"(\w+)[ \t]*=[ \t]*(.*)", section[1]))
    try:
        valid = int(fields["valid"])
        keys = ("voxelsize", "xras", "yras", "zras", "cras")
        numbers = [float(n) for key in keys for n in fields[key].split()]
        i, j, k = (int(n) for n in fields["volume"].split())
    except (KeyError, ValueError):
        valid, numbers, (i, j, k) = 0, [], (0, 0, 0)
    if not valid or len(numbers) != 15:
        raise InputError(
            f"{path}: a voxel-to-voxel transform without the geometry of the {name} image; "
            f"add it with lta_convert --inlta {path.name} --outlta new.lta --src IMAGE --trg IMAGE"
        )
    return _grid((i, j, k), numbers)


def _number(text: str, pattern: str, path: Path) -> int:
    match = re.search(rf"^\s*{pattern}", text, re.MULTILINE)
    if not match:
        raise InputError(f"{path}: no line {pattern.partition(chr(92))[0]!r}; expected an .lta transform")
    return int(match[1])


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
