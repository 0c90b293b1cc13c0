"""Distortion from a gradient-echo fieldmap, on the independent simulation of the blip tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import Blip
from dsiprep.errors import InputError
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.pepolar.gre_fieldmap import unwrapped_hz, without_folds
from dsiprep.stages.fieldmap import correct_with_fieldmap
from helpers.epi_pair import CENTRE, READOUT, SIZE, Case, correlation, field_mm, head, make_grid, rigid
from helpers.shared_data import SHARED

REAL = SHARED / "bids" / "sub-xa30"
ECHOES = 0.0025  # s apart


def gre_scan(grid: Grid, case: Case, pose: np.ndarray, amplitude: float = 6.0) -> RawFieldmap:
    """Magnitude and wrapped, noisy phase of the head at `pose`, on a grid of its own."""
    world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    inverse = np.linalg.inv(pose)
    points = world @ inverse[:3, :3].T + inverse[:3, 3]
    axis = case.grid.directions[:, case.axis]
    hertz = field_mm(points, axis * np.sign(axis.sum()), amplitude) / (SIZE * READOUT) * np.sign(case.scales[0])
    rng = np.random.default_rng(5)
    signal = head(points) * np.exp(2j * np.pi * ECHOES * hertz) + rng.normal(size=(*grid.shape, 2)) @ [1, 1j]
    magnitude = Volume(torch.from_numpy(np.abs(signal).astype(np.float32)), grid)
    return RawFieldmap(
        "phasediff", Volume(torch.from_numpy(np.angle(signal).astype(np.float32)), grid), magnitude, ECHOES
    )


def correct(case: Case, raw: RawFieldmap):
    return correct_with_fieldmap(case.blips[0], case.images[0], case.grid, case.mask, raw)


@pytest.mark.parametrize(("codes", "axis", "tilt"), [("LAS", 1, 0), ("PSR", 0, 0), ("RAS", 1, 12)])
def test_known_field_is_found_with_its_sign(codes: str, axis: int, tilt: float) -> None:
    case = Case(make_grid(codes, tilt), axis, noise=1.0)
    raw = gre_scan(make_grid("RAS", sizes=(3.6, 3.6, 4.4)), case, np.eye(4))
    assert np.abs(case.field[case.brain]).max() / (SIZE * READOUT) * ECHOES > 0.05
    result = correct(case, raw)
    unit = case.grid.directions[:, axis]
    found = np.einsum("c,cijk->ijk", unit, result.fields[0].data.numpy()) / case.scales[0]
    error = np.abs(found - case.field)[ndimage.binary_erosion(case.brain)]
    assert error.mean() < 0.25 and np.percentile(error, 95) < 0.8
    assert result.method == "gre" and result.fieldmap_hz is not None
    wanted = found / (SIZE * READOUT) * case.scales[0] / case.blips[0].pe.polarity
    np.testing.assert_allclose(result.fieldmap_hz.numpy(), wanted, atol=0.05)
    before = correlation(case.images[0][0].numpy(), case.truth, case.brain)
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > max(0.975, before + 0.015)


def test_field_follows_a_head_that_moved() -> None:
    case = Case(make_grid("LAS"), 1, noise=1.0)
    pose = rigid((4.0, -3.0, 3.0), np.array([4.0, -3.0, 5.0]))
    result = correct(case, gre_scan(make_grid("RAS", sizes=(3.6, 3.6, 4.4)), case, pose))
    found = result.fields[0].data.numpy()[1] / case.scales[0]
    error = np.abs(found - case.field)[ndimage.binary_erosion(case.brain)]
    assert error.mean() < 0.45 and result.trace[0]["step"] == 1.0


def test_phase_beyond_a_turn_is_unwrapped() -> None:
    grid = make_grid("RAS")
    i, j, _ = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    hertz = 5.0 * i + 3.0 * j - 150
    phase = np.angle(np.exp(2j * np.pi * ECHOES * hertz)).astype(np.float32)
    mask = Volume(torch.from_numpy((i > 2).astype(np.float32)), grid)
    found = unwrapped_hz(Volume(torch.from_numpy(phase), grid), mask, ECHOES).numpy()
    apart = (found - hertz)[i > 2]
    assert np.ptp(apart) < 0.01 and abs(np.median(found[i > 2])) <= 0.5 / ECHOES
    assert (found[i <= 2] == 0).all()


def test_steep_fields_are_smoothed_until_nothing_folds() -> None:
    shift = np.zeros((12, 30, 12))
    shift[4:8, 10:14, 4:8] = 6.0
    out = without_folds(shift, 1)
    assert np.abs(np.diff(out, axis=1)).max() < 1
    assert np.allclose(out[:, 25:], 0, atol=0.05)
    gentle = 0.3 * np.arange(30.0)[None, :, None] * np.ones((4, 1, 4))
    assert np.array_equal(without_folds(gentle, 1), gentle)


def test_what_cannot_be_used_is_refused() -> None:
    case = Case(make_grid("RAS"), 1)
    raw = gre_scan(make_grid("RAS", sizes=(5.0, 5.0, 5.0)), case, np.eye(4))
    with pytest.raises(InputError, match="TotalReadoutTime"):
        blip = Blip("only", PhaseEncoding(1, 1), case.blips[0].epis)
        correct_with_fieldmap(blip, case.images[0], case.grid, case.mask, raw)
    away = raw.field.grid.affine.copy()
    away[:3, 3] = CENTRE + 90
    far = Grid(raw.field.grid.shape, away)
    moved = RawFieldmap("far", Volume(raw.field.data, far), Volume(raw.magnitude.data, far), ECHOES)
    with pytest.raises(InputError, match="covers less than half"):
        correct(case, moved)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/bids/sub-xa30: a real fieldmap and a blip pair")
def test_real_fieldmap_agrees_with_the_real_pair() -> None:
    from dsiprep.data.acquisition import GreFieldmap
    from dsiprep.standalone.blip_pair import correct_pair

    pair = correct_pair(REAL / "dwi" / "sub-xa30_dir-PA_dwi.nii.gz", REAL / "dwi" / "sub-xa30_dir-AP_dwi.nii.gz")
    files = [REAL / "fmap" / f"sub-xa30_{name}.nii.gz" for name in ("phasediff", "magnitude1")]
    sidecar = json.loads((REAL / "fmap" / "sub-xa30_phasediff.json").read_text())
    seconds = sidecar["EchoTime2"] - sidecar["EchoTime1"]
    raw = read_fieldmap(GreFieldmap("phasediff", (files[0],), files[1], seconds))
    pe = PhaseEncoding(1, 1, 0.0475693)
    blip, grid, brain = Blip("only", pe, torch.zeros(0)), pair.dwiref.grid, brain_mask_b0(pair.before[0])
    gre = correct_with_fieldmap(blip, pair.before[0].data[None], grid, brain, raw)
    inside = brain_mask_b0(pair.dwiref).numpy() > 0
    assert gre.fieldmap_hz is not None and pair.fieldmap_hz is not None
    assert correlation(gre.fieldmap_hz.numpy(), pair.fieldmap_hz.numpy(), inside) > 0.9
    apart = np.abs(gre.fieldmap_hz.numpy() - pair.fieldmap_hz.numpy())[inside] * 3 * 0.0475693
    assert apart.mean() < 0.8
    assert correlation(pair.after[0].numpy(), pair.after[1].numpy(), inside) > 0.97


def test_choice_of_method_is_told(tmp_path: Path) -> None:
    """A pair first, then a fieldmap with a known readout time, else nothing; each with its reason."""
    from types import SimpleNamespace
    from typing import Any, cast

    from dsiprep.data.acquisition import GreFieldmap, Unit
    from dsiprep.plan import choose_distortion
    from dsiprep.settings import Settings

    gre = GreFieldmap("phasediff", (tmp_path / "p",), tmp_path / "m", ECHOES)
    unit, bare = Unit("01", None, "sub-01", (), gre=gre), Unit("01", None, "sub-01", ())

    def choose(unit: Unit, *encodings: PhaseEncoding | None) -> tuple[str, str]:
        blips = [SimpleNamespace(pe=pe) for pe in encodings]
        return choose_distortion(unit, cast(Any, SimpleNamespace(blips=blips)), Settings())

    timed = PhaseEncoding(1, -1, 0.05)
    assert choose(unit, PhaseEncoding(1, 1, 0.05), timed)[0] == "drbuddi"
    assert choose(unit, timed)[0] == "gre" and "phasediff" in choose(unit, timed)[1]
    assert choose(unit, PhaseEncoding(1, -1)) == ("none", choose(unit, PhaseEncoding(1, -1))[1])
    assert "TotalReadoutTime" in choose(unit, PhaseEncoding(1, -1))[1]
    assert choose(bare, timed)[0] == "none" and choose(unit, None)[0] == "none"
