"""Merging corrected series of different phase encodings: concatenation, average, least squares."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Distortion, Preprocessed, UnitResults
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, SettingsError
from dsiprep.io import derivatives
from dsiprep.io.bids import find_units
from dsiprep.joining import join_units
from dsiprep.ops.qspace.matching_gradients import combine, merged_gradients, same_gradients
from dsiprep.settings import AnatomySettings, ResampleSettings, Settings
from dsiprep.stages.joined_series import join
from dsiprep.stages.resample import resample
from helpers.bids_dataset import Dataset
from helpers.identity_results import make_anatomy, make_coregistration, make_motion
from helpers.report_subject import make_subject

BVALS = np.array([0, 1000, 2000, 2000, 5, 1010, 2000, 1000.0])
BVECS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, -1, 0], [0.6, 0.8, 0]], float)
BLIP = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def test_volumes_with_the_same_gradient_are_grouped() -> None:
    """Antipodal b-vectors match, b-values may differ slightly, and volumes without a match stay single."""
    groups = same_gradients(BVALS, BVECS, BLIP, BVALS < 50)
    assert groups == [(0, 4), (1, 5), (2, 6), (3,), (7,)]
    bvals, bvecs = merged_gradients(BVALS, BVECS, groups)
    np.testing.assert_allclose(bvals, [2.5, 1005, 2000, 2000, 1000])
    np.testing.assert_allclose(bvecs[1:4], np.eye(3))
    assert not bvecs[0].any()


def test_volumes_of_one_phase_encoding_are_not_grouped() -> None:
    groups = same_gradients(np.full(4, 1000.0), np.tile([1.0, 0, 0], (4, 1)), np.zeros(4, int), np.zeros(4, bool))
    assert groups == [(0,), (1,), (2,), (3,)]


def test_in_place_merging_matches_weighted_average(rng: np.random.Generator) -> None:
    data = torch.from_numpy(rng.normal(size=(8, 2, 3, 2)).astype(np.float32))
    groups = [(0, 7), (1,), (2, 5), (3, 4), (6,)]
    weights = {k: torch.from_numpy(rng.uniform(0.5, 2, (2, 3, 2)).astype(np.float32)) for k in (0, 1)}
    expected = []
    for group in groups:
        parts = [(weights[int(BLIP[v])], data[v].clone()) for v in group]
        expected.append(sum(w * d for w, d in parts) / sum(w for w, _ in parts))
    merged = combine(data.clone(), groups, weights, BLIP)
    np.testing.assert_allclose(merged.numpy(), torch.stack(expected).numpy(), atol=1e-5)


def noisy_pair(rng: np.random.Generator) -> tuple[DWI, Distortion]:
    """Two blips with the same gradients and white noise, one stretched and the other compressed by half."""
    grid = Grid((40, 48, 40), np.diag([2.0, 2.0, 2.0, 1.0]) @ np.eye(4))
    affine = grid.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2)
    grid = Grid(grid.shape, affine)
    y = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))[..., 1]
    shift = 0.5 * np.clip(y, -24, 24)
    along = torch.zeros(3, *grid.shape)
    along[1] = torch.from_numpy(shift.astype(np.float32))
    fields = (DisplacementField(along, grid), DisplacementField(-along, grid))
    data = torch.from_numpy(1000 + rng.normal(0, 10, (8, *grid.shape)).astype(np.float32))
    bvals = np.array([0, 1000, 1000, 1000] * 2, float)
    bvecs = np.concatenate([np.zeros((1, 3)), np.eye(3)] * 2)
    dwi = DWI(data, grid, bvals, bvecs, np.repeat([0, 1], 4), np.repeat([0, 1], 4))
    zero = Volume(torch.zeros(grid.shape), grid)
    return (
        dwi,
        Distortion(np.stack([np.eye(4)] * 2), fields, None, zero, (zero, zero), (zero,), [], "known"),
    )


def test_least_squares_noise_matches_theory(rng: np.random.Generator) -> None:
    """Weights w give noise of sqrt(sum w² J²) / sum w, with J = 1.5 and 0.5; w = 1/J gives less noise than the mean."""
    dwi, corrected = noisy_pair(rng)
    motions = tuple(make_motion(dwi.grid, np.stack([np.eye(4)] * 4), np.arange(4) + 4 * blip) for blip in (0, 1))
    noise = {}
    for merge in ("none", "average", "least-squares"):
        settings = ResampleSettings(resolution=2, merge=merge)
        series = replace(dwi, data=dwi.data.clone())
        out = resample(series, motions, corrected, make_coregistration(np.eye(4)), make_anatomy(), settings, "none")
        points = out.dwi.grid.to_world(np.stack(np.meshgrid(*map(np.arange, out.dwi.grid.shape), indexing="ij"), -1))
        middle = (np.abs(points) < [20, 14, 20]).all(-1)
        noise[merge] = out.dwi.data.numpy()[:, middle].std(1)
        assert len(out.dwi) == (8 if merge == "none" else 4)
        if merge != "none":
            assert out.sources == ((0, 4), (1, 5), (2, 6), (3, 7))
            np.testing.assert_allclose(out.dwi.bvecs[1:], np.eye(3), atol=1e-6)
    up, down = noise["none"][:4], noise["none"][4:]
    assert np.allclose(up / down, 3, rtol=0.1)
    np.testing.assert_allclose(noise["average"], np.hypot(up, down) / 2, rtol=0.05)
    best = np.hypot(up / 1.5, down / 0.5) / (1 / 1.5 + 1 / 0.5)
    np.testing.assert_allclose(noise["least-squares"], best, rtol=0.05)
    assert (noise["least-squares"] < 0.75 * noise["average"]).all()


def test_blips_without_a_common_gradient_are_rejected(rng: np.random.Generator) -> None:
    dwi, corrected = noisy_pair(rng)
    dwi = replace(dwi, bvals=np.array([0, 1000, 1000, 1000, 0, 3000, 3000, 3000.0]))
    motions = tuple(make_motion(dwi.grid, np.stack([np.eye(4)] * 4), np.arange(4) + 4 * blip) for blip in (0, 1))
    settings = ResampleSettings(resolution=2, merge="average")
    with pytest.raises(SettingsError, match="share no b-value"):
        resample(dwi, motions, corrected, make_coregistration(np.eye(4)), make_anatomy(), settings, "none")


def corrected_series(start: int, shape: tuple[int, int, int], gain: float) -> tuple[Preprocessed, DWI]:
    """A smooth head in ACPC space on a grid shifted by `start` voxels to the right, and its nominal series."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    affine[:3, 3] = [40 - 2 * start, 40, -40]
    grid = Grid(shape, affine)
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    head = (np.linalg.norm(points, axis=-1) < 30).astype(np.float32)
    image = head * (800 + 4 * points[..., 0] + 3 * points[..., 2]).astype(np.float32)
    data = gain * torch.from_numpy(np.stack([image, 0.5 * image, 0.3 * image]))
    bvals, bvecs = np.array([0, 1000.0, 1000]), np.concatenate([np.zeros((1, 3)), np.eye(3)[:2]])
    dwi = DWI(data, grid, bvals, bvecs, np.zeros(3, int), np.zeros(3, int))
    return Preprocessed(dwi, dwi.volume(0), Volume(torch.from_numpy(head), grid), "once"), dwi


