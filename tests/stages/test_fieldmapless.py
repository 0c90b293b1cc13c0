"""Correction without a fieldmap: what the tissues of the structural image tell of the displacement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.data.grid import Volume
from dsiprep.data.results import Coregistration
from dsiprep.data.transform import Affine
from dsiprep.errors import InputError
from dsiprep.ops.intensity.tissue_contrast import _solved, predicted_contrast
from dsiprep.phantom.scanner import READOUT_TIME, add_noise
from dsiprep.plan import choose_distortion, choose_structural
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from dsiprep.stages.fieldmapless import correct_without_fieldmap
from helpers.tissue_head import UP, VOXEL, case


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
