"""Warps and linear transforms as FreeSurfer and SynthMorph keep them.

A warp lies on the grid of the fixed image and says where each of its voxels is found in the moving image, in one of
four ways that a tag names. Older files have no tag, and what they hold is told from the data. Geometries are kept by
the point at half the image's size, voxel sizes, axes and, in newer files, shears. A linear transform (`.lta`) leads the
other way: from the moving image to the fixed.
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
from dsiprep.io.vector_image import VectorImage, absolute_or_displacement, finite, read_vectors, write_vectors

__all__ = ["LAYOUTS", "FreeSurferWarp", "is_mgh", "mgh_grid", "read_lta", "read_warp", "warp_of", "write_warp"]

LAYOUTS = ("voxel-absolute", "voxel-displacement", "absolute", "displacement")  # in the order of their codes
INTENT = 1006  # NIFTI_INTENT_DISPVECT
WARP = 3  # FreeSurfer's own intent of a warp, in the version of .mgz files and in the header extension
GEOMETRY, META, GEOMETRY_SHEARED, LAST = 10, 13, 15, -1  # tags
MGH_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
MGH_HEADER, MGH_NAME = 284, 512
LTA_VOXEL, LTA_WORLD = 0, 1


@dataclass(frozen=True, eq=False)
class FreeSurferWarp:
    """A warp and what its file says of the moving image.

    Attributes
    ----------
    field : DisplacementField
        Points of the fixed image to points of the moving image, on the fixed image's grid, RAS+ mm.
    moving : Grid or None
        Of the moving image, where the file has it.
    layout : str
        How the file held it: one of `LAYOUTS`.
    """

    field: DisplacementField
    moving: Grid | None
    layout: str


def read_warp(path: Path | str, layout: str | None = None, moving: Grid | None = None) -> FreeSurferWarp:
    """A warp from `.nii`, `.nii.gz`, `.mgz` or `.mgh`.

    Parameters
    ----------
    path : Path
    layout : str, optional
        One of `LAYOUTS`, for files without the tag that tells it; by default RAS displacements or RAS coordinates, as
        the data say.
    moving : Grid, optional
        Of the moving image, for layouts in voxels; by default from the file.

    Returns
    -------
    FreeSurferWarp

    Raises
    ------
    InputError
        If the file is no warp, or does not say enough.
    """
    path = Path(path)
    if is_mgh(path):
        image, tags = _read_mgh(path)
        return _warp(image, tags, 0, layout, moving)
    return warp_of(read_vectors(path), layout, moving)


def warp_of(image: VectorImage, layout: str | None = None, moving: Grid | None = None) -> FreeSurferWarp:
    """The same, of a NIfTI image that was read already."""
    return _warp(image, dict(_extension_tags(image.extension)), 4, layout, moving)


def _warp(
    image: VectorImage, tags: dict[int, bytes], name_length: int, layout: str | None, moving: Grid | None
) -> FreeSurferWarp:
    path = image.path
    source, target = _geometries(tags, name_length, path)
    grid = image.grid if target is None else target
    if grid.shape != image.data.shape[1:]:
        raise InputError(
            f"{path}: {_times(image.data.shape[1:])} vectors, but the file says that the fixed image has "
            f"{_times(grid.shape)} voxels; write the warp again, with one vector per voxel"
        )
    moving = moving or source
    layout = _layout(tags, path) or layout or _layout_of_data(image, grid)
    return FreeSurferWarp(_displacement(image.data, grid, layout, moving, path), moving, layout)


def write_warp(path: Path | str, field: DisplacementField, moving: Grid) -> None:
    """A warp as FreeSurfer after 7.4 and SynthMorph write it: RAS displacements, intent 1006, both geometries.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    field : DisplacementField
        On the fixed image's grid.
    moving : Grid
        Of the image that the warp moves; FreeSurfer wants to know it.
    """
    geometries = {shear: b"".join(_packed(g, shear) for g in (moving, field.grid)) for shear in (False, True)}
    tags = [
        (GEOMETRY, geometries[False]),
        (GEOMETRY_SHEARED, geometries[True]),
        (META, struct.pack(">iif", LAYOUTS.index("displacement"), 1, 0.0)),
        (LAST, b"*"),  # readers that strip zeros from the end stop here
    ]
    content = struct.pack(">cHB", b">", WARP, 1)
    content += b"".join(struct.pack(">iq", tag, len(data)) + data for tag, data in tags)
    write_vectors(path, field.data.detach().cpu().numpy(), field.grid, INTENT, content)


def read_lta(path: Path | str, source: str = "moving", target: str = "fixed") -> Affine:
    """The linear transform of an `.lta` file, voxels to voxels or RAS to RAS.

    Parameters
    ----------
    path : Path
    source, target : str
        Names of the two spaces.

    Returns
    -------
    Affine
        Points of the destination image to points of the source image: the inverse of what is written in the file.

    Raises
    ------
    InputError
        If the file is no such transform.
    """
    path = Path(path)
    try:
        text = re.sub(r"#.*", "", path.read_text())
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: not readable as text ({problem}); an .lta transform was wanted") from None
    kind = _number(text, r"type\s*=\s*(-?\d+)", path)
    if _number(text, r"nxforms\s*=\s*(\d+)", path) != 1:
        raise InputError(f"{path}: holds several transforms; exactly one was wanted")
    rows = re.search(r"^\s*1\s+4\s+4\s*\n((?:.*\n){4})", text, re.MULTILINE)
    try:
        matrix = np.array([row.split() for row in rows[1].splitlines()], float) if rows else np.empty(0)
    except ValueError:
        matrix = np.empty(0)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise InputError(f"{path}: no invertible matrix of 4 x 4 numbers; an .lta transform was wanted")
    if kind == LTA_VOXEL:
        moving, fixed = (_lta_grid(text, name, path) for name in ("src", "dst"))
        matrix = fixed.affine @ matrix @ np.linalg.inv(moving.affine)
    elif kind != LTA_WORLD:
        raise InputError(
            f"{path}: type {kind}; 0 (voxels to voxels) or 1 (RAS to RAS) was wanted. "
            f"lta_convert --inlta {path.name} --outlta new.lta makes the latter"
        )
    return Affine(np.linalg.inv(matrix), source, target)


def is_mgh(path: Path | str) -> bool:
    """Whether the first bytes are those of an .mgh or .mgz file, a warp or an image."""
    try:
        with Path(path).open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else Path(path).open("rb") as stream:
            start = stream.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == 4 and start[0] == 0 and start[3] == 1


def mgh_grid(path: Path | str) -> Grid:
    """Where the voxels of an .mgz image or warp are."""
    return _mgh_grid(_unpacked(Path(path)), Path(path))


def _mgh_grid(content: bytes, path: Path) -> Grid:
    i, j, k, valid = *struct.unpack_from(">3i", content, 4), struct.unpack_from(">h", content, 28)[0]
    if not valid:
        raise InputError(f"{path}: the header does not say where the voxels are; convert the image again")
    return _grid((i, j, k), struct.unpack_from(">15f", content, 30))


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path}: truncated or damaged ({problem}); copy it again") from None
    if len(content) < MGH_HEADER:
        raise InputError(f"{path}: the file is truncated; copy it again")
    return content


def _read_mgh(path: Path) -> tuple[VectorImage, dict[int, bytes]]:
    """Vectors and tags. nibabel takes version 1 only; warps carry their intent above it: 769 is 3 * 256 + 1."""
    content = _unpacked(path)
    version, i, j, k, frames, kind = struct.unpack_from(">6i", content)
    intent = version >> 8
    if frames != 3 or intent not in (0, WARP) or kind not in MGH_TYPES:
        raise InputError(
            f"{path}: {frames} frames of type {kind} and intent {intent}; a warp has 3 frames of real numbers"
        )
    dtype = np.dtype(MGH_TYPES[kind])
    stop = MGH_HEADER + dtype.itemsize * 3 * i * j * k
    if min(i, j, k) < 1 or len(content) < stop:
        raise InputError(f"{path}: the file is truncated; copy it again")
    data = np.frombuffer(content[MGH_HEADER:stop], dtype).astype(np.float32).reshape(3, k, j, i)
    finite(data, path)
    grid = _mgh_grid(content, path)
    image = VectorImage(np.ascontiguousarray(data.transpose(0, 3, 2, 1)), grid, 4, intent, b"", "", path)
    return image, dict(_mgh_tags(content[stop + 20 :]))  # after five numbers about the scan


def _mgh_tags(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags with their length before them; the geometry's alone has none."""
    geometry = 2 * (struct.calcsize(">4i15f") + MGH_NAME)
    place = 0
    while place + 4 <= len(content):
        tag = struct.unpack_from(">i", content, place)[0]
        place += 4
        if tag == GEOMETRY:
            length = geometry
        elif tag > 0 and place + 8 <= len(content):
            length = struct.unpack_from(">q", content, place)[0]
            place += 8
        else:
            return
        yield tag, content[place : place + length]
        place += max(0, length)


