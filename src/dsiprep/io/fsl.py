"""Warps as FNIRT, topup and convertwarp keep them, in FSL's own coordinates.

Those are millimetres from the first voxel along the voxel axes, the first axis counted backwards where the axes are
right-handed (positive determinant, which FSL calls neurological). They know neither an origin nor a rotation, so a warp
means nothing without the geometry of the image that it moves.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError
from dsiprep.io.vector_image import SHARE, VectorImage, distance_from_identity

__all__ = ["COEFFICIENTS", "FIELD", "fsl_coordinates", "warp_of"]

FIELD = 2006  # intent of a displacement field
COEFFICIENTS = {
    2007: "cubic B-spline coefficients",
    2008: "cosine coefficients",
    2009: "quadratic B-spline coefficients",
    2016: "topup's cubic B-spline coefficients",
    2017: "topup's quadratic B-spline coefficients",
}


def fsl_coordinates(grid: Grid) -> np.ndarray:
    """Voxels to FSL's coordinates in mm, (4, 4)."""
    matrix = np.diag([*grid.voxel_sizes, 1.0])
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        matrix[0, 0] *= -1
        matrix[0, 3] = (grid.shape[0] - 1) * grid.voxel_sizes[0]
    return matrix


def warp_of(
    image: VectorImage, moving: Grid | None, fixed: Grid | None = None, absolute: bool | None = None
) -> DisplacementField:
    """A warp field of FNIRT, topup or convertwarp.

    Parameters
    ----------
    image : VectorImage
        As it was read; `io.vectors.read_vectors` takes `fixed` where the header does not say where the voxels are, as
        convertwarp left it before FSL 6.0.5.
    moving : Grid or None
        Of the image that the warp moves (`--in` of applywarp); None ends in an error that asks for it.
    fixed : Grid, optional
        Of the image that the warp was made for (`--ref`); by default, what the warp's own header says.
    absolute : bool, optional
        Whether the file holds coordinates (`--abs`) or displacements (`--rel`); by default told from the data.

    Returns
    -------
    DisplacementField
        Points of the fixed to points of the moving image, on the warp's grid, RAS+ mm.

    Raises
    ------
    InputError
        If the file holds coefficients, or does not say enough.

    References
    ----------
    FSL's convention as fslpy documents it (`fsl.transform.fnirt`); Jenkinson et al. 2012
    (doi 10.1016/j.neuroimage.2011.09.015).
    """
    path = image.path
    if image.intent in COEFFICIENTS:
        raise InputError(
            f"{path}: {COEFFICIENTS[image.intent]}, not a field; fnirtfileutils --in={path.name} "
            "--ref=REFERENCE --out=field.nii.gz --withaff makes one"
        )
    if moving is None:
        raise InputError(
            f"{path}: FSL counts from a corner of the image that the warp moves, and the file does not say where that "
            "is; name that image with --source"
        )
    fixed = fixed or image.grid
    world = image.grid.to_world(np.moveaxis(np.indices(image.grid.shape), 0, -1))
    own = _apply(fsl_coordinates(fixed), fixed.to_voxels(world))
    to_world = moving.affine @ np.linalg.inv(fsl_coordinates(moving))
    values = np.moveaxis(image.data, 0, -1).astype(float)
    places = {reading: _apply(to_world, values + own * (not reading)) for reading in (True, False)}
    reached = places[_is_absolute(places, world, image) if absolute is None else absolute]
    return DisplacementField(torch.from_numpy(_first((reached - world).astype(np.float32))), image.grid)


def _is_absolute(places: dict[bool, np.ndarray], world: np.ndarray, image: VectorImage) -> bool:
    """Which reading of the values gives a map that is nearer to none at all: the other doubles or halves lengths."""
    far = {reading: distance_from_identity(_first(where), _first(world)) for reading, where in places.items()}
    nearer = min(far, key=lambda reading: far[reading])
    if far[nearer] > SHARE * far[not nearer]:
        raise InputError(
            f"{image.path}: the values could be displacements or coordinates; say which with "
            "--kind fsl or --kind fsl-absolute"
        )
    return nearer


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _first(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0))
