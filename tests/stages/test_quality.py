"""Quality metrics compared with cs_dmri, explicit formulas and known truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cs_dmri import GradientTable
from cs_dmri.qc import dwi_contrast_ratio, neighboring_dwi_correlation
from scipy.ndimage import gaussian_filter

from dsiprep.data.acquisition import SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Coregistration,
    Denoised,
    Distortion,
    Motion,
    Preprocessed,
    Quality,
)
from dsiprep.data.transform import Affine, DisplacementField
from dsiprep.io.quality_columns import column_meaning
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.motion.framewise_displacement import framewise_displacement
from dsiprep.ops.motion.series_qc import discontinuous_slices, shore_projection
from dsiprep.ops.qspace.tensor import tensor_projection
from dsiprep.stages.quality import _cnr, _coherence, _missing_maps, _tsnr, measure_quality
from helpers.grids import make_grid


def lattice() -> tuple[np.ndarray, np.ndarray]:
    """b-table of a DSI lattice of radius 3: 122 points with b-values up to 4500 s/mm², and four b=0 volumes."""
    axis = np.arange(-3, 4)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    points = points[(np.linalg.norm(points, axis=1) <= 3) & points.any(1)]
    points = np.vstack([np.zeros((4, 3)), points])
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return 500.0 * length[:, 0] ** 2, np.divide(points, length, out=np.zeros(points.shape), where=length > 0)


def phantom(grid: Grid, sigma: float, seed: int = 0) -> tuple[DWI, np.ndarray, np.ndarray]:
    """Fibres in an ellipsoid that rotate about S from slice to slice: series, noise-free signal, mask."""
    bvals, bvecs = lattice()
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)) - grid.centre
    inside = np.linalg.norm(points / (grid.voxel_sizes * grid.shape).max() / 0.42, axis=-1) < 1
    turn = 0.3 * points[..., 2]
    fibre = np.stack([-np.sin(turn), np.cos(turn), np.zeros_like(turn)], axis=-1)
    rng = np.random.default_rng(seed)
    texture = 1 + 0.2 * gaussian_filter(rng.normal(size=grid.shape), 1.5) / 0.05
    truth = np.stack(
        [800 * texture * np.exp(-b * (2e-4 + 1.3e-3 * (fibre @ g) ** 2)) for b, g in zip(bvals, bvecs, strict=True)]
    )
    truth *= inside
    data = (truth + rng.normal(scale=sigma, size=truth.shape)).astype(np.float32)
    n = len(bvals)
    dwi = DWI(torch.from_numpy(data), grid, bvals, bvecs, np.arange(n) // 64, np.zeros(n, int))
    return dwi, truth, inside


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_discontinuous_slices_match_cs_dmri(axis: int) -> None:
    from cs_dmri import qc

    rng = np.random.default_rng(1)
    data = 500 + 9000 * gaussian_filter(rng.normal(size=(6, 26, 24, 22)), (0, 4, 4, 4))
    data = (data + rng.normal(scale=5, size=data.shape)).astype(np.float32)
    for volume, index in ((1, 9), (4, 12), (4, 5)):
        np.moveaxis(data[volume], axis, 0)[index] *= 0.3
    coordinates = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in data.shape[1:]], indexing="ij"))
    mask = (coordinates**2).sum(0) < 0.9
    expected, _ = qc.outlier_slices(np.moveaxis(data, 0, -1), mask, axis=axis)
    result = discontinuous_slices(data, mask, axis)
    assert result[1, 9] & result[4, 12] & result[4, 5]
    np.testing.assert_array_equal(result, expected)


def test_framewise_displacement() -> None:
    parameters = np.zeros((5, 6))
    parameters[1] = [1, -2, 0.5, 0.01, 0, -0.02]
    parameters[2] = [1, -2, 0.5, 0.01, 0, -0.02]
    parameters[4, 3] = 0.1
    result = framewise_displacement(parameters, np.array([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(result, [np.nan, 3.5 + 1.5, 0, np.nan, 5.0])


def test_coherence_matches_cs_dmri(orientation: str) -> None:
    """Close to the value from cs_dmri's own tensor fit for every orientation, and lower with wrong b-vectors."""
    import cs_dmri

    grid = make_grid(orientation, (16, 16, 12), (2, 2, 2.5))
    dwi, _, inside = phantom(grid, 10.0)
    result = _coherence(dwi, inside)
    in_voxels = cs_dmri.GradientTable(dwi.bvals, dwi.bvecs @ grid.directions, b0_threshold=100)
    volumes_last = np.ascontiguousarray(np.moveaxis(dwi.data.numpy(), 0, -1))
    expected = cs_dmri.DWI(volumes_last, in_voxels, affine=grid.affine, mask=inside).qc().fixel_coherence
    assert result == pytest.approx(expected, abs=0.05)
    wrong = DWI(dwi.data, grid, dwi.bvals, dwi.bvecs[:, [2, 1, 0]], dwi.run, dwi.blip)
    assert _coherence(wrong, inside) < 0.7 * result


