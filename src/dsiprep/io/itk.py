"""Transforms as ITK and ANTs read and write them. The only place where LPS appears.

An ITK transform maps points of the output image to points of the input image, as ours do; only the signs
of the first two axes differ. A composite lists its transforms so that the last one is applied first.
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
SHEARED = 1e-3  # cosine between two axes
COMPOSITE = "CompositeTransform_double_3_3"
TEXT_HEADER = "#Insight Transform File V1.0"
LINEAR = ("AffineTransform", "MatrixOffsetTransformBase", "Rigid3DTransform", "ScaleSkewVersor3DTransform")
NIFTI_INTENT = 1007  # a vector, which ITK leaves as it is
EULER = ("Euler3DTransform", "CenteredEuler3DTransform")


def write_composite_h5(path: Path | str, chain: Chain) -> None:
    """A chain as an ITK composite transform, float32 fields and float64 matrices.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    with _whole(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("TransformGroup")
        _write_group(group, 0, COMPOSITE, None, None)
        for number, step in enumerate(reversed(chain.steps), start=1):
            if isinstance(step, Affine):
                _write_group(group, number, "AffineTransform_double_3_3", *_linear_parameters(step.matrix))
            else:
                _write_group(group, number, "DisplacementFieldTransform_float_3_3", *_field_parameters(step))


def write_displacement_h5(path: Path | str, field: DisplacementField) -> None:
    """One displacement field as an ITK transform file with nothing else in it."""
    with _whole(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("TransformGroup")
        _write_group(group, 0, "DisplacementFieldTransform_float_3_3", *_field_parameters(field))


def read_composite_h5(path: Path | str, source: str = "source", target: str = "target") -> Chain:
    """An ITK .h5 transform, composite or single.

    Parameters
    ----------
    path : Path
    source, target : str
        Names of the two spaces, which the file does not hold.

    Returns
    -------
    Chain
        In the order of application.

    Raises
    ------
    InputError
        If the file is no ITK transform, or holds a kind that is neither linear nor a displacement field.
    """
    path = Path(path)
    steps: list[Affine | DisplacementField] = []
    try:
        with h5py.File(path, "r") as file:
            group = file["TransformGroup"]
            for number in sorted(group, key=int):
                kind = _text(group[number]["TransformType"][0])
                if not kind.startswith("CompositeTransform"):
                    parameters = _dataset(group[number], "Parameters")
                    fixed = _dataset(group[number], "FixedParameters")
                    steps.append(_step(kind, parameters, fixed, path, source, target))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not an ITK transform in HDF5: {error}") from error
    return Chain(tuple(reversed(steps)), source, target)


def displacement_of(image: VectorImage) -> DisplacementField:
    """A displacement field as ITK and ANTs keep it in NIfTI: LPS, whatever the header says the axes are."""
    return DisplacementField(torch.from_numpy(image.data * SIGNS[:, None, None, None]), image.grid)


def write_displacement_nifti(path: Path | str, field: DisplacementField) -> None:
    """A displacement field as ANTs writes its warps: NIfTI, intent 1007, LPS.

    Raises
    ------
    OutputError
        If the file cannot be written, or the grid is sheared: ITK would straighten it without a word.
    """
    axes = field.grid.directions
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEARED:
        raise OutputError(
            f"{path}: the grid's axes are not at right angles, and ITK straightens such NIfTI files without a "
            "word; write .h5, or name an image with other axes as --reference"
        )
    data = field.data.detach().cpu().numpy() * SIGNS[:, None, None, None]
    write_vectors(path, data, field.grid, NIFTI_INTENT)


def write_affine(path: Path | str, transform: Affine) -> None:
    """A linear transform as ANTs writes it: MATLAB v4 for `.mat`, text for `.txt` and `.tfm`.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".mat":
        parameters, fixed = _linear_parameters(transform.matrix)
        content = _matlab("AffineTransform_double_3_3", parameters) + _matlab("fixed", fixed)
        with _whole(path) as temporary:
            temporary.write_bytes(content)
    else:
        write_affine_series(path, transform.matrix[None])


def write_affine_series(path: Path | str, matrices: np.ndarray) -> None:
    """Several linear transforms (n, 4, 4), RAS+ pull maps, as one ITK text file in that order."""
    lines = [TEXT_HEADER]
    for number, matrix in enumerate(np.asarray(matrices, float)):
        parameters, fixed = _linear_parameters(matrix)
        lines += [
            f"#Transform {number}",
            "Transform: AffineTransform_double_3_3",
            "Parameters: " + " ".join(repr(float(p)) for p in parameters),
            "FixedParameters: " + " ".join(repr(float(p)) for p in fixed),
        ]
    with _whole(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def write_eddy_series(path: Path | str, eddy: EddyCurrents, grid: Grid) -> None:
    """Displacements of volumes on `grid` as ITK B-spline transforms in one text file, one per volume.

    A cubic B-spline holds a polynomial of second order exactly, so 4 x 4 x 4 coefficients around the image do: x² at
    knots h apart has the coefficients t² - h²/3. Points outside the image are not displaced.
    """
    physical = grid.voxel_sizes * np.asarray(grid.shape)  # one mesh cell over the whole image, faces included
    corner = grid.to_world(np.full(3, -0.5))
    knots = [np.arange(-1, 3) * side for side in physical]
    where = np.stack(np.meshgrid(*knots, indexing="ij"), axis=-1)
    s = (where + (corner - eddy.centre) @ eddy.axes) / EDDY_MM
    x, y, z = np.moveaxis(s, -1, 0)
    terms = np.stack(eddy_terms(x, y, z))
    terms[4:7] -= ((physical / EDDY_MM) ** 2 / 3)[:, None, None, None]
    direction = FLIP[:3, :3] @ eddy.axes
    origin = FLIP[:3, :3] @ (corner - eddy.axes @ physical)
    fixed = np.concatenate([[4, 4, 4], origin, physical, direction.ravel()])
    lines = [TEXT_HEADER]
    for number, coefficients in enumerate(eddy.coefficients):
        along = np.tensordot(coefficients, terms, axes=1)
        values = direction[:, eddy.along, None, None, None] * along
        lines += [
            f"#Transform {number}",
            "Transform: BSplineTransform_double_3_3",
            "Parameters: " + " ".join(f"{p:.9g}" for p in values.transpose(0, 3, 2, 1).ravel()),
            "FixedParameters: " + " ".join(repr(float(p)) for p in fixed),
        ]
    with _whole(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_affine(path: Path | str, source: str = "source", target: str = "target") -> Affine:
    """A linear transform in HDF5, as text or in MATLAB's format (v4); the content tells which.

    Raises
    ------
    InputError
        If the file holds anything else than one linear transform.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); a linear transform of ITK was wanted") from error
    if start[:4] == b"\x89HDF" or path.suffix == ".h5":
        steps: tuple[Affine | DisplacementField, ...] = read_composite_h5(path, source, target).steps
    elif path.suffix == ".mat" and start != b"#Insight":
        steps = (_read_matlab(path, source, target),)
    else:
        steps = tuple(Affine(matrix, source, target) for matrix in read_affine_series(path))
    if len(steps) != 1 or not isinstance(steps[0], Affine):
        raise InputError(f"{path}: holds {len(steps)} transforms; exactly one linear transform was wanted")
    return steps[0]


def read_affine_series(path: Path | str) -> np.ndarray:
    """All linear transforms of an ITK text file as RAS+ matrices, (n, 4, 4).

    Raises
    ------
    InputError
        If the file is no ITK text file, or holds other transforms.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not an ITK text transform: {error}") from error
    if not lines or not lines[0].startswith("#Insight Transform File"):
        raise InputError(f"{path}: does not begin with {TEXT_HEADER!r}; an ITK text transform was wanted")
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
    """y = A (x - c) + c + t, brought to RAS+."""
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
        raise InputError(f"{path}: {kind} with {len(parameters)} parameters; a linear transform was wanted")
    lps[:3, 3] = shift + centre - lps[:3, :3] @ centre
    return FLIP @ lps @ FLIP


def _euler(angles: np.ndarray, zyx: bool) -> np.ndarray:
    """ITK's Euler3DTransform: Rz Rx Ry, or Rz Ry Rx where its flag says so."""
    turns = []
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        turns.append(turn)
    x, y, z = turns
    return z @ y @ x if zyx else z @ x @ y


def _field_parameters(field: DisplacementField) -> tuple[np.ndarray, np.ndarray]:
    grid, lps = field.grid, FLIP @ field.grid.affine
    direction = lps[:3, :3] / grid.voxel_sizes  # columns are divided: each is one axis
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
        large = parameters.size > 1000
        packing = {"chunks": True, "compression": "gzip", "compression_opts": 1, "shuffle": True} if large else {}
        entry.create_dataset("TransformParameters", data=parameters, **packing)
        entry.create_dataset("TransformFixedParameters", data=fixed.astype(np.float64))


def _dataset(group: h5py.Group, name: str) -> np.ndarray:
    """Old files spell it "Tranform"."""
    for prefix in ("Transform", "Tranform"):
        if prefix + name in group:
            return group[prefix + name][()]
    raise KeyError(f"no Transform{name} in {group.name}")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _matlab(name: str, values: np.ndarray) -> bytes:
    """One column of doubles as MATLAB level 4 holds it: five little-endian int32, the name, the numbers."""
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
        raise InputError(f"{path}: variables {kinds}; one transform and its fixed parameters were wanted")
    parameters = np.asarray(content[kinds[0]], float).ravel()
    fixed = np.asarray(content["fixed"], float).ravel()
    return Affine(_linear_matrix(kinds[0], parameters, fixed, path), source, target)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is complete."""
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
