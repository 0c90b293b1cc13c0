"""Decisions of the stage, signs of each phase encoding, and resampling of a head whose field changes as it tilts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.motion import Motion
from dsiprep.data.moving_field import MovingField
from dsiprep.data.results import Acquired, Blip
from dsiprep.io.moving_field_files import write_moving_field
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.motion.tilted_series import pitch_and_roll
from dsiprep.phantom.scanner import Source, scan
from dsiprep.report.boilerplate import methods_html
from dsiprep.report.moving_field_part import moving_field_facts, moving_field_pictures
from dsiprep.report.page_parts import FigureWriter
from dsiprep.settings import ResampleSettings
from dsiprep.stages.moving_field import follow_field, with_poses
from dsiprep.stages.resample import resample
from helpers.grids import make_grid
from helpers.identity_results import head_intensity, make_anatomy, make_coregistration, make_motion, voxel_points
from helpers.report_subject import make_subject

READOUT, RESTING = 0.04, np.eye(4)
TURN = rigid_matrix(np.deg2rad([7.0, 0, 0, 0, 0, 0]) + np.array([0, 0, 0, 1, -1, 0.5]))
TURN = TURN @ rigid_matrix(np.deg2rad([0.0, -5, 0, 0, 0, 0]))


def series(grid: Grid, pe: PhaseEncoding | None, transforms: np.ndarray) -> tuple[Acquired, tuple[Motion, ...]]:
    count = len(transforms)
    data = torch.ones(count, *grid.shape)
    bvals, bvecs = np.where(np.arange(count) == 0, 0.0, 1000.0), np.tile([1.0, 0, 0], (count, 1))
    zero = np.zeros(count, int)
    dwi = DWI(data, grid, bvals, bvecs, zero, zero)
    scheme = SamplingScheme("single-shell", False, (1000.0,), count - 1, 1, 1000.0, "")
    mask = Volume(torch.ones(grid.shape), grid)
    acquired = Acquired(dwi, (Blip("only", pe, torch.zeros(0, *grid.shape)),), scheme, mask, np.ones(1))
    return acquired, (make_motion(grid, transforms, np.arange(count)),)


def test_not_used_where_the_head_hardly_turned() -> None:
    grid = make_grid("LAS", (12, 14, 10), (5.0, 5.0, 5.0))
    small = rigid_matrix(np.deg2rad(np.random.default_rng(0).uniform(-1.5, 1.5, (30, 6))))
    small[7] = TURN  # one is not enough
    small[0] = np.eye(4)
    acquired, motions = series(grid, PhaseEncoding(1, 1, READOUT), small)
    b0s = acquired.dwi.select(acquired.dwi.is_b0)
    for wanted in ("auto", "on"):
        found = follow_field(acquired, b0s, motions, None, wanted)
        assert found.derivatives is None
        assert found.displacements(0) == ()
        assert "rotations are below 2 degrees of pitch and roll in all but 1 volumes" in found.reason
        np.testing.assert_array_equal(with_poses(motions[0], found).transforms, small)
    unknown = series(grid, None, small)
    assert "phase encoding is not known" in follow_field(unknown[0], b0s, unknown[1], None, "on").reason
    affine = small.copy()
    affine[3, 0, 0] *= 1.02
    acquired, motions = series(grid, PhaseEncoding(1, 1, READOUT), affine)
    assert "poses are affine" in follow_field(acquired, b0s, motions, None, "on").reason


@pytest.mark.parametrize(("orientation", "axis", "polarity"), [("LAS", 1, 1), ("LAS", 1, -1), ("RAS", 0, 1)])
def test_resampling_undoes_what_the_scanner_did(
    orientation: str, axis: int, polarity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phantom's scanner displaces a tilted head (PA, AP, LR); with the true fields, one resampling undoes it."""
    monkeypatch.setattr("dsiprep.stages.resample.brain_mask_dwiref", lambda image: image)  # a network, not needed here
    grid = make_grid(orientation, (40, 44, 40), (2.0, 2.0, 2.0))
    fine = make_grid("RAS", (90, 100, 90), (1.0, 1.0, 1.0))
    head = head_intensity(voxel_points(fine)).astype(np.float32)

    def per_degree(points: np.ndarray) -> list[np.ndarray]:
        return [5 * np.exp(-((points - c) ** 2).sum(-1) / 800) for c in ((5.0, 10, -8), (-12.0, 0, 6))]

    tilts = pitch_and_roll(np.stack([RESTING, TURN]))
    change = np.tensordot(tilts[1], per_degree(voxel_points(fine)), axes=1).astype(np.float32)
    pe = PhaseEncoding(axis, polarity, READOUT)
    still = scan(Source(head, fine, 0 * head, fine), grid, pe, RESTING)
    turned = scan(Source(head, fine, change, fine), grid, pe, TURN)
    dwi = DWI(
        torch.from_numpy(np.stack([still, turned])), grid, np.zeros(2), np.zeros((2, 3)), np.zeros(2, int),
        np.zeros(2, int),
    )  # fmt: skip
    mm_per_hz = READOUT * 2.0
    fields = torch.from_numpy(mm_per_hz * np.stack(per_degree(voxel_points(grid)))).float()
    directions = polarity * grid.directions[:, axis][None]
    moving = MovingField(fields, grid, directions, tilts, np.stack([RESTING, TURN]), mm_per_hz, "")
    motion = make_motion(grid, np.stack([RESTING, TURN]), np.arange(2))
    found = {}
    for name, used in (("with", moving), ("without", None)):
        inputs = (dwi, (motion,), None, make_coregistration(np.eye(4)), make_anatomy(), ResampleSettings(2.0))
        found[name] = resample(*inputs, "none", moving=used).dwi.data.numpy()
    inside = found["with"][0] > 300
    errors = {name: float(np.abs(both[1] - both[0])[inside].mean()) for name, both in found.items()}
    assert np.abs(mm_per_hz * change).max() > 2.0
    assert errors["without"] > 30
    assert errors["with"] < 0.2 * errors["without"]
    shifted = np.where(found["with"] > 0, found["with"], 0).sum(axis=(1, 2, 3))
    assert shifted[1] == pytest.approx(shifted[0], rel=0.01)  # signal is conserved by the Jacobian determinant


