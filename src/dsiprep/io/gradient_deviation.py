"""Write the gradients that act in each voxel, and the warp of the images, where the fields of the coils are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsiprep.data.gradient_coil import GradientNonlinearity
from dsiprep.data.grid import Grid
from dsiprep.data.results import UnitResults
from dsiprep.data.transform import Chain
from dsiprep.io import itk
from dsiprep.io.gradients import fsl_axes
from dsiprep.io.nifti import ALIGNED, write_image
from dsiprep.io.qc_tables import write_json
from dsiprep.ops.image.gradient_nonlinearity import remaining_warp

__all__ = ["POSES", "write_deviation", "write_poses", "write_scanner_warp"]

POSES = "_from-scanner_to-ACPC_mode-image_desc-poses_xfm.txt"  # end of the name


def write_deviation(stem: Path, deviation: torch.Tensor, grid: Grid, bvecs: str, reference: str) -> None:
    """Write L as nine volumes in the layout of `grad_dev.nii.gz` of the Human Connectome Project.

    L is along FSL's axes of the image, those of FSL's b-vectors g. Volumes 0 to 2 are its first column: what a
    prescribed x gradient adds along x, y and z. The gradient that acts is (I + L) g, and the b-value b |(I + L) g|².

    Parameters
    ----------
    stem : Path
        Without `.nii.gz`.
    deviation : Tensor, (9, i, j, k)
        L by rows, along world RAS+.
    grid : Grid
    bvecs : str
        Name of the file with FSL's b-vectors.
    reference : str
        `SpatialReference` of the sidecar.
    """
    axes = torch.as_tensor(fsl_axes(grid)).float()
    matrix = deviation.reshape(3, 3, *grid.shape)
    columns = torch.einsum("ac,abijk,bd->dcijk", axes, matrix, axes).reshape(9, *grid.shape)
    write_image(stem.with_name(f"{stem.name}.nii.gz"), columns, grid, space=ALIGNED)
    sidecar = {
        "SpatialReference": reference,
        "Description": "Deviation L of the gradients from the prescribed ones for the mean position of the head: the "
        "gradient that acts is (I + L) g, the b-value b |(I + L) g|^2",
        "Volumes": [f"L_{row}{column}" for column in "xyz" for row in "xyz"],
        "Frame": f"that of {bvecs}, which holds g",
        "ReadBy": "FSL (dtifit --gradnonlin, bedpostx -g), as grad_dev.nii.gz of the Human Connectome Project",
    }
    write_json(stem.with_name(f"{stem.name}.json"), sidecar)


def write_scanner_warp(path: Path, nonlinearity: GradientNonlinearity, grid: Grid) -> None:
    """Write the warp of the series, from points of the scanner to points of the images, as an ITK composite.

    Nothing is written if the scanner left nothing to correct.

    Parameters
    ----------
    path : Path
        `.h5`.
    nonlinearity : GradientNonlinearity
    grid : Grid
        Of the series.
    """
    done = nonlinearity.corrections
    field = remaining_warp(nonlinearity.fields, grid, done.series, done.slice_axis)
    if field is not None:
        itk.write_composite_h5(path, Chain((field,), "orig", "scanner"))


def write_poses(stem: Path, results: UnitResults) -> None:
    """Write the rigid or affine map from points of ACPC space to points of the scanner for each acquired volume.

    It is motion, the pose of the blip and coregistration composed, without displacements of images.
    """
    dwi, to_dwiref = results.acquired.dwi, results.coregistration.dwiref_to_acpc.matrix
    matrices = np.empty((len(dwi), 4, 4))
    for motion in results.motions:
        blip = int(dwi.blip[motion.volumes[0]])
        pose = results.distortion.poses[blip] if results.distortion else np.eye(4)
        matrices[motion.volumes] = motion.transforms @ pose @ to_dwiref
    itk.write_affine_series(stem.with_name(f"{stem.name}{POSES}"), matrices)