def _extension_tags(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags of the NIfTI header extension, after four bytes: byte order, intent, version."""
    place = 4
    while place + 12 <= len(content):
        tag, length = struct.unpack_from(">iq", content, place)
        if tag in (0, LAST):
            return
        yield tag, content[place + 12 : place + 12 + length]
        place += 12 + max(0, length)


def _geometries(tags: dict[int, bytes], name_length: int, path: Path) -> tuple[Grid | None, Grid | None]:
    """Of the moving and the fixed image.

    In NIfTI a name follows its own length (`name_length` bytes hold it), in .mgz it has a fixed room.
    """
    sheared = GEOMETRY_SHEARED in tags
    content = tags.get(GEOMETRY_SHEARED, tags.get(GEOMETRY))
    if content is None:
        return None, None
    layout = ">4i18f" if sheared else ">4i15f"
    grids: list[Grid | None] = []
    place = 0
    try:
        for _ in range(2):
            valid, i, j, k, *numbers = struct.unpack_from(layout, content, place)
            place += struct.calcsize(layout)
            name = struct.unpack_from(">i", content, place)[0] if name_length else MGH_NAME
            place += name_length + name
            grids.append(_grid((i, j, k), numbers) if valid else None)
    except struct.error:
        raise InputError(f"{path}: the geometries in the header are cut short; copy or make the warp again") from None
    return grids[0], grids[1]


def _grid(shape: tuple[int, int, int], numbers: tuple[float, ...] | list[float]) -> Grid:
    """From voxel sizes (3), axes one after the other (9), the point at half the size (3), and shears (3) or none."""
    sizes, axes, centre = np.array(numbers[:3]), np.array(numbers[3:12]).reshape(3, 3).T, np.array(numbers[12:15])
    shear = np.eye(3)
    if len(numbers) > 15:
        shear[0, 1], shear[0, 2], shear[1, 2] = numbers[15:18]
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(sizes) @ shear
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


def _packed(grid: Grid, with_shear: bool) -> bytes:
    """A geometry as the header extension holds it, with an empty name."""
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


def _layout(tags: dict[int, bytes], path: Path) -> str | None:
    if META not in tags:
        return None
    code = struct.unpack_from(">i", tags[META])[0] if len(tags[META]) >= 4 else -1
    if code not in range(len(LAYOUTS)):
        raise InputError(f"{path}: holds a warp of format {code}; 0 to 3 are known")
    return LAYOUTS[code]


def _layout_of_data(image: VectorImage, grid: Grid) -> str:
    found = absolute_or_displacement(image.data, _points(grid))
    if found is None and image.intent == INTENT:
        return "displacement"
    if found is None:
        raise InputError(
            f"{image.path}: the values could be displacements or coordinates; say which with "
            "--kind freesurfer or --kind easyreg"
        )
    return found


def _points(grid: Grid) -> np.ndarray:
    """World places of the voxels, (3, i, j, k)."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return np.moveaxis(grid.to_world(voxels), -1, 0)


def _displacement(data: np.ndarray, grid: Grid, layout: str, moving: Grid | None, path: Path) -> DisplacementField:
    if layout == "displacement":
        return DisplacementField(torch.from_numpy(data), grid)
    values = data.astype(float)
    if layout.startswith("voxel"):
        if moving is None:
            raise InputError(
                f"{path}: voxels of the moving image, whose geometry the file does not hold; "
                "name that image with --source"
            )
        if layout == "voxel-displacement":
            values += np.indices(grid.shape)
        values = np.moveaxis(moving.to_world(np.moveaxis(values, 0, -1)), -1, 0)
    return DisplacementField(torch.from_numpy((values - _points(grid)).astype(np.float32)), grid)


def _lta_grid(text: str, name: str, path: Path) -> Grid:
    part = re.search(rf"{name} volume info(.*?)(?:dst volume info|$)", text, re.DOTALL)
    found = {} if part is None else dict(re.findall(r"(\w+)[ \t]*=[ \t]*(.*)", part[1]))
    try:
        valid = int(found["valid"])
        keys = ("voxelsize", "xras", "yras", "zras", "cras")
        numbers = [float(n) for key in keys for n in found[key].split()]
        i, j, k = (int(n) for n in found["volume"].split())
    except (KeyError, ValueError):
        valid, numbers = 0, []
    if not valid or len(numbers) != 15:
        raise InputError(
            f"{path}: voxels to voxels, without the geometry of the {name} image; "
            f"lta_convert --inlta {path.name} --outlta new.lta with --src and --trg adds it"
        )
    return _grid((i, j, k), numbers)


def _number(text: str, pattern: str, path: Path) -> int:
    found = re.search(rf"^\s*{pattern}", text, re.MULTILINE)
    if not found:
        raise InputError(f"{path}: no line {pattern.partition(chr(92))[0]!r}; an .lta transform was wanted")
    return int(found[1])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
