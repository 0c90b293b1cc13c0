"""Physics of the phantom compared with closed-form results, and its dataset with BIDS."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from dsiprep.errors import GradientError, OutputError, SettingsError
from dsiprep.io.bids import find_units, read_unit
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.phantom.schemes import SCHEMES, gradient_table, half_lattice
from dsiprep.phantom.session import from_fsl, to_fsl
from dsiprep.phantom.signal import BUNDLE
from dsiprep.phantom.slice_acquisition import remaining_signal, slice_timing
from dsiprep.score.read import Image, apply, read_image, read_truth
from dsiprep.settings import Settings
from helpers.grids import make_grid

CENTRE = np.array([3.0, -5.0, 8.0])
TINY = PhantomSettings(
    resolution=5.0,
    t1w_resolution=3.0,
    snr=0,
    moved=0.5,
    max_motion=4.0,
    distortion=8.0,
    orientation="oblique",
)


@pytest.mark.parametrize("shift", ["eddy_constant", "drift"])
def test_shifts_of_the_whole_image(shift: str, tmp_path: Path) -> None:
    """Everything else is drawn as without them; eddy currents follow the gradient, and the drift the time."""
    settings = replace(TINY, scheme="hasc55", resolution=10.0, ideal=False)
    tables = []
    for number, options in enumerate((settings, replace(settings, **{shift: 2.0}))):
        make_phantom(tmp_path / str(number), options)
        tables.append(json.loads((tmp_path / str(number) / "truth" / "truth.json").read_text()))
    without, with_shift = (np.array(table["eddy_mm"]) for table in tables)
    assert (without == 0).all()
    assert shift not in tables[0]["settings"]
    assert tables[1]["settings"][shift] == 2.0
    assert tables[0]["head_to_scanner"] == tables[1]["head_to_scanner"]
    assert (with_shift[:, 1:] == 0).all()
    assert np.abs(with_shift).max() == pytest.approx(2.0)
    b = np.array(tables[1]["bvals"])
    if shift == "drift":
        assert (np.diff(with_shift[:, 0]) > 0).all()
        assert with_shift[0, 0] == 0
    else:
        gradients = np.sqrt(b)[:, None] * np.array(tables[1]["bvecs_scanner"])
        fitted = gradients @ np.linalg.lstsq(gradients, with_shift[:, 0], rcond=None)[0]
        np.testing.assert_allclose(fitted, with_shift[:, 0], atol=1e-9)


def test_schemes_have_their_nominal_sampling() -> None:
    assert [len(half_lattice(r)) for r in (13, 25)] == [101, 257]
    sizes = {
        "dsi257": (257, 13, 7000),
        "dsi515": (514, 26, 7000),
        "dsi101": (101, 6, 4000),
        "hasc55": (55, 6, 5000),
        "multishell": (270, 18, 3000),
    }
    assert set(sizes) == set(SCHEMES)
    for scheme, (directions, n_b0, top) in sizes.items():
        bvals, bvecs = gradient_table(scheme)
        weighted = bvals > 0
        assert (weighted.sum(), (~weighted).sum(), bvals[0]) == (directions, n_b0, 0)
        assert bvals.max() <= top + 1e-6
        np.testing.assert_allclose(np.linalg.norm(bvecs[weighted], axis=1), 1)
        opposite = np.abs(bvecs[weighted] @ bvecs[weighted].T) * np.isclose(bvals[weighted], bvals[weighted][:, None])
        pairs = directions if scheme != "dsi515" else 2 * directions  # a whole lattice contains all antipodes
        assert (opposite > 1 - 1e-9).sum() == pairs  # no duplicates
        if scheme != "multishell":
            q = bvecs * np.sqrt(bvals / top * (13 if scheme == "dsi101" else 25))[:, None]
            scale = 1 if scheme != "hasc55" else np.abs(q[weighted]).max() / np.round(np.abs(q[weighted]).max())
            np.testing.assert_allclose(q / scale, np.round(q / scale), atol=1e-6)
    with pytest.raises(SettingsError):
        gradient_table("dsi999")


def test_fsl_bvecs_are_read_by_the_pipeline(orientation: str, tmp_path: Path) -> None:
    gradients = pytest.importorskip("dsiprep.io.gradients")
    grid = make_grid(orientation, (4, 5, 6), (2.0, 2.0, 3.0))
    bvals, bvecs = gradient_table("hasc55")
    np.testing.assert_allclose(from_fsl(to_fsl(bvecs, grid), grid), bvecs, atol=1e-12)
    np.savetxt(tmp_path / "x.bval", bvals[None])
    np.savetxt(tmp_path / "x.bvec", to_fsl(bvecs, grid).T)
    read_bvecs = gradients.read_gradients(tmp_path / "x.bval", tmp_path / "x.bvec", grid, len(bvals))[1]
    np.testing.assert_allclose(read_bvecs, bvecs, atol=1e-6)
    las = make_grid("LAS", (4, 5, 6), (2.0, 2.0, 3.0))
    np.testing.assert_allclose(to_fsl(bvecs, las), bvecs * [-1, 1, 1])


def test_signal_drifts_and_the_truth_says_so(tmp_path: Path) -> None:
    make_phantom(
        tmp_path / "drift",
        replace(
            TINY,
            scheme="hasc55",
            resolution=8.0,
            t1w_resolution=4.0,
            ideal=False,
            signal_drift=0.1,
            noise_variation=0.3,
        ),
    )
    gain = np.array(json.loads((tmp_path / "drift" / "truth" / "truth.json").read_text())["signal_gain"])
    assert gain[0] == 1
    assert gain[-1] == pytest.approx(0.9)
    assert (tmp_path / "drift" / "truth" / "noise.nii.gz").exists()


def test_slice_timing_repeats_with_the_multiband_factor() -> None:
    timing = slice_timing(10)
    assert timing[:5] == timing[5:]
    assert len(set(timing)) == 5
    assert max(timing) < 4.2
    assert len(set(slice_timing(9))) == 9


@pytest.mark.parametrize(("slices", "per_shot"), [(24, 2), (25, 1)])
def test_dropout_affects_all_slices_of_a_shot(slices: int, per_shot: int) -> None:
    """Slices with the same start time drop out together, a tenth of all slices and none at b=0."""
    bvals = np.tile([0.0, 1000.0, 3000.0], 400)
    fraction = remaining_signal(bvals, slices, 0.1, np.random.default_rng(2))
    outlier, times = fraction < 1, np.array(slice_timing(slices))
    for k in range(slices):
        same = [other for other in range(slices) if (outlier[:, other] == outlier[:, k]).all()]
        assert same == np.flatnonzero(times == times[k]).tolist()
        assert len(same) == per_shot
    assert not outlier[bvals == 0].any()
    assert fraction.min() >= 0.2
    assert fraction[outlier].max() <= 0.5
    shots = 800 * slices / per_shot
    assert outlier[bvals > 0].mean() == pytest.approx(0.1, abs=3 * np.sqrt(0.1 * 0.9 / shots))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coarse phantom of nine noise-free volumes."""
    folder = tmp_path_factory.mktemp("phantom")
    return make_phantom(folder / "phantom", replace(TINY, scheme=_write_scheme(folder)))


