"""Fieldmap-less correction: what is handed to `unpile`, what is made of its field, and what is said where it fails."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding, Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip
from dsiprep.engines import unpile
from dsiprep.engines.unpile import choose_structural
from dsiprep.errors import InputError, SettingsError
from dsiprep.plan import choose_distortion
from dsiprep.settings import DistortionSettings

GRID = Grid((20, 24, 16), np.array([[-4.0, 0, 0, 38], [0, 4, 0, -46], [0, 0, 4, -30], [0, 0, 0, 1]]))
# A program that checks what it is given and answers with 20 Hz where the reference is bright.
PROGRAM = """#!{python}
import sys, nibabel as nib, numpy as np
from pathlib import Path
words = sys.argv[1:]
told = dict(zip(words, words[1:]))
assert told["--pe-dir"] == "j-" and told["--total-readout-time"] == "0.05" and told["--metric"] == "lncc", words
epi, reference, mask = (nib.load(told[name]) for name in ("--epi", "--reference", "--mask"))
assert np.allclose(epi.affine, reference.affine) and epi.shape == reference.shape == mask.shape
field = np.where(np.asarray(mask.dataobj) > 0, 20.0, 0.0).astype(np.float32)
out = Path(told["--out"])
out.mkdir()
nib.save(nib.Nifti1Image(field, epi.affine), out / "field_hz.nii.gz")
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "unpile"
    program.write_text(text.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def head(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    radius = np.linalg.norm(points / [28.0, 34, 24], axis=-1)
    return radius, np.where(radius < 1, 100 + 20 * np.sin(points[..., 0] / 6) * np.sin(points[..., 1] / 8), 0)


def case() -> tuple[Blip, torch.Tensor, Volume, Volume]:
    radius, image = head(GRID)
    blip = Blip("only", PhaseEncoding(1, -1, 0.05), torch.zeros(0, *GRID.shape))
    mask = Volume(torch.from_numpy((radius < 1).astype(np.float32)), GRID)
    t1w = Volume(torch.from_numpy(np.where(radius < 1, 220 - image, 0).astype(np.float32)), GRID)
    return blip, torch.from_numpy(image.astype(np.float32))[None], mask, t1w


@pytest.fixture
def plain_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpile, "brain_mask_t1w", lambda v: Volume((v.data > 50).float(), v.grid))
    monkeypatch.setattr(unpile, "n4_bias", lambda v, mask, shrink: Volume(torch.ones_like(v.data), v.grid))


@pytest.mark.usefixtures("plain_mask")
def test_field_becomes_a_displacement_with_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 Hz in j- at 0.05 s and 4 mm voxels are 4 mm towards lower j, which is backwards in this grid."""
    install(tmp_path, monkeypatch, PROGRAM)
    blip, b0, mask, t1w = case()
    result = unpile.correct_without_fieldmap(blip, b0, GRID, mask, t1w, True)
    assert result.method == "unpile" and result.fieldmap_hz is not None
    middle = (10, 12, 8)
    assert float(result.fieldmap_hz.data[middle]) == pytest.approx(20, abs=0.5)
    np.testing.assert_allclose(result.fields[0].data[(slice(None), *middle)], [0, -4, 0], atol=0.1)


@pytest.mark.usefixtures("plain_mask")
def test_reference_is_bright_where_a_t1w_is_dark() -> None:
    _, b0, mask, t1w = case()
    found = unpile.structural_reference(Volume(b0[0], GRID), mask, t1w, True)
    inside = mask.numpy() > 0.5
    assert np.corrcoef(found.numpy()[inside], b0[0].numpy()[inside])[0, 1] > 0.8
    assert float(found.data[0, 0, 0]) == 0


@pytest.mark.usefixtures("plain_mask")
def test_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blip, b0, mask, t1w = case()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="pip install unpile"):
        unpile.check()
    monkeypatch.undo()
    monkeypatch.setattr(unpile, "brain_mask_t1w", lambda v: Volume((v.data > 50).float(), v.grid))
    monkeypatch.setattr(unpile, "n4_bias", lambda v, mask, shrink: Volume(torch.ones_like(v.data), v.grid))
    install(tmp_path, monkeypatch, "#!{python}\nimport sys\nsys.exit('the mask is empty')\n")
    with pytest.raises(InputError, match="code 1: the mask is empty"):
        unpile.correct_without_fieldmap(blip, b0, GRID, mask, t1w, False)
    with pytest.raises(InputError, match="TotalReadoutTime"):
        unpile.correct_without_fieldmap(replace(blip, pe=PhaseEncoding(1, 1)), b0, GRID, mask, t1w, False)


def test_it_is_the_last_resort(tmp_path: Path) -> None:
    """Only where it was asked for, there is an image of the kind, and no pair."""
    unit = Unit("01", None, "sub-01", (), t1w=(tmp_path / "T1w.nii",), t2w=(tmp_path / "T2w.nii",))

    def choose(wanted: str, *encodings: PhaseEncoding) -> str:
        blips = [SimpleNamespace(pe=pe) for pe in encodings]
        acquired = cast(Any, SimpleNamespace(blips=blips))
        return choose_distortion(unit, acquired, DistortionSettings(anat_reference=wanted))[0]

    down = PhaseEncoding(1, -1, 0.05)
    assert choose("none", down) == "none"
    assert choose("auto", down) == choose("invt1w", down) == choose("t2w", down) == "unpile"
    assert choose("auto", PhaseEncoding(1, -1)) == "none"
    assert choose("auto", PhaseEncoding(1, 1, 0.05), down) == "drbuddi"
    assert choose_structural(unit, DistortionSettings(anat_reference="auto")) == (tmp_path / "T2w.nii", False)
    assert choose_structural(unit, DistortionSettings(anat_reference="invt1w")) == (tmp_path / "T1w.nii", True)
    assert choose_structural(replace(unit, t2w=()), DistortionSettings(anat_reference="t2w")) is None
