"""The gradients of single volumes, from files as the pipeline writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from dsiprep import acting_gradients
from dsiprep.errors import InputError
from dsiprep.io.gradients import write_mrtrix_b
from dsiprep.io.itk import write_affine_series
from dsiprep.io.nifti import write_image
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.phantom.gradient_coil import coefficient_text, make_coil
from helpers.grids import make_grid


def test_gradients_of_a_volume_are_those_of_the_phantom_at_its_position(tmp_path: Path) -> None:
    coil, grid = make_coil(np.array([[60.0, -70, 50]]), 3.0), make_grid("LPS", (24, 26, 22), (5.0, 5.0, 5.0))
    (tmp_path / "coil.grad").write_text(coefficient_text(coil.scale))
    series, g = tmp_path / "sub-01_space-ACPC_desc-preproc_dwi.nii.gz", np.array([0.6, 0.0, -0.8])
    write_image(series, np.zeros((2, *grid.shape), np.float32), grid)
    poses = rigid_matrix(np.array([[0, 0, 0, 0, 0, 0], [0.2, -0.1, 0.15, 4, -6, 5]], float))
    head = np.stack([np.zeros(3), poses[1][:3, :3].T @ g])
    write_mrtrix_b(tmp_path / "sub-01_space-ACPC_desc-preproc_dwi.b", np.array([0.0, 2000]), head)
    write_affine_series(tmp_path / "sub-01_from-scanner_to-ACPC_mode-image_desc-poses_xfm.txt", poses)
    bvals, bvecs = acting_gradients(series, tmp_path / "coil.grad", 1)
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3))
    at = coil.grid.to_voxels(points @ poses[1][:3, :3].T + poses[1][:3, 3]).T
    nine = np.stack([map_coordinates(part, at, order=3) for part in coil.deviation]).reshape(3, 3, -1)
    acting = poses[1][:3, :3].T @ (g[:, None] + np.einsum("abm,b->am", nine, g))
    length = np.linalg.norm(acting, axis=0)
    assert np.ptp(length) > 0.05
    np.testing.assert_allclose(bvals.ravel(), 2000 * length**2, rtol=1e-3)
    np.testing.assert_allclose(bvecs.reshape(3, -1), acting / length, atol=1e-3)
    assert not acting_gradients(series, tmp_path / "coil.grad", 0)[1].any()
    with pytest.raises(InputError, match="volume 2 of 2"):
        acting_gradients(series, tmp_path / "coil.grad", 2)