@pytest.mark.parametrize("model", ["3dSHORE", "tensor"])
def test_cnr_matches_known_signal_and_noise(model: str) -> None:
    grid = make_grid("LAS", (14, 14, 10), (2, 2, 2))
    dwi, truth, inside = phantom(grid, 40.0)
    if model == "tensor":
        keep = dwi.bvals <= 1500
        dwi, truth = dwi.select(keep), truth[keep]
    cnr = _cnr(dwi, Volume(torch.from_numpy(inside.astype(np.float32)), grid), model)
    assert cnr is not None
    expected = truth[~dwi.is_b0][:, inside].std(0) / 40
    ratio = cnr.numpy()[inside] / expected
    assert np.median(ratio) == pytest.approx(1, abs=0.12)
    assert not cnr.numpy()[~inside].any()


def test_model_projections() -> None:
    bvals, bvecs = lattice()
    q = np.sqrt(bvals)[:, None] * bvecs
    for matrix, dof in (shore_projection(q, np.ones((len(q), 1))), tensor_projection(bvals, bvecs)):
        noise = np.random.default_rng(0).normal(size=(len(q), 4000))
        assert ((noise - matrix @ noise) ** 2).sum(0).mean() == pytest.approx(dof, rel=0.02)
        assert dof >= len(q) - 50
    logs = -bvals * (3e-4 + 1e-3 * bvecs[:, 0] ** 2)
    np.testing.assert_allclose(tensor_projection(bvals, bvecs)[0] @ logs, logs, atol=1e-9)


def test_contrast_to_noise_at_high_b_uses_a_wider_basis() -> None:
    """Signal of slow diffusion is still strong at b 40,000, where functions of the scale 700 have vanished."""
    bvals, bvecs = lattice()
    q = np.sqrt(bvals * 40000 / bvals.max())[:, None] * bvecs
    signals = 100 * np.exp(-(q**2 @ [1, 0.8, 0.5]) * 1e-4)[:, None]
    matrix, _ = shore_projection(q, signals)
    assert np.abs(matrix @ signals - signals).max() < 2


def measure_phantom(grid: Grid, moved: np.ndarray, denoise: bool = True, field: bool = True) -> Quality:
    """Quality of one unit whose stage results are known."""
    raw, truth, inside = phantom(grid, 15.0)
    n, slices = len(raw), grid.shape[2]
    mask = Volume(torch.from_numpy(inside.astype(np.float32)), grid)
    empty = Volume(torch.zeros(grid.shape), grid)
    scheme = SamplingScheme("DSI", False, (), n - 4, 4, 4500.0, "lattice")
    acquired = Acquired(raw, (), scheme, mask, np.ones(2))
    clean = raw.with_data(raw.data * 0.5 + 0.5 * torch.from_numpy(truth.astype(np.float32)))
    denoised = Denoised(clean, mask if denoise else None, None, "")
    z = np.random.default_rng(0).normal(size=(n, slices))
    ones = np.ones(n)
    motion = Motion(rigid_matrix(moved, grid.centre), np.arange(n), mask, mask, ones, ones, z, 2, [], "3dSHORE")
    fields = (DisplacementField(torch.zeros(3, *grid.shape), grid),)
    hertz = Volume(torch.full(grid.shape, 12.5), grid)
    distortion = Distortion(np.eye(4)[None], fields, hertz, empty, (empty,), (empty,), [], "drbuddi")
    affine = Affine(np.eye(4), "a", "b")
    shifted = Grid(grid.shape, grid.affine)
    anatomy = Anatomy("T1w", mask, Volume(mask.data, shifted), None, affine, None, None, "", None, None)
    preprocessed = Preprocessed(clean, clean.volume(0), mask, "")
    return measure_quality(
        "sub-01_ses-2_acq-dsi",
        acquired,
        denoised,
        (motion,),
        distortion if field else None,
        Coregistration(affine, 0.1, 0.9, "x"),
        anatomy,
        preprocessed,
    )