def test_joined_outputs_keep_position_and_intensity() -> None:
    """Series with different fields of view and intensity scales agree at every point of the head once joined."""
    (first, first_nominal), (second, second_nominal) = (
        corrected_series(0, (42, 41, 40), 1.0),
        corrected_series(3, (38, 41, 40), 1.25),
    )
    out = join((first, second), (first_nominal, second_nominal), make_anatomy())
    assert out.dwi.grid.shape == (42, 41, 40)
    assert len(out.dwi) == 6
    np.testing.assert_array_equal(out.dwi.run, [0, 0, 0, 1, 1, 1])
    assert out.sources == ((0,), (1,), (2,), (3,), (4,), (5,))
    for v in range(3):
        both = (out.dwi.data[v] > 0) & (out.dwi.data[v + 3] > 0)
        np.testing.assert_allclose(out.dwi.data[v][both], out.dwi.data[v + 3][both], rtol=1e-3)
    unscaled = join((first, second), (first_nominal, second_nominal), make_anatomy(), harmonize_b0=False)
    assert float(unscaled.dwi.data[3].max() / unscaled.dwi.data[0].max()) == pytest.approx(1.25, rel=1e-3)
    merged = join((first, second), (first_nominal, second_nominal), make_anatomy(), "average")
    assert merged.sources == ((0, 3), (1, 4), (2, 5))
    assert len(merged.dwi) == 3
    shifted = replace(second.dwi, grid=Grid(second.dwi.grid.shape, second.dwi.grid.affine + np.eye(4, k=3) * 0.7))
    with pytest.raises(InputError, match="one voxel lattice"):
        join((first, replace(second, dwi=shifted)), (first_nominal, second_nominal), make_anatomy())


PAIRS = {"AP": "j-", "PA": "j", "LR": "i", "RL": "i-"}


def test_pairs_along_two_axes_give_one_output(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "bids")
    for name, direction in PAIRS.items():
        dataset.dwi(f"sub-01_dir-{name}", {"PhaseEncodingDirection": direction, "TotalReadoutTime": 0.05})
    with pytest.raises(SettingsError, match="without a structural image their spaces agree only"):
        find_units(dataset.root, Settings(), distortion_group_merge="concat")
    dataset.image("sub-01_T1w", 1, {})
    separate = find_units(dataset.root, Settings())
    assert [unit.output for unit in separate] == ["", ""]
    for merge in ("concat", "average", "least-squares"):
        units = find_units(dataset.root, Settings(), distortion_group_merge=merge)
        assert len(units) == 2
        assert len({unit.name for unit in units}) == 2
        assert len({unit.output for unit in units}) == 1
        assert units[0].output
        assert all(any(f"--distortion-group-merge {merge}" in note for note in unit.notes) for unit in units)
    no_structural = Settings(anatomy=AnatomySettings(modality="none"))
    with pytest.raises(SettingsError, match="structural image"):
        find_units(dataset.root, no_structural, distortion_group_merge="average")


