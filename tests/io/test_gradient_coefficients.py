"""Coefficients of gradient coils, what scanners corrected, and the files of the gradients in each voxel."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from dsiprep.data.gradient_coil import GradientCoil, GradientNonlinearity, ScannerCorrections
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.io.gradient_deviation import write_deviation, write_scanner_warp
from dsiprep.io.gradients import write_fsl_bvecs
from dsiprep.io.itk import write_displacement_nifti
from dsiprep.io.scanner_corrections import correction_of
from dsiprep.ops.image.gradient_nonlinearity import encoding_error
from helpers.grids import make_grid

SIEMENS = """\
#*[ Script ****************************************************************\\
 win_low= 0, win_high= 0, win_algo= 0, win_dummy= 2;
 0.2500 m  = R0, lnorm = 4, A(1,0) = B(1,1) = A(1,1) = 0;
 NO.  TYPE             SPECTRUM                AXIS

   1  A( 3, 0)                -0.07180000         z
   2  A( 3, 1)                -0.10300000         x
   3  B( 3, 1)                 1.2E-02            y
"""


def test_siemens_coefficients(tmp_path: Path) -> None:
    path = tmp_path / "coeff.grad"
    path.write_text(SIEMENS)
    coil = read_coil_fields(path)
    assert isinstance(coil, GradientCoil)
    assert coil.radius == 250
    assert (coil.cosine[2, 3, 0], coil.cosine[0, 3, 1], coil.sine[1, 3, 1]) == (-0.0718, -0.103, 0.012)
    assert np.count_nonzero(coil.cosine) + np.count_nonzero(coil.sine) == 3
    # on the axis of the scanner P_30 = 1: a point 125 mm above the isocentre appears 250 A / 8 further out
    displacement, _ = encoding_error(coil, np.array([[0.0, 0.0, 125.0]]))
    np.testing.assert_allclose(displacement, [[0, 0, 250 * -0.0718 / 8]], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A( 3, 0) -0.1 z", "no radius R0"),
        (" 0.25 m = R0\n", "no coefficients"),
        (" 0.25 m = R0\n 1 A( 3, 4) 0.1 z\n", "m > n"),
        (" 0.25 m = R0\n 1 A( 3, 1) 0.0 z\n", "all coefficients are 0"),
        ("GRADWARPTYPE 1\nSCALEX1 0.0\n", "no radius R0"),
    ],
)
def test_other_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "coeff.grad").write_text(text)
    with pytest.raises(InputError, match=message):
        read_coil_fields(tmp_path / "coeff.grad")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_coil_fields(tmp_path / "coeff.grad")


def test_displacement_field_maps_as_itk_maps(tmp_path: Path, orientation: str) -> None:
    grid = make_grid(orientation, (12, 13, 14), (6.0, 6.0, 7.0))
    data = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (3, *grid.shape)).astype(np.float32))
    write_displacement_nifti(tmp_path / "warp.nii.gz", DisplacementField(data, grid))
    fields = read_coil_fields(tmp_path / "warp.nii.gz")
    image = SimpleITK.ReadImage(str(tmp_path / "warp.nii.gz"), SimpleITK.sitkVectorFloat64)
    transform, flip = SimpleITK.DisplacementFieldTransform(image), np.array([-1.0, -1, 1])
    points = grid.to_world(np.random.default_rng(1).uniform(0.5, 10.5, (20, 3)))
    expected = [np.array(transform.TransformPoint((p * flip).tolist())) * flip for p in points]
    np.testing.assert_allclose(points + encoding_error(fields, points)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("sidecar", "done"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE", "ND", "MOSAIC"]}, "none"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "DIS2D"], "NonlinearGradientCorrection": True}, "2d"),
        ({"ImageType": "ORIGINAL\\PRIMARY\\M\\DIS3D"}, "3d"),
        ({"ImageType": ["ORIGINAL", "PRIMARY"], "NonlinearGradientCorrection": False}, "none"),
        ({"NonlinearGradientCorrection": True, "MRAcquisitionType": "2D"}, "2d"),
        ({"NonlinearGradientCorrection": "true", "MRAcquisitionType": "3D"}, "3d"),
    ],
)
def test_correction_by_the_scanner(sidecar: dict[str, object], done: str) -> None:
    assert correction_of(sidecar, "image") == done
    assert correction_of(sidecar, "image", "2d") == "2d"


@pytest.mark.parametrize("sidecar", [{}, {"ImageType": ["ORIGINAL"]}, {"NonlinearGradientCorrection": True}])
def test_unknown_correction_is_refused(sidecar: dict[str, object]) -> None:
    with pytest.raises(MetadataError, match="--scanner-gradwarp none, 2d or 3d"):
        correction_of(sidecar, "image")


def test_gradient_deviation_is_read_as_fsl_reads_it(tmp_path: Path, orientation: str) -> None:
    """FSL's dtifit and xfibres: L(1,1) = g(1), L(2,1) = g(2), L(3,1) = g(3), L(1,2) = g(4); g acts as (I + L) g."""
    grid, rng = make_grid(orientation, (3, 4, 5), (2.0, 2.0, 2.0)), np.random.default_rng(2)
    world, g = rng.normal(0, 0.1, (3, 3)), rng.normal(size=3)
    g /= np.linalg.norm(g)
    everywhere = torch.from_numpy(np.broadcast_to(world.reshape(9, 1, 1, 1), (9, *grid.shape)).astype(np.float32))
    write_deviation(tmp_path / "graddev", everywhere, grid, "fslbvecs.txt", "bids::image")
    write_fsl_bvecs(tmp_path / "fslbvecs.txt", g[None], grid)

    nine = nib.Nifti1Image.from_filename(tmp_path / "graddev.nii.gz").get_fdata()[1, 2, 3]
    fsl = (np.eye(3) + nine.reshape(3, 3, order="F")) @ np.loadtxt(tmp_path / "fslbvecs.txt")
    axes = grid.directions * ([-1, 1, 1] if np.linalg.det(grid.directions) > 0 else [1, 1, 1])
    np.testing.assert_allclose(axes @ fsl, (np.eye(3) + world) @ g, atol=1e-6)
    assert json.loads((tmp_path / "graddev.json").read_text())["Volumes"][:4] == ["L_xx", "L_yx", "L_zx", "L_xy"]


def test_warp_of_the_scanner_is_written_for_itk(tmp_path: Path) -> None:
    (tmp_path / "coeff.grad").write_text(SIEMENS)
    fields, grid = read_coil_fields(tmp_path / "coeff.grad"), make_grid("LAS", (20, 22, 18), (6.0, 6.0, 6.0))
    write_scanner_warp(tmp_path / "warp.h5", GradientNonlinearity(fields, ScannerCorrections()), grid)
    transform, flip = SimpleITK.ReadTransform(str(tmp_path / "warp.h5")), np.array([-1.0, -1, 1])
    points = grid.to_world(np.random.default_rng(4).uniform(0, 17, (20, 3)))
    found = [np.array(transform.TransformPoint((p * flip).tolist())) * flip for p in points]
    np.testing.assert_allclose(found, points + encoding_error(fields, points)[0], atol=0.01)
    write_scanner_warp(tmp_path / "none.h5", GradientNonlinearity(fields, ScannerCorrections("3d")), grid)
    assert not (tmp_path / "none.h5").exists()
