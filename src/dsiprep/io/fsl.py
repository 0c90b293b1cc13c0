"""Read warps of FNIRT, topup and convertwarp, which use FSL's scaled voxel coordinates.

These are millimetres from the first voxel along the voxel axes, with the first axis reversed if the affine has a
positive determinant (which FSL calls neurological). They include neither origin nor rotation, so a warp can only be
interpreted with the geometry of its moving image.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError
from dsiprep.io.vector_image import DECISIVE_RATIO, VectorImage, distance_from_identity

__all__ = ["COEFFICIENTS", "FIELD", "fsl_coordinates", "warp_of"]

FIELD = 2006  # NIfTI intent code of a displacement field
COEFFICIENTS = {  # NIfTI intent codes of coefficient images
    2007: "cubic B-spline coefficients",
    2008: "cosine coefficients",
    2009: "quadratic B-spline coefficients",
    2016: "topup's cubic B-spline coefficients",
    2017: "topup's quadratic B-spline coefficients",
}


def fsl_coordinates(grid: Grid) -> np.ndarray:
    """Affine from voxels to FSL's scaled voxel coordinates in mm, (4, 4)."""
    matrix = np.diag([*grid.voxel_sizes, 1.0])
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        matrix[0, 0] *= -1
        matrix[0, 3] = (grid.shape[0] - 1) * grid.voxel_sizes[0]
    return matrix


def warp_of(
    image: VectorImage, moving: Grid | None, fixed: Grid | None = None, absolute: bool | None = None
) -> DisplacementField:
    """Convert a warp field of FNIRT, topup or convertwarp to a displacement field.

    Parameters
    ----------
    image : VectorImage
        The warp. convertwarp before FSL 6.0.5 wrote no orientation; pass `fixed` to `io.vector_image.read_vectors` for
        such files.
    moving : Grid or None
        Grid of the moving image (`--in` of applywarp). It is required; None raises an error that asks for it.
    fixed : Grid, optional
        Grid of the reference image of the warp (`--ref`); by default, the grid of the warp.
    absolute : bool, optional
        Whether the file contains coordinates (`--abs`) or displacements (`--rel`); by default inferred from the values.

    Returns
    -------
    DisplacementField
        From points of the fixed image to points of the moving image, on the grid of the warp, RAS+ mm.

    Raises
    ------
    InputError
        If the file contains coefficients, or information is missing or ambiguous.

    References
    ----------
    FSL's convention as documented in fslpy (`fsl.transform.fnirt`); Jenkinson et al. 2012
    (doi 10.1016/j.neuroimage.2011.09.015).
    """
    path = image.path
    if image.intent in COEFFICIENTS:
        raise InputError(
            f"{path}: {COEFFICIENTS[image.intent]}, not a field; convert them with fnirtfileutils "
            f"--in={path.name} --ref=REFERENCE --out=field.nii.gz --withaff"
        )
    if moving is None:
        raise InputError(
            f"{path}: FSL warps are relative to a corner of the moving image, whose geometry is not in the file; give "
            "that image with --source"
        )
    fixed = fixed or image.grid
    world = image.grid.to_world(np.moveaxis(np.indices(image.grid.shape), 0, -1))
    fixed_fsl = _apply(fsl_coordinates(fixed), fixed.to_voxels(world))
    moving_to_world = moving.affine @ np.linalg.inv(fsl_coordinates(moving))
    values = np.moveaxis(image.data, 0, -1).astype(float)
    mapped = {assumed: _apply(moving_to_world, values + fixed_fsl * (not assumed)) for assumed in (True, False)}
    target = mapped[_is_absolute(mapped, world, image) if absolute is None else absolute]
    return DisplacementField(torch.from_numpy(_components_first((target - world).astype(np.float32))), image.grid)


def _is_absolute(mapped: dict[bool, np.ndarray], world: np.ndarray, image: VectorImage) -> bool:
    """Whether interpreting the values as absolute coordinates gives the map closer to the identity.

    The wrong interpretation roughly doubles lengths or shrinks them to almost nothing.
    """
    distance = {
        assumed: distance_from_identity(_components_first(points), _components_first(world))
        for assumed, points in mapped.items()
    }
    closer = min(distance, key=lambda assumed: distance[assumed])
    if distance[closer] > DECISIVE_RATIO * distance[not closer]:
        raise InputError(
            f"{image.path}: the values could be displacements or coordinates; specify --kind fsl or --kind fsl-absolute"
        )
    return closer


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _components_first(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0))