def test_third_phase_encoding_is_corrected_with_one_of_the_pair(tmp_path: Path) -> None:
    """LR alone is corrected with AP, which is orthogonal, and so joined with the pair."""
    dataset = Dataset(tmp_path / "bids")
    for name in ("AP", "PA", "LR"):
        dataset.dwi(f"sub-01_dir-{name}", {"PhaseEncodingDirection": PAIRS[name], "TotalReadoutTime": 0.05})
    dataset.image("sub-01_T1w", 1, {})
    units = find_units(dataset.root, Settings(), distortion_group_merge="concat")
    assert sorted(len({run.pe for run in unit.runs}) for unit in units) == [1, 2]
    single = next(unit for unit in units if len(unit.runs) == 1)
    assert single.reversed_pairs() == ["i", "j-"]
    assert any("another phase-encoding axis" in note for note in single.notes)
    pair = next(unit for unit in units if len(unit.runs) == 2)
    assert single.output == pair.output != ""


def test_uncorrected_unit_is_not_joined(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "bids")
    for name in ("AP", "PA"):
        dataset.dwi(f"sub-01_dir-{name}", {"PhaseEncodingDirection": PAIRS[name], "TotalReadoutTime": 0.05})
    dataset.dwi("sub-01_acq-unknown", {})
    dataset.image("sub-01_T1w", 1, {})
    units = find_units(dataset.root, Settings(), distortion_group_merge="concat")
    assert len(units) == 2
    assert [unit.output for unit in units] == ["", ""]


def test_series_with_and_without_distortion_are_not_joined() -> None:
    corrected = make_subject()
    doubtful = replace(corrected, distortion=None, distortion_reason="the axis is contradicted by the images")
    with pytest.raises(InputError, match=r"not joined, because .* contradicted .* --distortion-group-merge none"):
        join_units("sub-01", [corrected, doubtful])


def test_joined_derivatives_are_one_series(tmp_path: Path) -> None:
    """The joined series has one row of confounds per volume; the members keep only their transforms and fields."""
    subject = make_subject()

    def member(name: str) -> UnitResults:
        settings = replace(subject.settings, resample=ResampleSettings(resolution=8, merge="concat"))
        return replace(subject, unit=replace(subject.unit, name=name, output="sub-01"), settings=settings)

    parts = [member("sub-01_acq-a"), member("sub-01_acq-b")]
    for part in parts:
        derivatives.write_unit(part, tmp_path, None)
    joined = join_units("sub-01", parts)
    derivatives.write_joined(joined, parts, tmp_path)
    series = list(tmp_path.rglob("*_desc-preproc_dwi.nii.gz"))
    assert [path.name for path in series] == ["sub-01_space-ACPC_desc-preproc_dwi.nii.gz"]
    count = 2 * len(subject.acquired.dwi)
    assert nib.load(series[0]).shape[3] == count
    for pattern in ("*_desc-confounds_timeseries.tsv", "*_desc-image_qc.tsv", "*_desc-slice_qc.json", "*_hmcOpt*.csv"):
        assert len(list(tmp_path.rglob(pattern))) == 1, pattern
    assert len(list(tmp_path.rglob("*_desc-hmc_xfm.txt"))) == 2
    with next(tmp_path.rglob("*_desc-confounds_timeseries.tsv")).open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == count
    assert {row["original_file"] for row in rows} == {r.image.name for r in subject.unit.runs}
    assert len(np.loadtxt(next(tmp_path.rglob("*_desc-preproc_dwi.bval")))) == count


def test_confounds_of_merged_volumes_are_the_extreme_ones(tmp_path: Path) -> None:
    subject = make_subject()
    count = len(subject.acquired.dwi)
    sources = tuple((v, v + count // 2) for v in range(count // 2))
    kept = subject.preprocessed.dwi.select(np.arange(count // 2))
    preprocessed = replace(subject.preprocessed, dwi=kept, sources=sources)
    derivatives.write_unit(replace(subject, preprocessed=preprocessed), tmp_path, None)
    with next(tmp_path.rglob("*_desc-confounds_timeseries.tsv")).open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == count // 2
    before = subject.quality.confounds["trans_x"]
    pair = before[[3, 3 + count // 2]]
    assert float(rows[3]["trans_x"]) == pytest.approx(pair[np.argmax(np.abs(pair))], rel=1e-4)
    assert "+" in rows[3]["original_file"]
