"""Images without displacements by gradient nonlinearity, and the series resampled through them at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import CoilFields, GradientNonlinearity, ScannerCorrections
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import Distortion, Motion, Preprocessed
from dsiprep.data.transform import DisplacementField
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.gradient_nonlinearity import encoding_error, gradient_deviation
from dsiprep.phantom.gradient_coil import coefficient_text
from dsiprep.settings import ResampleSettings
from dsiprep.stages import gradient_nonlinearity as stage
from dsiprep.stages.resample import resample
from helpers.grids import make_grid
from helpers.identity_results import head_intensity, make_anatomy, make_coregistration, make_motion, voxel_points

SCALE = 60.0  # of the phantom's coefficients: displacements of several mm in a head of 40 mm


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> CoilFields:
    path = tmp_path_factory.mktemp("coil") / "coil.grad"
    path.write_text(coefficient_text(SCALE))
    return read_coil_fields(path)


def encode(fields: CoilFields, grid: Grid, pose: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Image of the head at `pose`: at c the intensity of the y with y + d(y) + shift = c, over the Jacobian."""
    c = voxel_points(grid).reshape(-1, 3) - shift
    y = c.copy()
    for _ in range(4):  # Newton
        d, slopes = encoding_error(fields, y)
        y = y + np.linalg.solve(np.eye(3) + slopes, (c - y - d)[..., None])[..., 0]
    inverse = np.linalg.inv(pose)
    density = np.linalg.det(np.eye(3) + encoding_error(fields, y)[1])
    with np.errstate(over="ignore"):  # far outside the head
        return (head_intensity(y @ inverse[:3, :3].T + inverse[:3, 3]) / density).reshape(grid.shape)


def as_tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images).astype(np.float32))


def relative_error(found: np.ndarray, points: np.ndarray) -> float:
    """Mean error in the inner head, relative to its intensity."""
    core = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) < 0.8
    return float(np.abs(found - head_intensity(points))[core].mean() / 1000)


def test_structural_images_are_straightened_unless_the_scanner_did(fields: CoilFields) -> None:
    grid = make_grid("PSR", (30, 34, 30), (2.0, 2.0, 2.0))
    image = Volume(as_tensor([encode(fields, grid, np.eye(4))])[0], grid)
    states = ScannerCorrections(structural=("none", "3d"))
    straight, untouched = stage.straighten_structural((image, image), GradientNonlinearity(fields, states))
    before = relative_error(image.numpy(), voxel_points(grid))
    assert before > 0.03
    assert relative_error(straight.numpy(), voxel_points(grid)) < 0.15 * before
    assert torch.equal(untouched.data, image.data)


def test_masks_and_fieldmaps_keep_their_values(fields: CoilFields) -> None:
    grid = make_grid("LAS", (30, 34, 30), (2.0, 2.0, 2.0))
    nonlinearity = GradientNonlinearity(fields, ScannerCorrections(structural=("none",)))
    mask = Volume(torch.ones(grid.shape), grid)
    straight = stage.straighten_mask(mask, nonlinearity)
    assert straight is not None
    assert set(np.unique(straight.numpy())) <= {0.0, 1.0}
    assert straight.numpy()[6:-6, 6:-6, 6:-6].all()
    assert stage.straighten_mask(None, nonlinearity) is None
    hz = Volume(torch.full(grid.shape, -35.0), grid)
    field = stage.straighten_fieldmap(RawFieldmap("hz", hz, mask, None), nonlinearity).field.numpy()
    np.testing.assert_allclose(field[6:-6, 6:-6, 6:-6], -35, atol=1e-3)
    phase = Volume(torch.full(grid.shape, 3.1), grid)
    phase.data[::2] = -3.1  # the same phase but for 0.08, wrapped
    found = stage.straighten_fieldmap(RawFieldmap("phase", phase, mask, 0.002), nonlinearity).field.numpy()
    assert np.abs(found[6:-6, 6:-6, 6:-6]).min() > 3.05


