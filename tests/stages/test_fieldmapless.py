"""Correction without a fieldmap, from the tissues of the structural image."""

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
from dsiprep.ops.intensity.tissue_contrast import _solve_per_voxel, predicted_contrast
from dsiprep.phantom.scanner import READOUT_TIME, add_noise
from dsiprep.plan import choose_distortion, choose_structural
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from dsiprep.stages.fieldmapless import correct_without_fieldmap
from helpers.tissue_head import UP, VOXEL, case


def test_displacement_of_a_phantom_is_recovered_with_its_sign() -> None:
    """Both polarities give the same field in Hz, with an error well below the distortion, from a wrong initial pose."""
    for polarity in (1, -1):
        result = case().correct_noisy(replace(UP, polarity=polarity))
        assert result.fieldmap_hz is not None
        assert result.method == "fieldmapless"
        found = result.fieldmap_hz.numpy() * VOXEL * READOUT_TIME
        error, known = (found - case().known)[case().brain], case().known[case().brain]
        assert np.corrcoef(found[case().brain], known)[0, 1] > 0.85
        assert np.abs(error - np.median(error)).mean() < 0.45 * np.abs(known - np.median(known)).mean()
        displacement = result.fields[0].data.numpy()[1]
        np.testing.assert_allclose(displacement, polarity * found, atol=1e-3)  # j is +y in this grid
        assert np.abs(np.diff(displacement, axis=1)).max() < VOXEL


def test_undistorted_image_gives_little_displacement() -> None:
    image = add_noise(case().acquire(replace(UP, readout_time=0.0)), case().noise, np.random.default_rng(7))
    result = case().correct(Volume(torch.from_numpy(image), case().grid), pose_error=2.0)
    displacement = result.fields[0].data.numpy()[1][case().brain]
    assert np.abs(displacement - np.median(displacement)).mean() < 0.25


def test_displacement_does_not_depend_on_the_readout_time() -> None:
    image = Volume(torch.from_numpy(case().acquire(UP)), case().grid)
    known, unknown = (case().correct(image, pe) for pe in (UP, replace(UP, readout_time=None)))
    assert unknown.fieldmap_hz is None
    np.testing.assert_array_equal(known.fields[0].data, unknown.fields[0].data)


def test_missing_or_distant_tissues_are_rejected() -> None:
    image, mask = Volume(torch.from_numpy(case().acquire(UP)), case().grid), case().mask()
    start = Coregistration(Affine(np.eye(4), "dwiref", "ACPC"), 1.0, 1.0, "mi")
    with pytest.raises(InputError, match="no tissue priors"):
        correct_without_fieldmap(UP, image, mask, case().anatomy(None), start)
    distant = np.eye(4)
    distant[:3, 3] = 200
    start = Coregistration(Affine(distant, "dwiref", "ACPC"), 1.0, 1.0, "mi")
    with pytest.raises(InputError, match="covers 0% of the brain"):
        correct_without_fieldmap(UP, image, mask, case().anatomy(case().maps), start)


def test_tissue_weights_follow_a_bias_field_and_ignore_outliers() -> None:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.dirichlet([1.0, 1, 1], (30, 30, 30)).astype(np.float32)).permute(3, 0, 1, 2)
    bias = torch.linspace(0.7, 1.3, 30)[:, None, None]
    image = bias * torch.einsum("m,mabc->abc", torch.tensor([3.0, 1.2, 0.8]), maps)
    with_outlier = image.clone()
    with_outlier[15, 15, 15] = 100
    everywhere = torch.ones(30, 30, 30)
    predicted, spread = predicted_contrast(with_outlier, maps.contiguous(), 3, everywhere, [3.0, 3.0, 3.0])
    interior = (slice(6, 24),) * 3
    assert float((predicted - image)[interior].abs().mean()) < 0.05
    assert spread < 0.1
    assert abs(float(predicted[15, 15, 15] - image[15, 15, 15])) < 0.2


def test_per_voxel_solver_matches_numpy() -> None:
    rng = np.random.default_rng(2)
    half = rng.normal(size=(5, 4, 4))
    full, right = half @ half.transpose(0, 2, 1) + np.eye(4), rng.normal(size=(5, 4))
    upper = {(p, q): torch.from_numpy(full[:, p, q]) for p in range(4) for q in range(p, 4)}
    solution = torch.stack(_solve_per_voxel(upper, [torch.from_numpy(right[:, p]) for p in range(4)]), -1)
    np.testing.assert_allclose(solution, np.linalg.solve(full, right[..., None])[..., 0], rtol=1e-9)


def test_fieldmapless_is_chosen_last_and_needs_only_the_axis(tmp_path: Path) -> None:
    run = Run(tmp_path / "d.nii", tmp_path / "d.bval", tmp_path / "d.bvec", PhaseEncoding(1, -1))
    unit = Unit("01", None, "sub-01", (run,), t1w=(tmp_path / "T1w.nii",), t2w=(tmp_path / "T2w.nii",))

    def choose(reference: str, *encodings: PhaseEncoding | None, unit: Unit = unit) -> str:
        acquired = cast(Any, SimpleNamespace(blips=[SimpleNamespace(pe=pe) for pe in encodings]))
        return choose_distortion(unit, acquired, Settings(distortion=DistortionSettings(anat_reference=reference)))[0]

    down = PhaseEncoding(1, -1)
    assert choose("none", down) == "none"
    assert choose("auto", down) == choose("invt1w", down) == choose("t2w", down) == "fieldmapless"
    assert choose("auto", PhaseEncoding(1, 1), down) == "drbuddi"
    unsigned = replace(unit, runs=(replace(run, pe=None, metadata={"PhaseEncodingAxis": "j"}),))
    assert choose("auto", None, unit=unsigned) == "fieldmapless"
    assert choose("none", None, unit=unsigned) == "none"
    assert choose("auto", None, unit=replace(unit, runs=(replace(run, pe=None),))) == "none"
    automatic = DistortionSettings(anat_reference="auto")
    assert choose_structural(unit, Settings(distortion=automatic)) == "T1w"
    assert choose_structural(unit, Settings(distortion=automatic, anatomy=AnatomySettings(modality="T2w"))) == "T2w"
    without_t2w = replace(unit, t2w=())
    assert choose_structural(without_t2w, Settings(distortion=DistortionSettings(anat_reference="t2w"))) == ""
