"""ANTs as an engine, with the real program: antsRegistration if it is on PATH, otherwise antspyx."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsiprep.engines import ants
from dsiprep.engines import external_programs as programs
from dsiprep.errors import EngineError
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.settings import AnatomySettings, Settings
from helpers.recorder import Recorder
from helpers.template_subject import make_subject, make_template, template_to_subject

CPU = torch.device("cpu")
FAST = replace(AnatomySettings(), normalization="ants", ants_settings="fast")


def test_known_warp_is_recovered_in_both_directions(tmp_path: Path) -> None:
    pytest.importorskip("ants", reason="neither antsRegistration nor antspyx is installed")
    template, start = make_template(), np.eye(4)
    start[:3, 3] = 1.0, -2.0, 0.0
    forward, back = ants.normalise(make_subject()[0], template, template.mask, start, FAST, folder=tmp_path)
    inside = template.brain.grid.to_world(np.argwhere(template.mask.numpy() > 0)[::20])
    truth = template_to_subject(inside)
    before = np.linalg.norm(inside + start[:3, 3] - truth, axis=1).mean()
    forward_error = np.linalg.norm(chain_points(forward, inside) - truth, axis=1)
    back_error = np.linalg.norm(chain_points(back, truth) - inside, axis=1)
    affine = np.linalg.lstsq(np.c_[inside, np.ones(len(inside))], truth, rcond=None)[0]
    affine_error = np.linalg.norm(np.c_[inside, np.ones(len(inside))] @ affine - truth, axis=1).mean()
    assert before > 4
    assert affine_error > 1.5
    assert (
        max(forward_error.mean(), back_error.mean()) < 0.75 * affine_error
    )  # with voxels of 5 mm and the fast settings
    assert np.linalg.norm(chain_points(back, chain_points(forward, inside)) - inside, axis=1).mean() < 0.1
    assert (forward.source, back.source) == ("ACPC", template.name)
    assert [path.name for path in tmp_path.iterdir()] == ["antsRegistration.log"]


PRECISE = (
    "antsRegistration --dimensionality 3 --float 1 --collapse-output-transforms 1 --write-composite-transform 1 "
    "--output to --interpolation LanczosWindowedSinc --initial-moving-transform [initial.mat,0] "
    "--winsorize-image-intensities [0.005,0.995] "
    "--transform Rigid[0.05] --metric Mattes[fixed.nii.gz,moving.nii.gz,1,56,Regular,0.25] "
    "--convergence [100x100,1e-6,20] --shrink-factors 2x1 --smoothing-sigmas 2x1vox --use-histogram-matching 1 "
    "--transform Affine[0.08] --metric Mattes[fixed.nii.gz,moving.nii.gz,1,56,Regular,0.25] "
    "--convergence [100x100,1e-6,20] --shrink-factors 2x1 --smoothing-sigmas 1x0vox --use-histogram-matching 1 "
    "--transform SyN[0.1,3,0] --metric CC[fixed.nii.gz,moving.nii.gz,1,4,None,1] "
    "--convergence [100x70x50x20,1e-6,10] --shrink-factors 8x4x2x1 --smoothing-sigmas 3x2x1x0vox "
    "--use-histogram-matching 1"
)


def test_precise_settings_match_fmriprep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed antsRegistration takes precedence over antspyx, and missing output is an error."""
    template, recorder = make_template(), Recorder(tmp_path / "ants")
    monkeypatch.setenv("ANTSPATH", str(tmp_path / "ants" / "bin"))
    recorder.program("antsRegistration", output="ANTs Version: v2.5.4-g1234\nCompiled: today")
    assert ants.version() == "ANTs v2.5.4-g1234"
    with pytest.raises(EngineError, match="antsRegistration finished, but its transforms cannot be read"):
        ants.normalise(template.brain, template, template.mask, np.eye(4), AnatomySettings())
    call = recorder.calls()[1]
    command_line = " ".join([str(call["name"]), *call["arguments"]])  # type: ignore[misc]
    assert command_line.replace(f"{call['cwd']}/", "") == PRECISE


def test_missing_program_and_memory_are_reported_in_advance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(anatomy=FAST)
    monkeypatch.setattr(programs, "free_bytes", lambda device: 8e9)
    ants.check(None, settings, CPU)
    monkeypatch.setattr(programs, "free_bytes", lambda device: 1e8)
    with pytest.raises(EngineError, match="antsRegistration at 2 mm needs about"):
        ants.check(None, settings, CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ants", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="antspyx is not installed; run `pip install antspyx`"):
        ants.check(None, settings, CPU)
