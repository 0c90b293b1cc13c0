"""What both blips of a pair share: invisible to the pair, seen by a structural image of any contrast."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.results import Distortion
from dsiprep.ops.pepolar.common_displacement import _without_pose, common_displacement, local_linear_fit
from dsiprep.standalone.blip_pair import correct_pair
from helpers import epi_pair as simulation

GRID = simulation.make_grid("RAS")
AXIS = np.array([0.0, 1.0, 0.0])


def common_mm(points: np.ndarray) -> np.ndarray:
    """Displacement that both blips share: 2 mm at one place, -1.5 mm at another."""
    p = np.asarray(points) - simulation.CENTRE
    near = [np.exp(-0.5 * ((p - c) ** 2).sum(-1) / 24**2) for c in ([-25.0, 35, 10], [30.0, -25, 0])]
    return 2.0 * near[0] - 1.5 * near[1]


def worlds(grid: Grid) -> np.ndarray:
    return grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))


def pushed(monkeypatch: pytest.MonkeyPatch, opposite: float, common: float) -> np.ndarray:
    """The head, its signal moved along y by `opposite` times the usual field plus `common` times the shared one."""
    usual, head = simulation.field_mm, simulation.head

    def textured(points: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(points, -1, 0)
        return head(points) * (1 + 0.5 * np.sin(x / 5) * np.sin(y / 4) + 0.4 * np.sin(y / 5 + 1) * np.sin(z / 5))

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "head", textured)
        patch.setattr(
            simulation,
            "field_mm",
            lambda p, axis, amplitude: opposite * usual(p, axis, amplitude) + common * common_mm(p),
        )
        return simulation.acquire(GRID, 1, 1.0, np.eye(4), 6.0, AXIS)


def test_a_local_fit_follows_any_contrast() -> None:
    """Dark for bright with a gain that drifts: nothing is left where the relation is linear in a window."""
    rng = np.random.default_rng(1)
    structural = torch.from_numpy(rng.normal(size=(24, 24, 24)).astype(np.float32))
    x = torch.linspace(0, 1, 24)[:, None, None]
    image = (3 - 0.2 * x) - (1.5 + 0.1 * x) * structural
    grid = Grid((24, 24, 24), np.diag([2.0, 2, 2, 1]))
    predicted, variance = local_linear_fit(image, structural, torch.ones(24, 24, 24, dtype=torch.bool), grid)
    middle = (slice(6, 18),) * 3
    assert float((predicted - image)[middle].abs().mean()) < 0.03
    assert float(variance[middle].mean()) < 0.01 * float(image.var())


def test_displacement_is_seen_through_an_inverted_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, image = pushed(monkeypatch, 0.0, 0.0), pushed(monkeypatch, 0.0, 1.0)
    brain = simulation.head(worlds(GRID)) > 35
    structural = np.where(brain, 150 - truth, 0).astype(np.float32)
    order = [0, 2, 1]
    last = Grid(tuple(GRID.shape[a] for a in order), GRID.affine[:, [*order, 3]])
    arrays = [torch.from_numpy(np.ascontiguousarray(a.transpose(order))) for a in (image / 60, structural / 80, brain)]
    found, trace = common_displacement(arrays[0].float(), arrays[1].float(), arrays[2], last)
    known = _without_pose(torch.from_numpy(common_mm(worlds(GRID)).transpose(order).copy()).float(), arrays[2])
    known, there = known[arrays[2]].numpy(), found[arrays[2]].numpy()
    assert np.corrcoef(there, known)[0, 1] > 0.85
    assert 0.1 < np.polyfit(known, there, 1)[0] < 1  # cautious: it falls short rather than follow contrast
    assert np.abs(there - known).mean() < 0.9 * np.abs(known).mean()
    assert trace[-1]["change_mm"] < trace[0]["change_mm"]


def displacement_errors(result: Distortion, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of both blips in the brain in mm, each less its median."""
    field, common = simulation.field_mm(worlds(GRID), AXIS, 6.0), common_mm(worlds(GRID))
    wanted = (field + common, -field + common)
    errors = [(found.data.numpy()[1] - known)[brain] for found, known in zip(result.fields, wanted, strict=True)]
    return np.abs(errors[0] - np.median(errors[0])), np.abs(errors[1] - np.median(errors[1]))


def test_structural_image_lets_the_fields_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pair cannot tell what both share; with a T1w-like image some of it is found, and the sign of both is kept."""
    truth, rng = pushed(monkeypatch, 0.0, 0.0), np.random.default_rng(0)
    brain = simulation.head(worlds(GRID)) > 35
    images = {
        "up": pushed(monkeypatch, 1.0, 1.0) + rng.normal(0, 1, GRID.shape),
        "down": pushed(monkeypatch, -1.0, 1.0) + rng.normal(0, 1, GRID.shape),
        "structural": np.where(brain, 150 - truth, 0),
        "brain": brain,
    }
    for name, image in images.items():
        nib.save(nib.Nifti1Image(image.astype(np.float32), GRID.affine), tmp_path / f"{name}.nii.gz")
    files = tmp_path / "up.nii.gz", tmp_path / "down.nii.gz"
    alone = correct_pair(*files, pe_dir="j", mask=tmp_path / "brain.nii.gz")
    helped = correct_pair(*files, pe_dir="j", mask=tmp_path / "brain.nii.gz", structural=tmp_path / "structural.nii.gz")
    opposites = alone.fields[0].data + alone.fields[1].data
    assert float(opposites.abs().max()) < 1e-4
    assert float((helped.fields[0].data + helped.fields[1].data).abs().max()) > 0.3
    assert "moved both blips together" in helped.notes[-1]
    for before, after in zip(*(displacement_errors(r, brain) for r in (alone, helped)), strict=True):
        assert after.mean() < 0.95 * before.mean()