def test_derivatives_report_and_methods(tmp_path: Path) -> None:
    plain = make_subject()
    grid = plain.motions[0].dwiref.grid
    values = torch.stack([torch.full(grid.shape, 0.2), torch.full(grid.shape, -0.1)])
    count = len(plain.acquired.dwi)
    tilts = np.stack([np.linspace(0, 6, count), np.zeros(count)], axis=1)
    transforms = np.tile(np.eye(4), (count, 1, 1))
    directions = np.zeros((2, 3))
    moving = MovingField(values, grid, directions, tilts, transforms, 0.1, "It changes.", 1.2, 40.0, (0.1, 0.09))
    results = replace(plain, moving_field=moving)
    write_moving_field(tmp_path, results)
    (image,) = (tmp_path / "fmap").glob("*_desc-moving_fieldmap.nii.gz")
    found = nib.Nifti1Image.from_filename(image)
    np.testing.assert_allclose(found.get_fdata()[..., 0], 2.0, atol=1e-5)  # 0.2 mm per degree, 0.1 mm per Hz
    np.testing.assert_allclose(found.get_fdata()[..., 1], -1.0, atol=1e-5)
    sidecar = json.loads(image.with_name(image.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Units"] == "Hz/degree"
    assert sidecar["Pitch"][-1] == 6.0
    figures = FigureWriter(tmp_path, "sub-01", "sub-01")
    assert len(moving_field_pictures(results, figures)) == 2
    facts = {fact.name: fact.value for fact in moving_field_facts(results)}
    assert facts["Change of the field with the head"] == "It changes."
    assert "10.00 % before, 9.00 % after" in facts["Gain by the moving field"]
    assert "Andersson et al. 2018" in methods_html([results])
    rigid = replace(plain, moving_field=replace(moving, derivatives=None, residuals=()))
    write_moving_field(tmp_path / "none", rigid)
    assert not (tmp_path / "none").exists()
    assert moving_field_pictures(rigid, figures) == ()
    assert "Andersson et al. 2018" not in methods_html([rigid])
    assert moving_field_facts(plain) == ()
