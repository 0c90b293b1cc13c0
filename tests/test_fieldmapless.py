"""Correction without a fieldmap: what the tissues of the structural image tell of the displacement."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Distortion
from dsiprep.data.transform import Affine
from dsiprep.errors import InputError
from dsiprep.ops.affine import rigid_matrix
from dsiprep.ops.contrast import _solved, predicted_contrast
from dsiprep.phantom.head import make_head
from dsiprep.phantom.interpolate import read
from dsiprep.phantom.scan import READOUT_TIME, Source, add_noise, scan
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import make_tissue
from dsiprep.plan import choose_distortion, choose_structural
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from dsiprep.stages.fieldmapless import correct_without_fieldmap

VOXEL = 3.0
UP = PhaseEncoding(1, 1, READOUT_TIME)


class Case:
    """A phantom with fields to 8 mm, its tissues, and a coregistration that is off by 2 degrees and 1 mm."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        head = make_head(rng)
        affine = np.diag([-VOXEL, VOXEL, VOXEL, 1.0])
        shape = (60, 72, 52)
        affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        self.grid = Grid(shape, affine)
        self.head = head
        tissue = make_tissue(head, head.box(VOXEL * np.array(shape) + 40, VOXEL / 2))
        field, field_grid = make_field(head, 8.0, VOXEL * READOUT_TIME)
        self.source = Source(tissue.signal(0.0, np.zeros(3)), tissue.grid, field, field_grid)
        points = self.grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)).reshape(-1, 3)
        atlas, inside = head.atlas, head.to_template(points)
        brain, gm, wm = (read(atlas[n], head.atlas_grid, inside).reshape(shape) for n in ("brain", "gm", "wm"))
        self.brain = brain > 0.5
        self.known = read(field, field_grid, points).reshape(shape) * VOXEL * READOUT_TIME
        maps = torch.from_numpy(np.stack([np.clip(brain - gm - wm, 0, 1), gm, wm]).astype(np.float32))
        self.maps = maps * torch.from_numpy(self.brain)
        self.noise = float(self.shot(replace(UP, readout_time=0.0))[self.brain].mean()) / 20

    def shot(self, pe: PhaseEncoding) -> np.ndarray:
        return np.asarray(scan(self.source, self.grid, pe, np.eye(4)), np.float32)

    def mask(self) -> Volume:
        return Volume(torch.from_numpy(self.brain.astype(np.float32)), self.grid)

    def seen(self, tissue: torch.Tensor | None, enlarged: float = 1.0) -> Anatomy:
        image = Volume(self.maps.sum(0), self.grid)
        none = Affine(np.eye(4), "anat", "ACPC")
        return Anatomy("T1w", image, self.mask(), tissue, none, None, None, "a", None, None, enlarged=enlarged)

    def found(self, b0: Volume, pe: PhaseEncoding = UP, degrees: float = 0.0) -> Distortion:
        wrong = rigid_matrix(np.array([np.deg2rad(degrees), 0, 0, degrees / 4, 0, degrees / 2]), self.head.centre)
        start = Coregistration(Affine(wrong, "dwiref", "ACPC"), 1.0, 1.0, "mi")
        return correct_without_fieldmap(pe, b0, self.mask(), self.seen(self.maps), start)

    def corrected(self, pe: PhaseEncoding, degrees: float = 2.0) -> Distortion:
        image = add_noise(self.shot(pe), self.noise, np.random.default_rng(7))
        return self.found(Volume(torch.from_numpy(image), self.grid), pe, degrees)


case = cache(Case)


def test_displacement_of_a_phantom_is_found_with_its_sign() -> None:
    """Both polarities, with the same field in Hz; well below what no correction leaves, though the pose was wrong."""
    for polarity in (1, -1):
        result = case().corrected(replace(UP, polarity=polarity))
        assert result.fieldmap_hz is not None and result.method == "fieldmapless"
        found = result.fieldmap_hz.numpy() * VOXEL * READOUT_TIME
        error, known = (found - case().known)[case().brain], case().known[case().brain]
        assert np.corrcoef(found[case().brain], known)[0, 1] > 0.85
        assert np.abs(error - np.median(error)).mean() < 0.45 * np.abs(known - np.median(known)).mean()
        moved = result.fields[0].data.numpy()[1]
        np.testing.assert_allclose(moved, polarity * found, atol=1e-3)  # j runs along +y in this grid
        assert np.abs(np.diff(moved, axis=1)).max() < VOXEL