def _write_scheme(folder: Path) -> str:
    """Write a b-table of nine volumes and return it as BVAL,BVEC."""
    bvals, bvecs = gradient_table("dsi101")
    keep = np.r_[0, 1:7, 21, 24]
    np.savetxt(folder / "t.bval", bvals[keep][None])
    np.savetxt(folder / "t.bvec", bvecs[keep].T)
    return f"{folder / 't.bval'},{folder / 't.bvec'}"


def test_dataset_is_valid_bids(phantom: Path) -> None:
    program = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent)) or shutil.which(
        "bids-validator-deno"
    )
    if program is None:
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run([program, str(phantom / "bids"), "--format", "json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    errors = [issue for issue in report["issues"]["issues"] if issue["severity"] == "error"]
    assert errors == []
    assert report["summary"]["totalFiles"] >= 12


def test_ground_truth_locates_points_in_raw_volumes(phantom: Path) -> None:
    """Raw b=0 volumes, sampled at the true positions with intensity correction, match the ideal b=0 best."""
    truth, sub = read_truth(phantom / "truth"), phantom / "bids/sub-01"
    names = ("dwi/sub-01_dir-PA_dwi", "fmap/sub-01_dir-AP_epi")
    series, epis = (read_image(sub / f"{name}.nii.gz") for name in names)
    field, points = truth.image("field_hz"), truth.brain_points()
    size = np.linalg.norm(truth.mm_per_hz)
    ideal = truth.image("ideal_b0").at(apply(truth.poses[0], points), order=3)
    b0 = np.flatnonzero(truth.bvals == 0)
    assert len(b0) == 2
    assert np.abs(truth.poses[b0[1]] - truth.poses[b0[0]]).max() > 0.1
    cases = [(replace(series, data=series.data[..., v]), truth.poses[v], 1) for v in b0]
    epi_pose = np.asarray(truth.table["epi_head_to_scanner"])[0]
    for image, pose, sign in [*cases, (replace(epis, data=epis.data[..., 0]), epi_pose, -1)]:
        offset = pose[:3, :3].T @ truth.mm_per_hz / size * 2.0
        slope = sign * size * (field.at(points + offset) - field.at(points - offset)) / 4.0
        undistorted = apply(pose, points)
        distorted = undistorted + sign * field.at(points)[:, None] * truth.mm_per_hz

        def correlation(positions: np.ndarray, image: Image = image, slope: np.ndarray = slope) -> float:
            return float(np.corrcoef(image.at(positions, order=3) * (1 + slope), ideal)[0, 1])

        best = correlation(distorted)
        assert best > 0.96
        assert best > correlation(undistorted) + 0.01
        for axis in np.eye(3):
            before, after = correlation(distorted - axis), correlation(distorted + axis)
            assert abs(0.5 * (before - after) / (before - 2 * best + after)) < 0.15  # mm, vertex of a parabola


def test_ground_truth_maps_and_fibres_are_consistent(phantom: Path) -> None:
    truth = read_truth(phantom / "truth")
    assert truth.table["largest_displacement_mm"] == pytest.approx(8.0)
    to_head, mask = truth.image("template_to_head"), truth.image("template_brain_mask")
    points = mask.points(mask.data > 0.5, 500)
    head = to_head.at(points)
    back = truth.image("head_to_template").at(head)
    assert np.linalg.norm(back - points, axis=1).max() < 0.2
    brain = truth.image("T1w_brain_mask").at(head, order=0)
    assert brain.mean() > 0.95
    displacement = np.linalg.norm(head - points - (head - points).mean(0), axis=1)
    assert displacement.max() > 3
    fibres, fractions = truth.image("fibres"), truth.image("fibre_shares")
    inside = fractions.data.sum(-1) > 0
    np.testing.assert_allclose(np.linalg.norm(fibres.data[inside][:, :3], axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(fractions.data[inside].sum(-1), 1, atol=1e-5)


def test_ideal_attenuation_matches_true_fibres(phantom: Path) -> None:
    """Attenuation in white matter matches the saved fibres, but not with a flipped gradient component."""
    truth = read_truth(phantom / "truth")
    dwi, fibres, fractions = (truth.image(n) for n in ("ideal_dwi", "fibres", "fibre_shares"))
    depth = distance_transform_edt(fractions.data.sum(-1) > 0, sampling=3.0)
    voxels = np.argwhere(depth > 6)
    index = tuple(voxels.T)
    signal = dwi.at(apply(truth.poses[0], apply(fibres.affine, voxels)))
    gradients = np.asarray(truth.table["bvecs_scanner"]) @ truth.poses[0][:3, :3]  # R' g

    def error(g: np.ndarray) -> float:
        squared = np.einsum("npd,vd->npv", fibres.data[index].reshape(-1, 2, 3), g) ** 2
        bundles = sum(s * np.exp(-truth.bvals * (r + (a - r) * squared)) for s, a, r in BUNDLE)
        predicted = (fractions.data[index][..., None] * bundles).sum(1)
        return float(np.sqrt(np.mean((signal / signal[:, :1] - predicted)[:, truth.bvals > 500] ** 2)))

    assert len(voxels) > 100
    assert error(gradients) < 0.03
    for axis in range(3):
        assert error(gradients * np.where(np.arange(3) == axis, -1, 1)) > 2 * error(gradients)


@pytest.mark.slow
def test_phantom_is_reproducible_from_its_seed(phantom: Path, tmp_path: Path) -> None:
    repeated = make_phantom(tmp_path / "repeated", replace(TINY, scheme=_write_scheme(tmp_path), ideal=False))
    for name in ("bids/sub-01/dwi/sub-01_dir-PA_dwi", "bids/sub-01/anat/sub-01_T1w"):
        first, second = (read_image(f / f"{name}.nii.gz").data for f in (phantom, repeated))
        np.testing.assert_array_equal(first, second)


def test_invalid_settings_and_folders_raise(tmp_path: Path) -> None:
    for invalid in ({"moved": 2.0}, {"resolution": 0.0}, {"distortion": -1.0}, {"orientation": "XYZ"}):
        with pytest.raises(SettingsError):
            make_phantom(tmp_path / "x", replace(TINY, **invalid))
    (tmp_path / "y" / "bids").mkdir(parents=True)
    with pytest.raises(OutputError):
        make_phantom(tmp_path / "y", TINY)
    with pytest.raises(GradientError):
        make_phantom(tmp_path / "z", replace(TINY, scheme="a.bval,b.bvec"))
    assert not (tmp_path / "z").exists()


@pytest.mark.slow
def test_deepbet_finds_the_brain(tmp_path: Path) -> None:
    from deepbet import BrainExtraction

    make_phantom(tmp_path / "p", replace(TINY, scheme=_write_scheme(tmp_path), t1w_resolution=1.5, ideal=False))
    image = nib.load(tmp_path / "p/bids/sub-01/anat/sub-01_T1w.nii.gz")
    predicted = BrainExtraction(no_gpu=True).run(image)[1].get_fdata() > 0
    true = read_truth(tmp_path / "p/truth").image("T1w_brain_mask").data > 0
    assert 2 * (predicted & true).sum() / (predicted.sum() + true.sum()) > 0.95


def test_complex_phantom_is_a_bids_dataset(tmp_path: Path) -> None:
    settings = replace(
        TINY, scheme="hasc55", resolution=8.0, t1w_resolution=4.0, ideal=False, k_space="6/8", complex=True
    )
    out = make_phantom(tmp_path, settings)
    (unit,) = find_units(out / "bids", Settings())
    (run,) = unit.runs
    assert (run.k_space.partial_fourier, run.k_space.pe_axis) == (0.75, 1)
    assert run.complex_part is not None
    (raw,) = read_unit(unit, Settings()).runs
    assert raw.phase is not None
    spectrum = torch.fft.fft(torch.polar(raw.data, raw.phase), dim=2).abs().mean((0, 1, 3))
    frequency = np.fft.fftfreq(len(spectrum))
    assert float(spectrum[frequency < -0.27].max()) < 0.1 * float(spectrum[frequency > 0.27].min())
