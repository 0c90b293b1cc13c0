"""The diffusion gradient that acted in each voxel of one volume, from derivatives and the fields of the coils."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.errors import InputError
from dsiprep.io.files import check_file
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.io.gradient_deviation import POSES
from dsiprep.io.itk import read_affine_series
from dsiprep.io.nifti import grid_of, open_nifti
from dsiprep.io.number_tables import read_numbers
from dsiprep.stages.gradient_nonlinearity import deviation_on_grid

__all__ = ["acting_gradients"]

SERIES = "_space-ACPC_desc-preproc_dwi.nii.gz"


def acting_gradients(series: Path | str, coefficients: Path | str, volume: int) -> tuple[np.ndarray, np.ndarray]:
    """The b-value and b-vector of every voxel of one volume of a preprocessed series.

    The `desc-graddev` image holds the deviation for the mean position of the head; this is that of the volume itself.

    Parameters
    ----------
    series : Path
        `<src>_space-ACPC_desc-preproc_dwi.nii.gz`, with the other derivatives beside it.
    coefficients : Path
        The file of `--gradient-coefficients`.
    volume : int
        Counted from 0.

    Returns
    -------
    bvals : ndarray, (i, j, k)
        s/mm².
    bvecs : ndarray, (3, i, j, k)
        Unit vectors in world RAS+, turned with the head; zero for b=0.

    Raises
    ------
    InputError
        If a file is missing, or the series was averaged from others.
    """
    series = Path(series)
    stem = series.name.removesuffix(SERIES)
    poses = series.with_name(f"{stem}{POSES}")
    check_file(poses)
    table, matrices = read_numbers(series.with_name(series.name.replace(".nii.gz", ".b"))), read_affine_series(poses)
    if len(table) != len(matrices) or not 0 <= volume < len(table):
        raise InputError(f"{series}: volume {volume} of {len(table)}; {poses.name} has {len(matrices)} positions")
    grid = grid_of(open_nifti(series), series)
    deviation = deviation_on_grid(read_coil_fields(Path(coefficients)), grid, matrices[volume][None]).numpy()
    prescribed, b = table[volume, :3], float(table[volume, 3])
    acting = prescribed[:, None, None, None] + np.einsum(
        "abijk,b->aijk", deviation.reshape(3, 3, *grid.shape), prescribed
    )
    length = np.linalg.norm(acting, axis=0)
    return b * length**2, acting / np.maximum(length, 1e-12)