@cache
def moved_series(fields: CoilFields, orientation: str) -> tuple[DWI, np.ndarray]:
    """Two volumes of a head that moves, with nonlinear gradients."""
    grid = make_grid(orientation, (28, 32, 28), (2.5, 2.5, 2.5))
    moves = rigid_matrix(np.array([[0, 0, 0, 0, 0, 0], [0.1, -0.08, 0.12, 3, 2, -3]], float))
    data = as_tensor([encode(fields, grid, move) for move in moves])
    bvals, none = np.array([0.0, 1000.0]), np.zeros(2, int)
    return DWI(data, grid, bvals, np.array([[0, 0, 0], [0.6, 0, -0.8]]), none, none), moves


def resampled(
    dwi: DWI, motion: Motion, nonlinearity: GradientNonlinearity | None, distortion: Distortion | None = None
) -> Preprocessed:
    anatomy, coregistration = make_anatomy(), make_coregistration(np.eye(4))
    settings = ResampleSettings(resolution=2)
    return resample(dwi, (motion,), distortion, coregistration, anatomy, settings, "none", nonlinearity)


def test_series_is_straight_after_one_interpolation(fields: CoilFields) -> None:
    """The warp is fixed in the scanner, in which the head moves."""
    dwi, moves = moved_series(fields, "oblique")
    motion, nonlinearity = (
        make_motion(dwi.grid, moves, np.arange(2)),
        GradientNonlinearity(fields, ScannerCorrections()),
    )
    out, without = resampled(dwi, motion, nonlinearity), resampled(dwi, motion, None)
    for found, plain in zip(out.dwi.data.numpy(), without.dwi.data.numpy(), strict=True):
        before = relative_error(plain, voxel_points(without.dwi.grid))
        assert before > 0.03
        assert relative_error(found, voxel_points(out.dwi.grid)) < 0.15 * before
    assert without.deviation is None


def test_off_resonance_is_stretched_by_the_gradients(fields: CoilFields) -> None:
    """u is 4 mm in the raw images; where they were straightened it was estimated as 4 mm / (1 + d_pp)."""
    grid = make_grid("LAS", (28, 36, 28), (2.5, 2.5, 2.5))
    axis = grid.directions[:, 1]
    data = as_tensor([encode(fields, grid, np.eye(4), 4 * axis)] * 2)
    none = np.zeros(2, int)
    dwi = DWI(data, grid, np.zeros(2), np.zeros((2, 3)), none, none)
    slopes = encoding_error(fields, voxel_points(grid).reshape(-1, 3))[1]
    length = 4 / (1 + np.einsum("a,nab,b->n", axis, slopes, axis)).reshape(grid.shape)
    assert np.ptp(length[8:-8, 8:-8, 8:-8]) > 0.3
    field = DisplacementField(as_tensor([length * a for a in axis]), grid)
    zero = Volume(torch.zeros(grid.shape), grid)
    distortion = Distortion(np.eye(4)[None], (field,), None, zero, (zero,), (zero,), [], "known")
    motion = make_motion(grid, np.stack([np.eye(4)] * 2), np.arange(2))
    out = resampled(dwi, motion, GradientNonlinearity(fields, ScannerCorrections()), distortion)
    ratio = out.dwi.data[0].numpy() / np.maximum(head_intensity(voxel_points(out.dwi.grid)), 1)
    core = np.linalg.norm(voxel_points(out.dwi.grid) / np.array([22.0, 27, 20]), axis=-1) < 0.6
    # intensities keep the factor of u's slope alone, which is that of `length`
    assert np.std(ratio[core]) < 0.05