def test_little_is_made_up_where_there_is_no_distortion() -> None:
    image = add_noise(case().shot(replace(UP, readout_time=0.0)), case().noise, np.random.default_rng(7))
    moved = case().found(Volume(torch.from_numpy(image), case().grid), degrees=2.0).fields[0].data.numpy()[1]
    assert np.abs(moved - np.median(moved[case().brain]))[case().brain].mean() < 0.25


def test_without_a_readout_time_the_displacement_is_the_same() -> None:
    image = Volume(torch.from_numpy(case().shot(UP)), case().grid)
    told, untold = (case().found(image, pe) for pe in (UP, replace(UP, readout_time=None)))
    assert untold.fieldmap_hz is None
    np.testing.assert_array_equal(told.fields[0].data, untold.fields[0].data)


def test_what_cannot_be_done_is_said() -> None:
    image, mask = Volume(torch.from_numpy(case().shot(UP)), case().grid), case().mask()
    start = Coregistration(Affine(np.eye(4), "dwiref", "ACPC"), 1.0, 1.0, "mi")
    with pytest.raises(InputError, match="no tissue priors"):
        correct_without_fieldmap(UP, image, mask, case().seen(None), start)
    away = np.eye(4)
    away[:3, 3] = 200
    with pytest.raises(InputError, match="covers 0% of the other"):
        lost = Coregistration(Affine(away, "dwiref", "ACPC"), 1.0, 1.0, "mi")
        correct_without_fieldmap(UP, image, mask, case().seen(case().maps), lost)


def test_weights_of_tissues_drift_and_outliers_do_not_count() -> None:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.dirichlet([1.0, 1, 1], (30, 30, 30)).astype(np.float32)).permute(3, 0, 1, 2)
    bias = torch.linspace(0.7, 1.3, 30)[:, None, None]
    image = bias * torch.einsum("m,mabc->abc", torch.tensor([3.0, 1.2, 0.8]), maps)
    spoiled = image.clone()
    spoiled[15, 15, 15] = 100
    inner = torch.ones(30, 30, 30)
    predicted, spread = predicted_contrast(spoiled, maps.contiguous(), 3, inner, [3.0, 3.0, 3.0])
    middle = (slice(6, 24),) * 3
    assert float((predicted - image)[middle].abs().mean()) < 0.05 and spread < 0.1
    assert abs(float(predicted[15, 15, 15] - image[15, 15, 15])) < 0.2


def test_small_systems_are_solved_as_numpy_solves_them() -> None:
    rng = np.random.default_rng(2)
    half = rng.normal(size=(5, 4, 4))
    full, right = half @ half.transpose(0, 2, 1) + np.eye(4), rng.normal(size=(5, 4))
    upper = {(p, q): torch.from_numpy(full[:, p, q]) for p in range(4) for q in range(p, 4)}
    found = torch.stack(_solved(upper, [torch.from_numpy(right[:, p]) for p in range(4)]), -1)
    np.testing.assert_allclose(found, np.linalg.solve(full, right[..., None])[..., 0], rtol=1e-9)


def test_it_is_the_last_resort_and_needs_the_axis_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "d.nii", tmp_path / "d.bval", tmp_path / "d.bvec", PhaseEncoding(1, -1))
    unit = Unit("01", None, "sub-01", (run,), t1w=(tmp_path / "T1w.nii",), t2w=(tmp_path / "T2w.nii",))

    def choose(wanted: str, *encodings: PhaseEncoding | None, unit: Unit = unit) -> str:
        acquired = cast(Any, SimpleNamespace(blips=[SimpleNamespace(pe=pe) for pe in encodings]))
        return choose_distortion(unit, acquired, Settings(distortion=DistortionSettings(anat_reference=wanted)))[0]

    down = PhaseEncoding(1, -1)
    assert choose("none", down) == "none"
    assert choose("auto", down) == choose("invt1w", down) == choose("t2w", down) == "fieldmapless"
    assert choose("auto", PhaseEncoding(1, 1), down) == "drbuddi"
    unsigned = replace(unit, runs=(replace(run, pe=None, metadata={"PhaseEncodingAxis": "j"}),))
    assert choose("auto", None, unit=unsigned) == "fieldmapless" and choose("none", None, unit=unsigned) == "none"
    assert choose("auto", None, unit=replace(unit, runs=(replace(run, pe=None),))) == "none"
    automatic = DistortionSettings(anat_reference="auto")
    assert choose_structural(unit, Settings(distortion=automatic)) == "T1w"
    assert choose_structural(unit, Settings(distortion=automatic, anatomy=AnatomySettings(modality="T2w"))) == "T2w"
    bare = replace(unit, t2w=())
    assert choose_structural(bare, Settings(distortion=DistortionSettings(anat_reference="t2w"))) == ""
