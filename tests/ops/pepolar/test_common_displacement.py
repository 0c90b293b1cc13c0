"""Displacement shared by both blips: undetermined by the pair, estimated from a structural image of any contrast."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.api.blip_pair import correct_pair
from dsiprep.data.grid import Grid
from dsiprep.data.results import Distortion
from dsiprep.ops.pepolar.common_displacement import _without_pose_error, common_displacement, local_linear_fit
from helpers import epi_pair as simulation

GRID = simulation.make_grid("RAS")
AXIS = np.array([0.0, 1.0, 0.0])


def common_mm(points: np.ndarray) -> np.ndarray:
    """Displacement shared by both blips, mm: peaks of 2 and -1.5."""
    p = np.asarray(points) - simulation.CENTRE
    peaks = [np.exp(-0.5 * ((p - c) ** 2).sum(-1) / 24**2) for c in ([-25.0, 35, 10], [30.0, -25, 0])]
    return 2.0 * peaks[0] - 1.5 * peaks[1]


def voxel_positions(grid: Grid) -> np.ndarray:
    """World coordinates of all voxels, (i, j, k, 3)."""
    return grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))


def acquire_displaced(monkeypatch: pytest.MonkeyPatch, opposite: float, common: float) -> np.ndarray:
    """Image of the head, displaced along y by `opposite` times `field_mm` plus `common` times `common_mm`."""
    field_mm, head = simulation.field_mm, simulation.head

    def textured(points: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(points, -1, 0)
        return head(points) * (1 + 0.5 * np.sin(x / 5) * np.sin(y / 4) + 0.4 * np.sin(y / 5 + 1) * np.sin(z / 5))

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "head", textured)
        patch.setattr(
            simulation,
            "field_mm",
            lambda p, axis, amplitude: opposite * field_mm(p, axis, amplitude) + common * common_mm(p),
        )
        return simulation.acquire(GRID, 1, 1.0, np.eye(4), 6.0, AXIS)


def test_local_linear_fit_reproduces_an_inverted_contrast_with_varying_gain() -> None:
    """The residual vanishes where the relation between the images is linear within a window."""
    rng = np.random.default_rng(1)
    structural = torch.from_numpy(rng.normal(size=(24, 24, 24)).astype(np.float32))
    x = torch.linspace(0, 1, 24)[:, None, None]
    image = (3 - 0.2 * x) - (1.5 + 0.1 * x) * structural
    grid = Grid((24, 24, 24), np.diag([2.0, 2, 2, 1]))
    predicted, variance = local_linear_fit(image, structural, torch.ones(24, 24, 24, dtype=torch.bool), grid)
    interior = (slice(6, 18),) * 3
    assert float((predicted - image)[interior].abs().mean()) < 0.03
    assert float(variance[interior].mean()) < 0.01 * float(image.var())


def test_displacement_is_recovered_from_an_inverted_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, image = acquire_displaced(monkeypatch, 0.0, 0.0), acquire_displaced(monkeypatch, 0.0, 1.0)
    brain = simulation.head(voxel_positions(GRID)) > 35
    structural = np.where(brain, 150 - truth, 0).astype(np.float32)
    order = [0, 2, 1]
    last = Grid(tuple(GRID.shape[a] for a in order), GRID.affine[:, [*order, 3]])
    arrays = [torch.from_numpy(np.ascontiguousarray(a.transpose(order))) for a in (image / 60, structural / 80, brain)]
    estimate, trace = common_displacement(arrays[0].float(), arrays[1].float(), arrays[2], last)
    known = _without_pose_error(
        torch.from_numpy(common_mm(voxel_positions(GRID)).transpose(order).copy()).float(), arrays[2]
    )
    known, estimate = known[arrays[2]].numpy(), estimate[arrays[2]].numpy()
    assert np.corrcoef(estimate, known)[0, 1] > 0.85
    assert 0.1 < np.polyfit(known, estimate, 1)[0] < 1  # the strong prior underestimates displacement
    assert np.abs(estimate - known).mean() < 0.9 * np.abs(known).mean()
    assert trace[-1]["change_mm"] < trace[0]["change_mm"]


def displacement_errors(result: Distortion, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absolute error of each blip's displacement in the brain, relative to its median error, mm."""
    field, common = simulation.field_mm(voxel_positions(GRID), AXIS, 6.0), common_mm(voxel_positions(GRID))
    truth = (field + common, -field + common)
    errors = [(found.data.numpy()[1] - known)[brain] for found, known in zip(result.fields, truth, strict=True)]
    return np.abs(errors[0] - np.median(errors[0])), np.abs(errors[1] - np.median(errors[1]))


def test_structural_image_recovers_part_of_the_shared_displacement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pair alone gives exact opposites; a T1w-like image recovers part of what both blips share."""
    truth, rng = acquire_displaced(monkeypatch, 0.0, 0.0), np.random.default_rng(0)
    brain = simulation.head(voxel_positions(GRID)) > 35
    images = {
        "up": acquire_displaced(monkeypatch, 1.0, 1.0) + rng.normal(0, 1, GRID.shape),
        "down": acquire_displaced(monkeypatch, -1.0, 1.0) + rng.normal(0, 1, GRID.shape),
        "structural": np.where(brain, 150 - truth, 0),
        "brain": brain,
    }
    for name, image in images.items():
        nib.save(nib.Nifti1Image(image.astype(np.float32), GRID.affine), tmp_path / f"{name}.nii.gz")
    files = tmp_path / "up.nii.gz", tmp_path / "down.nii.gz"
    alone = correct_pair(*files, pe_dir="j", mask=tmp_path / "brain.nii.gz")
    with_structural = correct_pair(
        *files, pe_dir="j", mask=tmp_path / "brain.nii.gz", structural=tmp_path / "structural.nii.gz"
    )
    opposites = alone.fields[0].data + alone.fields[1].data
    assert float(opposites.abs().max()) < 1e-4
    assert float((with_structural.fields[0].data + with_structural.fields[1].data).abs().max()) > 0.3
    assert "displaced both blips together" in with_structural.notes[-1]
    for before, after in zip(*(displacement_errors(r, brain) for r in (alone, with_structural)), strict=True):
        assert after.mean() < 0.95 * before.mean()