def test_replaced_slices_are_those_of_straight_volumes(fields: CoilFields) -> None:
    intact, moves = moved_series(fields, "LAS")
    dwi, grid = intact.with_data(intact.data.clone()), intact.grid
    plain = make_motion(grid, moves, np.arange(2))
    lost = np.zeros((2, grid.shape[2]), bool)
    lost[1, 11:16] = True
    head = [as_tensor([head_intensity(voxel_points(grid) @ np.linalg.inv(moves[1])[:3, :3].T
            + np.linalg.inv(moves[1])[:3, 3])])[0, :, :, k] for k in range(11, 16)]  # fmt: skip
    dwi.data[1, :, :, 11:16] = 0
    motion = replace(plain, outlier_slices=lost, replacements=torch.stack(head))
    nonlinearity = GradientNonlinearity(fields, ScannerCorrections())
    found = resampled(dwi, motion, nonlinearity)
    points = voxel_points(found.dwi.grid)
    middle = (
        np.abs((points @ moves[1][:3, :3].T + moves[1][:3, 3])[..., 2] - grid.to_world(np.array([0, 0, 13]))[2]) < 4
    )
    error = np.abs(found.dwi.data[1].numpy() - head_intensity(points))
    core = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) < 0.8
    assert error[core & middle].mean() < 10
    assert torch.equal(
        found.dwi.data[0], resampled(dwi, plain, GradientNonlinearity(fields, ScannerCorrections())).dwi.data[0]
    )


def test_deviation_is_turned_with_the_head(fields: CoilFields) -> None:
    """At the mean position it is R' L R of the scanner's L there."""
    grid = make_grid("LPS", (20, 22, 18), (4.0, 4.0, 4.0))
    move = rigid_matrix(np.array([0.3, -0.2, 0.4, 5.0, -8.0, 6.0]))
    swing = rigid_matrix(np.array([0.0, 0.0, 0.05, 0.0, 0.0, 0.0]))
    found = stage.deviation_on_grid(fields, grid, np.stack([move @ swing, move @ np.linalg.inv(swing)]))
    points = voxel_points(grid).reshape(-1, 3)
    scanner = gradient_deviation(fields, points @ move[:3, :3].T + move[:3, 3])
    expected = move[:3, :3].T @ scanner @ move[:3, :3]
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found.numpy().reshape(9, -1).T, expected.reshape(-1, 9), atol=1e-3)


def test_displacement_field_serves_as_the_coefficients_do(fields: CoilFields) -> None:
    """Of a displacement that another program made, on a grid of its own."""
    grid = make_grid("RAS", (33, 35, 31), (4.0, 4.0, 4.0))
    d, _ = encoding_error(fields, voxel_points(grid).reshape(-1, 3))
    field = DisplacementField(torch.from_numpy(d.T.reshape(3, *grid.shape).astype(np.float32)), grid)
    dwi, moves = moved_series(fields, "LAS")
    motion = make_motion(dwi.grid, moves, np.arange(2))
    one, other = (resampled(dwi, motion, GradientNonlinearity(f, ScannerCorrections())) for f in (fields, field))
    head = head_intensity(voxel_points(one.dwi.grid)) > 400
    assert np.abs((one.dwi.data - other.dwi.data).numpy()[:, head]).mean() < 3
    assert one.deviation is not None
    assert other.deviation is not None
    np.testing.assert_allclose(one.deviation.numpy()[:, head], other.deviation.numpy()[:, head], atol=0.01)


def test_rest_of_a_correction_within_slices_is_removed(fields: CoilFields) -> None:
    """Of images that the scanner corrected within slices."""
    grid = make_grid("LAS", (28, 32, 28), (2.5, 2.5, 2.5))
    raw = encode(fields, grid, np.eye(4))
    d, slopes = encoding_error(fields, voxel_points(grid).reshape(-1, 3))
    d[:, 2] = 0  # LAS: slices across z
    at = grid.to_voxels(voxel_points(grid).reshape(-1, 3) + d).T
    density = np.linalg.det((np.eye(3) + slopes)[:, :2, :2])
    scanner = (map_coordinates(raw, at, order=3) * density).reshape(grid.shape)
    none = np.zeros(2, int)
    dwi = DWI(as_tensor([scanner, scanner]), grid, np.zeros(2), np.zeros((2, 3)), none, none)
    motion = make_motion(grid, np.stack([np.eye(4)] * 2), np.arange(2))
    errors = {}
    for done in ("none", "2d", "3d"):
        out = resampled(dwi, motion, GradientNonlinearity(fields, ScannerCorrections(done)))
        errors[done] = relative_error(out.dwi.data[0].numpy(), voxel_points(out.dwi.grid))
    assert errors["2d"] < 0.15 * min(errors["none"], errors["3d"])