def test_quality_table_and_confounds(orientation: str) -> None:
    grid = make_grid(orientation, (14, 14, 12), (2, 2, 2.2))
    moved = np.random.default_rng(3).normal(size=(126, 6)) * [0.01, 0.01, 0.01, 0.4, 0.4, 0.4]
    result = measure_phantom(grid, moved)
    table, confounds = result.table, result.confounds
    for column, axis in enumerate("xyz"):
        np.testing.assert_allclose(confounds[f"rot_{axis}"], moved[:, column], atol=1e-9)
        np.testing.assert_allclose(confounds[f"trans_{axis}"], moved[:, 3 + column], atol=1e-9)
    assert np.flatnonzero(np.isnan(confounds["framewise_displacement"])).tolist() == [0, 64]
    assert table["mean_fd"] == pytest.approx(np.nanmean(confounds["framewise_displacement"]))
    assert table["max_rotation"] == pytest.approx(np.abs(moved[:, :3]).max())
    assert table["max_translation"] == pytest.approx(np.abs(moved[:, 3:]).max())
    assert table["t1_masked_neighbor_corr"] > table["raw_masked_neighbor_corr"] > 0.3
    assert table["t1_dimension_z"] == 12
    raw, _, inside = phantom(grid, 15.0)
    gradients = GradientTable(raw.bvals, raw.bvecs, b0_threshold=100)
    volumes_last = np.ascontiguousarray(np.moveaxis(raw.data.numpy(), 0, -1))
    expected = neighboring_dwi_correlation(volumes_last, gradients, inside)
    assert table["raw_masked_neighbor_corr"] == pytest.approx(expected, abs=1e-5)
    assert table["raw_dwi_contrast"] == pytest.approx(dwi_contrast_ratio(volumes_last, gradients, inside), abs=1e-5)
    assert table["raw_voxel_size_z"] == pytest.approx(2.2)
    assert table["raw_num_directions"] == 122
    assert table["raw_max_b"] == 4500
    assert table["t1_dice_distance"] == 1
    assert table["fieldmap_hz_median"] == 12.5
    assert (table["subject_id"], table["session_id"]) == ("01", "2")
    assert (table["acq_id"], table["run_id"]) == ("dsi", None)
    assert {f"CNR0_{name}" for name in ("mean", "median", "standard_deviation")} <= set(table)
    assert (confounds["denoise_change"] > 0).all()
    assert result.slice_z.shape == (126, 12)
    assert result.tsnr is not None
    assert result.cnr is not None
    assert float(result.tsnr.data.max()) > 20
    assert all(len(column) == 126 for column in confounds.values())
    assert [name for name in table if not column_meaning(name)] == []
    assert all(isinstance(value, float | int | str | None) for value in table.values())


@pytest.mark.parametrize(
    ("count", "words"), [(1, "1 b=0 volume is too few"), (2, "2 b=0 volumes are too few"), (3, "")]
)
def test_temporal_snr_needs_three_b0_volumes(count: int, words: str) -> None:
    dwi, _, inside = phantom(make_grid("LAS", (14, 14, 10), (2, 2, 2)), 40.0)
    keep = np.concatenate([np.flatnonzero(dwi.is_b0)[:count], np.flatnonzero(~dwi.is_b0)])
    dwi, mask = dwi.select(keep), Volume(torch.from_numpy(inside.astype(np.float32)), dwi.grid)
    notes = " ".join(_missing_maps(dwi, mask))
    assert (_tsnr(dwi, mask) is None) == bool(words)
    assert words in notes
    assert bool(notes) == bool(words)


def test_unavailable_metrics_are_omitted() -> None:
    grid = make_grid("LAS", (12, 12, 10), (2, 2, 2))
    result = measure_phantom(grid, np.zeros((126, 6)), denoise=False, field=False)
    assert "denoise_pre" not in result.confounds
    assert not any(name.startswith("fieldmap") for name in result.table)
    assert result.table["max_fd"] == 0
