"""Blip-up/blip-down correction: kernels against SciPy, and recovery of known fields from an independent simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.pepolar import pair_model, regularisation
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion
from helpers.epi_pair import CENTRE, READOUT, SIZE, Case, correlation, make_grid, rigid
from helpers.shared_data import SHARED

DATA = SHARED / "bids"


def unwarp(case: Case, result: Distortion, b: int) -> np.ndarray:
    """Blip b unwarped by SciPy with the estimated pose and field, modulated by the Jacobian determinant."""
    grid = case.grid
    world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    pose = result.poses[b]
    points = world @ pose[:3, :3].T + pose[:3, 3] + np.moveaxis(result.fields[b].data.numpy(), 0, -1)
    voxels = grid.to_voxels(points)
    jacobian = np.stack([np.stack(np.gradient(voxels[..., c]), -1) for c in range(3)], -2)
    image = ndimage.map_coordinates(case.images[b][0].numpy(), np.moveaxis(voxels, -1, 0), order=3)
    return image * np.linalg.det(jacobian)


# ---- signs, orientations, motion


@pytest.mark.parametrize(
    ("codes", "axis", "first", "tilt"),
    [
        ("RAS", 1, 1, 0),
        ("RAS", 1, -1, 0),
        ("LAS", 0, 1, 0),
        ("LPS", 1, 1, 0),
        ("PSR", 0, -1, 0),
        ("PSR", 2, 1, 0),
        ("LAS", 2, -1, 0),
        ("LAS", 1, 1, 17),
    ],
)
def test_field_sign_is_correct_in_every_orientation(codes: str, axis: int, first: int, tilt: float) -> None:
    case = Case(make_grid(codes, tilt), axis, first)
    result = case.correct()
    assert result.fieldmap_hz is not None
    voxel = case.grid.voxel_sizes[axis]
    hertz = result.fieldmap_hz.numpy() * READOUT * voxel  # mm for polarity +1, along +axis
    assert np.abs(hertz - case.field)[case.brain].mean() < 0.2
    assert np.abs(case.field[case.brain]).max() > 4
    for b in range(2):
        # by convention, the displacement is the field times the signed relative readout time
        expected = np.einsum("c,ijk->cijk", case.grid.directions[:, axis], case.scales[b] * hertz)
        assert np.allclose(result.fields[b].data.numpy(), expected, atol=1e-3)
        unwarped = unwarp(case, result, b)
        assert correlation(unwarped, case.truth, case.brain) > 0.99
        assert np.abs(unwarped - case.truth)[case.brain].mean() < 0.03 * case.truth[case.brain].mean()
        assert np.allclose(result.after[b].numpy()[case.brain], unwarped[case.brain], atol=6)
    assert correlation(result.before[0].numpy(), case.truth, case.brain) < 0.97


def test_head_motion_and_gain_are_estimated_with_the_field() -> None:
    grid = make_grid("LAS")
    pose = rigid((1.5, -1.0, 2.0), np.array([1.5, 0.0, -1.0]))
    case = Case(grid, 1, pose=pose, noise=1.5, gain=1.3)
    result = case.correct()
    errors = case.errors(result)
    assert errors.mean() < 0.25
    assert np.percentile(errors, 95) < 0.7
    assert np.array_equal(result.poses[0], np.eye(4))
    points = CENTRE + 30 * np.concatenate([np.eye(3), -np.eye(3)])
    pose_error = result.poses[1] - pose
    point_error = points @ pose_error[:3, :3].T + pose_error[:3, 3]
    assert np.abs(point_error[:, [0, 2]]).max() < 0.3  # along phase encoding it is equivalent to a constant field
    assert result.trace[-1]["gain"] == pytest.approx(1 / 1.3, rel=0.02)
    assert correlation(unwarp(case, result, 1), unwarp(case, result, 0), case.brain) > 0.97
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > 0.98


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_strength_of_the_field_is_kept(noise: float) -> None:
    """Smoothness penalties must not shrink the field, with noise or without."""
    case = Case(make_grid("RAS", sizes=(3.0, 3.0, 3.0)), 1, noise=noise)
    result = case.correct()
    assert result.fieldmap_hz is not None
    found = result.fieldmap_hz.numpy()[case.brain] * READOUT * 3.0
    assert np.polyfit(case.field[case.brain], found, 1)[0] == pytest.approx(1, abs=0.01)


def test_roughness_is_counted_from_the_estimate_of_the_coarser_level() -> None:
    case = Case(make_grid("RAS"), 1, amplitude=4.0)
    images = tuple(i[0].permute(0, 2, 1).contiguous() / 60 for i in case.images)
    last = Grid(tuple(case.grid.shape[a] for a in (0, 2, 1)), case.grid.affine[:, [0, 2, 1, 3]])
    pair = pair_model.make_pair(images, torch.from_numpy(case.brain).permute(0, 2, 1), last, (1.0, -1.0), CENTRE)
    field = torch.from_numpy(np.ascontiguousarray(case.field.transpose(0, 2, 1), np.float32))
    spacing, smoothness = last.voxel_sizes, pair_model._smoothness(pair)
    expected = pair_model.expecting(pair, pair, field).expected
    assert torch.allclose(expected, regularisation.penalty_gradient(field, spacing, smoothness)[0])
    bumps = torch.cos(field)

    def distance(change: float) -> float:
        trial = field + change * bumps
        return float(
            regularisation.roughness(trial, spacing, smoothness)
            - regularisation.roughness(field, spacing, smoothness)
            - (expected.double() * (trial - field)).sum()
        )

    assert distance(0.2) > 0
    assert distance(-0.2) > 0
    assert abs(distance(0.01)) < 0.02 * distance(0.2)


def test_readout_times_may_differ_or_be_unknown() -> None:
    grid = make_grid("RAS")
    uneven = Case(grid, 1, readouts=(0.03, 0.06))
    result = uneven.correct()
    assert result.fieldmap_hz is not None
    hertz = result.fieldmap_hz.numpy() * READOUT * SIZE
    assert np.abs(hertz - uneven.field)[uneven.brain].mean() < 0.2
    ratio = result.fields[1].data.numpy()[1] / (result.fields[0].data.numpy()[1] + 1e-12)
    assert np.allclose(ratio[np.abs(hertz) > 0.1], -2, atol=1e-3)
    unknown = Case(grid, 1, readouts=(None, None)).correct()
    assert unknown.fieldmap_hz is None
    assert np.abs(unknown.fields[0].data.numpy()[1] - uneven.field)[uneven.brain].mean() < 0.2


def test_large_field_does_not_fold() -> None:
    case = Case(make_grid("LAS", sizes=(4.0, 3.0, 4.0)), 1, amplitude=16.0, noise=1.5)
    result = case.correct()
    for field in result.fields:
        along = np.einsum("c,cijk->ijk", case.grid.directions[:, 1], field.data.numpy())
        assert (1 + np.diff(along, axis=1) / 3.0).min() > 0
    errors = case.errors(result)
    assert np.abs(case.field[case.brain]).max() > 11
    assert np.percentile(errors, 95) < 1.0
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > 0.97
    assert all(row["change_mm"] >= 0 and np.isfinite(row["cost"]) for row in result.trace)


def test_identical_images_give_no_field() -> None:
    case = Case(make_grid("RAS"), 1, amplitude=0.0)
    result = case.correct()
    assert np.abs(result.fields[0].data.numpy())[:, case.brain].max() < 0.02
    assert np.allclose(result.poses[1], np.eye(4), atol=0.02)


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 12, 9), (6, 5, 1), (9, 2, 8)])
def test_results_are_finite_on_tiny_and_thin_grids(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    grid = Grid(shape, np.diag([3.0, 2.0, 4.0, 1.0]))
    images = [torch.from_numpy(rng.uniform(1, 2, (2, *shape)).astype(np.float32)) for _ in range(2)]
    images[0][0, 0, 0, 0] = float("nan")
    images[1][:, :, : shape[1] // 2] = 0  # partial coverage
    blips = tuple(Blip(n, PhaseEncoding(1, p, 0.04), torch.zeros(0, *shape)) for n, p in (("up", 1), ("down", -1)))
    result = correct_distortion(
        blips, (images[0], images[1]), grid, Volume(torch.ones(shape), grid), DistortionSettings()
    )
    assert result.fields[0].data.shape == (3, *shape)
    tensors = [f.data for f in result.fields] + [v.data for v in (*result.after, *result.before, result.dwiref)]
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    assert np.isfinite(result.poses).all()


@pytest.mark.parametrize("kind", ["several", "negative", "partial", "bright", "zeros"])
def test_field_is_recovered_from_unusual_images(kind: str, rng: np.random.Generator) -> None:
    """Several b=0 volumes, negative noise, missing slices, a different gain, an empty margin."""
    case = Case(make_grid("LAS", sizes=(6.0, 6.0, 6.0)), 1, noise=1.0)
    up, down = (image.clone() for image in case.images)
    inside = case.brain.copy()
    if kind == "several":
        up = torch.cat([up + torch.from_numpy(rng.normal(0, 1, up.shape).astype(np.float32)) for _ in range(4)])
    elif kind == "negative":
        down = torch.where(down < 20, down - 5 * torch.rand_like(down), down)
    elif kind == "partial":
        down[..., :6] = 0
        inside[..., :8] = False
    elif kind == "bright":
        down = down * 1000
    else:
        up[:, :2], down[:, -2:] = 0, 0
    result = correct_distortion(case.blips, (up, down), case.grid, case.mask, DistortionSettings())
    unit = case.grid.directions[:, 1]
    found = np.einsum("c,cijk->ijk", unit, result.fields[0].data.numpy())
    error = (found - case.field)[inside]
    assert np.isfinite(result.dwiref.numpy()).all()
    assert np.isfinite(found).all()
    assert np.abs(np.diff(found, axis=1)).max() < 6.0  # less than a voxel: nothing folds
    assert np.abs(error - np.median(error)).mean() < 0.3
    if kind == "bright":
        assert result.trace[-1]["gain"] == pytest.approx(1e-3, rel=0.05)


def test_invalid_pairs_are_rejected() -> None:
    shape = (6, 6, 6)
    grid = Grid(shape, np.eye(4))
    image, mask = torch.ones(1, *shape), Volume(torch.ones(shape), grid)

    def attempt(first: PhaseEncoding | None, second: PhaseEncoding | None, image: torch.Tensor = image) -> None:
        blips = (Blip("up", first, torch.zeros(0, *shape)), Blip("down", second, torch.zeros(0, *shape)))
        correct_distortion(blips, (image, torch.ones(1, *shape)), grid, mask, DistortionSettings())

    up, down = PhaseEncoding(1, 1, 0.05), PhaseEncoding(1, -1, 0.05)
    with pytest.raises(SettingsError, match="j and j are not opposite"):
        attempt(up, up)
    with pytest.raises(InputError, match="neither"):
        attempt(up, replace(down, readout_time=None))
    with pytest.raises(InputError, match="PhaseEncodingDirection"):
        attempt(None, down)
    with pytest.raises(InputError, match="empty"):
        attempt(up, down, torch.zeros(1, *shape))
    with pytest.raises(InputError, match="expected"):
        attempt(up, down, torch.ones(1, 5, 6, 6))
    blips = (Blip("up", up, image), Blip("down", down, image))
    with pytest.raises(SettingsError, match="--sdc-method none"):
        correct_distortion(blips, (image, image), grid, mask, DistortionSettings(method="none"))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/bids: a real blip-up/blip-down pair")
def test_real_pair_correlates_after_correction() -> None:
    images, encodings = [], []
    for direction in ("AP", "PA"):
        stem = DATA / "sub-xa30" / "dwi" / f"sub-xa30_dir-{direction}_dwi"
        image = nib.load(f"{stem}.nii.gz")
        sidecar = json.loads(Path(f"{stem}.json").read_text())
        first = np.asarray(image.dataobj[..., :1], np.float32)
        images.append(torch.from_numpy(np.moveaxis(first, -1, 0).copy()))
        encodings.append(PhaseEncoding.from_bids(sidecar["PhaseEncodingDirection"], sidecar["TotalReadoutTime"]))
    grid = Grid(image.shape[:3], image.affine)
    bright = ndimage.gaussian_filter(images[0][0].numpy(), 1) > 0.3 * np.percentile(images[0].numpy(), 95)
    mask = Volume(torch.from_numpy(ndimage.binary_fill_holes(bright).astype(np.float32)), grid)
    blips = tuple(Blip(f"{e.direction}", e, torch.zeros(0, *grid.shape)) for e in encodings)
    result = correct_distortion(blips, (images[0], images[1]), grid, mask, DistortionSettings())
    brain = mask.numpy() > 0
    assert correlation(result.before[0].numpy(), result.before[1].numpy(), brain) < 0.8
    assert correlation(result.after[0].numpy(), result.after[1].numpy(), brain) > 0.96
