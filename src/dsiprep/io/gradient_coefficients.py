"""Read the fields of gradient coils: Siemens' coefficients, or a displacement field from another program."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dsiprep.data.gradient_coil import CoilFields, GradientCoil
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError
from dsiprep.io import itk
from dsiprep.io.files import check_file
from dsiprep.io.vector_image import read_vectors

__all__ = ["read_coil_fields"]

RADIUS = re.compile(r"([\d.]+(?:[eE][-+]?\d+)?)\s*(m?)\s*=\s*R0")
TERM = re.compile(
    r"^\s*\d+\s+([AB])\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s+([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s+([xyz])\b", re.MULTILINE
)
OTHERS = (
    "; give Siemens' coefficients (.grad, .coef), or the displacement as an ITK field (.nii, .nii.gz) that maps points "
    "of the scanner to points of the images"
)
LARGEST_DEGREE = 30


def read_coil_fields(path: Path) -> CoilFields:
    """Read coefficients or a displacement field, by the extension of the file.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`: an ITK displacement field in mm LPS+ on a grid in scanner coordinates, with the isocentre
        at the origin, that maps true to apparent positions, as TORTOISE's do. Otherwise text in Siemens' format.

    Returns
    -------
    GradientCoil or DisplacementField

    Raises
    ------
    InputError
        If the file is missing or holds anything else.
    """
    path = Path(path)
    check_file(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return _displacement(path)
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}{OTHERS}") from None
    return _siemens(text, path)


def _displacement(path: Path) -> DisplacementField:
    return itk.displacement_of(read_vectors(path))


def _siemens(text: str, path: Path) -> GradientCoil:
    """Coefficients A(n, m) and B(n, m) of the coils x, y and z, and their radius R0 in m."""
    radius, terms = RADIUS.search(text), TERM.findall(text)
    if radius is None or not terms:
        missing = "no radius R0" if radius is None else "no coefficients A(n, m) or B(n, m)"
        raise InputError(f"{path}: {missing}{OTHERS}")
    degree = max(int(n) for _, n, *_ in terms)
    if degree > LARGEST_DEGREE or any(int(m) > int(n) for _, n, m, *_ in terms):
        raise InputError(f"{path}: a coefficient of degree {degree}, or with m > n; correct the file")
    coefficients = np.zeros((2, 3, degree + 1, degree + 1))
    for kind, n, m, value, axis in terms:
        coefficients["AB".index(kind), "xyz".index(axis), int(n), int(m)] = float(value)
    if not coefficients.any():
        raise InputError(f"{path}: all coefficients are 0; give those of the scanner's gradient coil")
    return GradientCoil(1000 * float(radius[1]), coefficients[0], coefficients[1])
