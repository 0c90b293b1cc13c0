"""Read and write the transform files of ITK and ANTs; LPS+ coordinates are confined to this module.

An ITK transform maps points of the output image to points of the input image, as transforms do in dsiprep; only the
signs of the first two axes differ. The last transform of an ITK composite is applied first.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from isal import isal_zlib

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EDDY_MM, Affine, Chain, DisplacementField, EddyCurrents, eddy_terms
from dsiprep.errors import InputError, OutputError
from dsiprep.io.vector_image import VectorImage, write_vectors

__all__ = [
    "displacement_of",
    "read_affine",
    "read_affine_series",
    "read_composite_h5",
    "write_affine",
    "write_affine_series",
    "write_composite_h5",
    "write_displacement_h5",
    "write_displacement_nifti",
    "write_eddy_series",
]

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
SIGNS = np.array([-1, -1, 1], np.float32)
SHEAR_TOLERANCE = 1e-3  # cosine of the angle between two axes
COMPOSITE = "CompositeTransform_double_3_3"
TEXT_HEADER = "#Insight Transform File V1.0"
LINEAR = ("AffineTransform", "MatrixOffsetTransformBase", "Rigid3DTransform", "ScaleSkewVersor3DTransform")
NIFTI_INTENT = 1007  # NIFTI_INTENT_VECTOR, whose values ITK does not convert
CHUNK_VALUES = 2**17  # of parameters in HDF5; fewer are not compressed
EULER = ("Euler3DTransform", "CenteredEuler3DTransform")


def write_composite_h5(path: Path | str, chain: Chain) -> None:
    """Write a chain as an ITK composite transform with float32 fields and float64 matrices.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    with _atomic_write(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("TransformGroup")
        _write_group(group, 0, COMPOSITE, None, None)
        for number, step in enumerate(reversed(chain.steps), start=1):
            if isinstance(step, Affine):
                _write_group(group, number, "AffineTransform_double_3_3", *_linear_parameters(step.matrix))
            else:
                _write_group(group, number, "DisplacementFieldTransform_float_3_3", *_field_parameters(step))


def write_displacement_h5(path: Path | str, field: DisplacementField) -> None:
    """Write a single displacement field as an ITK transform file that is not a composite."""
    with _atomic_write(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("TransformGroup")
        _write_group(group, 0, "DisplacementFieldTransform_float_3_3", *_field_parameters(field))


def read_composite_h5(path: Path | str, source: str = "source", target: str = "target") -> Chain:
    """Read an ITK .h5 transform, composite or single.

    Parameters
    ----------
    path : Path
    source, target : str
        Names of the two spaces, which the file does not contain.

    Returns
    -------
    Chain
        Steps in order of application.

    Raises
    ------
    InputError
        If the file is not an ITK transform, or contains one that is neither linear nor a displacement field.
    """
    path = Path(path)
    steps: list[Affine | DisplacementField] = []
    try:
        with h5py.File(path, "r") as file:
            group = file["TransformGroup"]
            for number in sorted(group, key=int):
                kind = _as_text(group[number]["TransformType"][0])
                if not kind.startswith("CompositeTransform"):
                    parameters = _dataset(group[number], "Parameters")
                    fixed = _dataset(group[number], "FixedParameters")
                    steps.append(_step(kind, parameters, fixed, path, source, target))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not an ITK transform in HDF5: {error}") from error
    return Chain(tuple(reversed(steps)), source, target)


def displacement_of(image: VectorImage) -> DisplacementField:
    """Convert a NIfTI warp of ITK or ANTs, whose vectors are LPS+ for any voxel axes, to a displacement field."""
    return DisplacementField(torch.from_numpy(image.data * SIGNS[:, None, None, None]), image.grid)


def write_displacement_nifti(path: Path | str, field: DisplacementField) -> None:
    """Write a displacement field like a warp of ANTs: NIfTI with intent code 1007 and LPS+ vectors.

    Raises
    ------
    OutputError
        If the file cannot be written, or the grid is sheared, which ITK would silently orthogonalise.
    """
    axes = field.grid.directions
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR_TOLERANCE:
        raise OutputError(
            f"{path}: the axes of the grid are not at right angles, and ITK silently orthogonalises such NIfTI files; "
            "write .h5, or give an image without shear as --reference"
        )
    data = field.data.detach().cpu().numpy() * SIGNS[:, None, None, None]
    write_vectors(path, data, field.grid, NIFTI_INTENT)


def write_affine(path: Path | str, transform: Affine) -> None:
    """Write a linear transform as ANTs does: MATLAB v4 for `.mat`, text for other extensions such as `.txt`.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".mat":
        parameters, fixed = _linear_parameters(transform.matrix)
        content = _matlab_vector("AffineTransform_double_3_3", parameters) + _matlab_vector("fixed", fixed)
        with _atomic_write(path) as temporary:
            temporary.write_bytes(content)
    else:
        write_affine_series(path, transform.matrix[None])


def write_affine_series(path: Path | str, matrices: np.ndarray) -> None:
    """Write linear transforms (n, 4, 4), from output to input points in RAS+, to one ITK text file in that order."""
    lines = [TEXT_HEADER]
    for number, matrix in enumerate(np.asarray(matrices, float)):
        parameters, fixed = _linear_parameters(matrix)
        lines += [
            f"#Transform {number}",
            "Transform: AffineTransform_double_3_3",
            "Parameters: " + " ".join(repr(float(p)) for p in parameters),
            "FixedParameters: " + " ".join(repr(float(p)) for p in fixed),
        ]
    with _atomic_write(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def write_eddy_series(path: Path | str, eddy: EddyCurrents, grid: Grid) -> None:
    """Write the eddy-current displacement of volumes on `grid` to one text file of ITK B-spline transforms.

    There is one transform per volume. A cubic B-spline represents a second-order polynomial exactly, so one mesh cell
    with 4 x 4 x 4 coefficients suffices: for x² and knots t spaced by h, they are t² - h²/3. Points outside the image
    are not displaced.
    """
    physical = grid.voxel_sizes * np.asarray(grid.shape)  # one mesh cell covers the image up to its outer faces
    corner = grid.to_world(np.full(3, -0.5))
    knots = [np.arange(-1, 3) * side for side in physical]
    knot_points = np.stack(np.meshgrid(*knots, indexing="ij"), axis=-1)
    scaled = (knot_points + (corner - eddy.centre) @ eddy.axes) / EDDY_MM
    x, y, z = np.moveaxis(scaled, -1, 0)
    terms = np.stack(eddy_terms(x, y, z))
    terms[4:7] -= ((physical / EDDY_MM) ** 2 / 3)[:, None, None, None]
    direction = FLIP[:3, :3] @ eddy.axes
    origin = FLIP[:3, :3] @ (corner - eddy.axes @ physical)
    fixed = np.concatenate([[4, 4, 4], origin, physical, direction.ravel()])
    lines = [TEXT_HEADER]
    for number, coefficients in enumerate(eddy.coefficients):
        displacement = np.tensordot(coefficients, terms, axes=1)
        values = direction[:, eddy.along, None, None, None] * displacement
        lines += [
            f"#Transform {number}",
            "Transform: BSplineTransform_double_3_3",
            "Parameters: " + " ".join(f"{p:.9g}" for p in values.transpose(0, 3, 2, 1).ravel()),
            "FixedParameters: " + " ".join(repr(float(p)) for p in fixed),
        ]
    with _atomic_write(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_affine(path: Path | str, source: str = "source", target: str = "target") -> Affine:
    """Read a linear transform from HDF5, text or MATLAB v4, as inferred from content and extension.

    Raises
    ------
    InputError
        If the file contains anything other than one linear transform.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a linear transform of ITK") from error
    if start[:4] == b"\x89HDF" or path.suffix == ".h5":
        steps: tuple[Affine | DisplacementField, ...] = read_composite_h5(path, source, target).steps
    elif path.suffix == ".mat" and start != b"#Insight":
        steps = (_read_matlab(path, source, target),)
    else:
        steps = tuple(Affine(matrix, source, target) for matrix in read_affine_series(path))
    if len(steps) != 1 or not isinstance(steps[0], Affine):
        raise InputError(f"{path}: contains {len(steps)} transforms; expected exactly one linear transform")
    return steps[0]


def read_affine_series(path: Path | str) -> np.ndarray:
    """Read all linear transforms of an ITK text file as RAS+ matrices, (n, 4, 4).

    Raises
    ------
    InputError
        If the file is not an ITK text file, or contains other transforms.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not an ITK text transform: {error}") from error
    if not lines or not lines[0].startswith("#Insight Transform File"):
        raise InputError(f"{path}: does not begin with {TEXT_HEADER!r}; expected an ITK text transform")
    matrices, kind, parameters = [], "", np.empty(0)
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key == "Transform":
            kind = value.strip()
        elif key == "Parameters":
            parameters = np.array(value.split(), float)
        elif key == "FixedParameters":
            matrices.append(_linear_matrix(kind, parameters, np.array(value.split(), float), path))
    return np.stack(matrices) if matrices else np.zeros((0, 4, 4))


def _linear_parameters(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lps = FLIP @ np.asarray(matrix, float) @ FLIP
    return np.concatenate([lps[:3, :3].ravel(), lps[:3, 3]]), np.zeros(3)


def _linear_matrix(kind: str, parameters: np.ndarray, fixed: np.ndarray, path: Path) -> np.ndarray:
    """Matrix of y = A (x - c) + c + t in RAS+, from ITK's parameters and fixed parameters (the centre c)."""
    name = kind.split("_")[0]
    centre = fixed[:3] if len(fixed) >= 3 else np.zeros(3)
    lps = np.eye(4)
    if name in LINEAR and len(parameters) == 12:
        lps[:3, :3], shift = parameters[:9].reshape(3, 3), parameters[9:]
    elif name in EULER and len(parameters) >= 6:
        zyx = len(fixed) > 3 and fixed[3] != 0
        lps[:3, :3], shift = _euler(parameters[:3], zyx), parameters[-3:]
    elif name == "TranslationTransform" and len(parameters) == 3:
        shift = parameters
    elif name == "IdentityTransform":
        shift = np.zeros(3)
    else:
        raise InputError(f"{path}: {kind} with {len(parameters)} parameters; expected a linear transform")
    lps[:3, 3] = shift + centre - lps[:3, :3] @ centre
    return FLIP @ lps @ FLIP


def _euler(angles: np.ndarray, zyx: bool) -> np.ndarray:
    """Rotation matrix of ITK's Euler3DTransform: Rz Rx Ry, or Rz Ry Rx if its ZYX flag is set."""
    rotations = []
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        rotation = np.eye(3)
        rotation[a, a] = rotation[b, b] = np.cos(angle)
        rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
        rotations.append(rotation)
    x, y, z = rotations
    return z @ y @ x if zyx else z @ x @ y


def _field_parameters(field: DisplacementField) -> tuple[np.ndarray, np.ndarray]:
    grid, lps = field.grid, FLIP @ field.grid.affine
    direction = lps[:3, :3] / grid.voxel_sizes  # divides the columns, one per axis
    fixed = np.concatenate([grid.shape, lps[:3, 3], grid.voxel_sizes, direction.ravel()])
    data = field.data.detach().cpu().numpy().astype(np.float32)
    return (data.transpose(3, 2, 1, 0) * SIGNS).ravel(), fixed


def _field(parameters: np.ndarray, fixed: np.ndarray, path: Path) -> DisplacementField:
    i, j, k = (int(n) for n in fixed[:3])
    if len(parameters) != 3 * i * j * k:
        raise InputError(f"{path}: {len(parameters)} values for a displacement field of {i} x {j} x {k} voxels")
    lps = np.eye(4)
    lps[:3, :3] = fixed[9:18].reshape(3, 3) * fixed[6:9]
    lps[:3, 3] = fixed[3:6]
    data = parameters.astype(np.float32).reshape(k, j, i, 3) * SIGNS
    return DisplacementField(
        torch.from_numpy(np.ascontiguousarray(data.transpose(3, 2, 1, 0))), Grid((i, j, k), FLIP @ lps)
    )


def _step(
    kind: str, parameters: np.ndarray, fixed: np.ndarray, path: Path, source: str, target: str
) -> Affine | DisplacementField:
    if kind.startswith("DisplacementFieldTransform"):
        return _field(parameters, fixed, path)
    return Affine(_linear_matrix(kind, parameters.astype(float), fixed, path), source, target)


def _write_group(
    group: h5py.Group, number: int, kind: str, parameters: np.ndarray | None, fixed: np.ndarray | None
) -> None:
    entry = group.create_group(str(number))
    entry.create_dataset("TransformType", data=[kind.encode()], dtype=h5py.string_dtype("ascii"))
    if parameters is not None and fixed is not None:
        if parameters.size > CHUNK_VALUES:
            _write_compressed(entry, "TransformParameters", parameters)
        else:
            entry.create_dataset("TransformParameters", data=parameters)
        entry.create_dataset("TransformFixedParameters", data=fixed.astype(np.float64))


def _write_compressed(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write values (n,) through HDF5's filters "shuffle" and "gzip", compressed by ISA-L, which is faster."""
    chunks, kind = (CHUNK_VALUES,), values.dtype
    data = group.create_dataset(name, values.shape, kind, chunks=chunks, compression="gzip", shuffle=True)
    for first in range(0, len(values), CHUNK_VALUES):
        part = values[first : first + CHUNK_VALUES]
        chunk = np.zeros(CHUNK_VALUES, kind)
        chunk[: len(part)] = part
        shuffled = np.ascontiguousarray(chunk.view(np.uint8).reshape(-1, kind.itemsize).T)
        data.id.write_direct_chunk((first,), isal_zlib.compress(shuffled))


def _dataset(group: h5py.Group, name: str) -> np.ndarray:
    """Read a dataset whose name begins with "Transform", misspelled "Tranform" in old files."""
    for prefix in ("Transform", "Tranform"):
        if prefix + name in group:
            return group[prefix + name][()]
    raise KeyError(f"no Transform{name} in {group.name}")


def _as_text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _matlab_vector(name: str, values: np.ndarray) -> bytes:
    """A column of doubles in MATLAB level 4 format: five little-endian int32, the name and the values."""
    label = name.encode() + b"\0"
    header = struct.pack("<5i", 0, len(values), 1, 0, len(label))
    return header + label + np.asarray(values, "<f8").tobytes()


def _read_matlab(path: Path, source: str, target: str) -> Affine:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
    except (OSError, ValueError, NotImplementedError, TypeError, MatReadError) as error:
        raise InputError(f"{path}: not an ANTs .mat transform: {error}") from error
    kinds = [key for key in content if not key.startswith("__") and key != "fixed"]
    if len(kinds) != 1 or "fixed" not in content:
        raise InputError(f"{path}: variables {kinds}; expected one transform and its fixed parameters")
    parameters = np.asarray(content[kinds[0]], float).ravel()
    fixed = np.asarray(content["fixed"], float).ravel()
    return Affine(_linear_matrix(kinds[0], parameters, fixed, path), source, target)


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` on success and removed on failure."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
