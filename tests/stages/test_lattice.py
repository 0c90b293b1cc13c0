"""The series on a lattice again: against the true signal, and through DIPY's DSI model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dipy.core.gradients import gradient_table
from dipy.data import get_sphere
from dipy.reconst.dsi import DiffusionSpectrumModel
from scipy.spatial.transform import Rotation

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.qspace import Lattice
from dsiprep.data.results import Acquired, Preprocessed
from dsiprep.errors import InputError
from dsiprep.ops.qspace.lattice import ball, common_rotation, half_ball, predict_at
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.phantom.schemes import gradient_table as scheme_table
from dsiprep.stages.lattice import evaluate_lattice, why_not
from dsiprep.stages.qspace_quality import measure_qspace, qspace_row

VOXELS, SIGMA = 300, 0.03
RNG = np.random.default_rng(5)
FIBRES = RNG.normal(size=(VOXELS, 3))
FIBRES /= np.linalg.norm(FIBRES, axis=1, keepdims=True)
SHARE = RNG.uniform(0.2, 0.9, VOXELS)


def truth(bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """Signal of one bundle and grey matter in each voxel, (n, voxels)."""
    along, b = (bvecs @ FIBRES.T) ** 2, bvals[:, None]
    return SHARE * np.exp(-b * (0.2e-3 + 1.5e-3 * along)) + (1 - SHARE) * np.exp(-b * 0.8e-3)


def series(scheme: str, degrees: float = 6.0, sigma: float = SIGMA) -> tuple[Acquired, Preprocessed]:
    """A scheme whose gradients turned from volume to volume, and all together by 10 degrees."""
    rng = np.random.default_rng(6)
    bvals, nominal = scheme_table(scheme)
    turns = Rotation.from_rotvec(np.deg2rad(degrees) * rng.normal(size=(len(bvals), 3)))
    common = Rotation.from_rotvec(np.deg2rad([10, 0, 0]))
    rotated = common.apply(turns.apply(nominal))
    noise = sigma * rng.normal(size=(len(bvals), VOXELS))
    data = torch.as_tensor((truth(bvals, rotated) + noise)[:, :, None, None], dtype=torch.float32)
    grid, run = Grid((VOXELS, 1, 1), np.diag([-2.0, -2.0, 2.0, 1.0])), np.zeros(len(bvals), int)
    dwi, mask = DWI(data, grid, bvals, rotated, run, run), Volume(torch.ones(VOXELS, 1, 1), grid)
    acquired = Acquired(replace(dwi, bvecs=nominal), (), recognise(bvals, nominal), mask, np.ones(1))
    return acquired, Preprocessed(dwi, Volume(data[0], grid), mask, "none")


def evaluated(scheme: str, grid: str, **options: float) -> Lattice:
    acquired, preprocessed = series(scheme, **options)
    found = evaluate_lattice(preprocessed, acquired, grid)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def full() -> Lattice:
    return evaluated("dsi257", "dsi515")


def error(lattice: Lattice) -> np.ndarray:
    """RMS error of each point."""
    away = lattice.dwi.data[:, :, 0, 0].numpy() - truth(lattice.dwi.bvals, lattice.dwi.bvecs)
    return np.sqrt(np.mean(away**2, axis=1))


def test_left_out_volumes_are_predicted_to_within_the_noise(full: Lattice) -> None:
    assert np.sqrt(np.mean(full.left_out**2)) < 1.1 * SIGMA
    assert full.noise == pytest.approx(SIGMA, rel=0.05)


def test_points_of_the_full_sphere_are_nearer_to_the_truth_than_a_volume(full: Lattice) -> None:
    assert len(full.dwi) == 515
    assert np.sqrt(np.mean(error(full) ** 2)) < 0.8 * SIGMA


def test_uncertainty_is_that_of_the_error(full: Lattice) -> None:
    inside = ~full.extrapolated
    predicted = np.sqrt(np.mean(full.uncertainty[inside] ** 2)) * full.noise
    assert np.sqrt(np.mean(error(full)[inside] ** 2)) == pytest.approx(predicted, rel=0.3)


def test_dipy_takes_the_lattice_as_it_is(full: Lattice) -> None:
    """DIPY rounds q-vectors to its grid: every point must have a place of its own; its peaks find the fibres."""
    affine_axes = np.array([-1.0, -1.0, 1.0])  # b-vectors along the axes of the LPS+ image, as in the .bvec
    table = gradient_table(full.dwi.bvals, bvecs=full.dwi.bvecs * affine_axes, b0_threshold=50)
    model = DiffusionSpectrumModel(table)
    places = np.round(np.sqrt(full.dwi.bvals / full.dwi.bvals[1])[:, None] * full.dwi.bvecs)
    assert len(np.unique(places, axis=0)) == 515
    sphere = get_sphere(name="repulsion724")
    voxels = np.flatnonzero(SHARE > 0.6)[:25]
    peaks = [sphere.vertices[np.argmax(model.fit(full.dwi.data[:, v, 0, 0].numpy()).odf(sphere))] for v in voxels]
    cosine = np.abs(np.sum(np.array(peaks) * FIBRES[voxels] * affine_axes, axis=1))
    assert np.degrees(np.arccos(np.minimum(cosine, 1))).mean() < 5


def test_acquired_lattice_has_the_acquired_points_along_the_axes() -> None:
    lattice = evaluated("dsi101", "acquired")
    q = np.sqrt(lattice.dwi.bvals)[:, None] * lattice.dwi.bvecs
    step = np.sqrt(4000 / 13)
    assert len(lattice.dwi) == 102
    np.testing.assert_allclose(q / step, np.round(q / step), atol=1e-6)
    np.testing.assert_array_equal(lattice.points, np.round(q / step))
    assert not lattice.extrapolated.all()


def test_compressed_sensing_is_completed_and_its_extrapolation_marked() -> None:
    lattice = evaluated("hasc55", "dsi515", degrees=2.0)
    assert len(lattice.dwi) == 515
    far = np.linalg.norm(lattice.dwi.q, axis=1) > np.sqrt(5001)
    assert lattice.extrapolated[far].all()
    assert np.sqrt(np.mean(error(lattice)[~lattice.extrapolated] ** 2)) < 1.5 * SIGMA


def test_dsi_from_shells() -> None:
    lattice = evaluated("multishell", "dsi257")
    assert lattice.dwi.bvals.max() == pytest.approx(3000)
    assert np.sqrt(np.mean(error(lattice) ** 2)) < SIGMA


def test_a_lost_volume_has_little_weight() -> None:
    acquired, preprocessed = series("dsi257")
    spoilt = preprocessed.dwi.data.clone()
    spoilt[100] = 0.0
    spoilt[200] *= 3
    lattice = evaluate_lattice(replace(preprocessed, dwi=preprocessed.dwi.with_data(spoilt)), acquired, "dsi515")
    assert lattice is not None
    assert np.sqrt(np.mean(error(lattice) ** 2)) < 0.9 * SIGMA


def test_table_of_a_user() -> None:
    acquired, preprocessed = series("dsi101")
    bvals, bvecs = np.array([0.0, 1000.0, 2000.0]), np.array([[0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    lattice = evaluate_lattice(preprocessed, acquired, "table.b", (bvals, bvecs))
    assert lattice is not None
    np.testing.assert_array_equal(lattice.dwi.bvals, bvals)
    assert error(lattice).max() < 1.5 * SIGMA


def test_shells_are_no_acquired_lattice() -> None:
    acquired, preprocessed = series("multishell")
    assert "not acquired on a lattice" in why_not("acquired", acquired.scheme)
    assert evaluate_lattice(preprocessed, acquired, "acquired") is None
    scheme = replace(acquired.scheme, kind="DSI")
    with pytest.raises(InputError, match="no lattice"):
        evaluate_lattice(preprocessed, replace(acquired, scheme=scheme), "acquired")


def test_balls_have_the_known_numbers_of_points() -> None:
    assert [len(ball(r)) for r in (1, 13, 25)] == [7, 203, 515]
    assert len(half_ball(25)) == 257
    assert not {tuple(point) for point in half_ball(25)} & {tuple(-point) for point in half_ball(25)}


def test_common_rotation_is_found() -> None:
    turn = Rotation.from_rotvec([0.1, -0.2, 0.3]).as_matrix()
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    np.testing.assert_allclose(common_rotation(vectors, vectors @ turn.T), turn, atol=1e-12)


def test_prediction_is_linear_and_leaves_each_sample_out() -> None:
    acquired, preprocessed = series("dsi101")
    samples = preprocessed.dwi.data[:, :, 0, 0].numpy().astype(float)
    found = predict_at(preprocessed.dwi.q, preprocessed.dwi.q, samples @ samples.T / VOXELS)
    np.testing.assert_array_equal(np.diag(found.left_out), 0)
    assert found.matrix.shape == (len(acquired.dwi), len(acquired.dwi))


def test_quality_counts_what_turned_off_the_lattice() -> None:
    acquired, preprocessed = series("dsi515", degrees=0.0)
    nominal = acquired.dwi.bvals, acquired.dwi.bvecs
    still = measure_qspace(preprocessed.dwi, preprocessed.mask, nominal, None)
    assert still is not None
    weighted = ~preprocessed.dwi.is_b0
    assert (still.prescribed, still.lost) == (514, 0)
    assert np.nanmax(still.offset) < 1e-6  # the rotation that all volumes share is none of their own
    assert still.antipodal == pytest.approx(1, abs=0.1)
    bvecs = preprocessed.dwi.bvecs.copy()
    outermost = int(np.argmax(preprocessed.dwi.bvals))
    bvecs[outermost] = Rotation.from_euler("xyz", [20, 20, 20], degrees=True).apply(bvecs[outermost])
    turned = measure_qspace(replace(preprocessed.dwi, bvecs=bvecs), preprocessed.mask, nominal, None)
    assert turned is not None
    assert turned.lost == 1
    row = qspace_row(turned, weighted)
    assert row["lattice_samples_turned_off"] == 1
    assert row["lattice_offset_max"] > 0.5


def test_quality_has_the_noise_floor() -> None:
    acquired, preprocessed = series("dsi257")
    noise = Volume(torch.full((VOXELS, 1, 1), 0.2), preprocessed.dwi.grid)
    quality = measure_qspace(preprocessed.dwi, preprocessed.mask, (acquired.dwi.bvals, acquired.dwi.bvecs), noise)
    assert quality is not None
    assert quality.floor == pytest.approx(0.2 * np.sqrt(np.pi / 2), rel=0.02)
    assert quality.at_floor > 0.9
    assert quality.antipodal is None
    assert quality.left_out[~preprocessed.dwi.is_b0].mean() == pytest.approx(SIGMA, rel=0.15)
