"""Correction with a gradient-echo fieldmap, on the independent EPI simulation of `helpers.epi_pair`."""

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
from dsiprep.data.results import Blip, Distortion
from dsiprep.errors import InputError
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.pepolar.gre_fieldmap import unwrapped_hz, without_folds
from dsiprep.stages.fieldmap import correct_with_fieldmap
from helpers.epi_pair import CENTRE, READOUT, SIZE, Case, correlation, field_mm, head, make_grid, rigid
from helpers.shared_data import SHARED

REAL = SHARED / "bids" / "sub-xa30"
ECHO_DIFFERENCE = 0.0025  # s


def gre_scan(grid: Grid, case: Case, pose: np.ndarray, amplitude: float = 6.0) -> RawFieldmap:
    """Magnitude and noisy, wrapped phase of the head at `pose`."""
    world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    inverse = np.linalg.inv(pose)
    points = world @ inverse[:3, :3].T + inverse[:3, 3]
    axis = case.grid.directions[:, case.axis]
    hertz = field_mm(points, axis * np.sign(axis.sum()), amplitude) / (SIZE * READOUT) * np.sign(case.scales[0])
    rng = np.random.default_rng(5)
    signal = head(points) * np.exp(2j * np.pi * ECHO_DIFFERENCE * hertz) + rng.normal(size=(*grid.shape, 2)) @ [1, 1j]
    magnitude = Volume(torch.from_numpy(np.abs(signal).astype(np.float32)), grid)
    return RawFieldmap(
        "phasediff", Volume(torch.from_numpy(np.angle(signal).astype(np.float32)), grid), magnitude, ECHO_DIFFERENCE
    )


def correct(case: Case, raw: RawFieldmap) -> Distortion:
    return correct_with_fieldmap(case.blips[0], case.images[0], case.grid, case.mask, raw)


@pytest.mark.parametrize(("codes", "axis", "tilt"), [("LAS", 1, 0), ("PSR", 0, 0), ("RAS", 1, 12)])
def test_known_field_is_recovered_with_its_sign(codes: str, axis: int, tilt: float) -> None:
    case = Case(make_grid(codes, tilt), axis, noise=1.0)
    raw = gre_scan(make_grid("RAS", sizes=(3.6, 3.6, 4.4)), case, np.eye(4))
    assert np.abs(case.field[case.brain]).max() / (SIZE * READOUT) * ECHO_DIFFERENCE > 0.05
    result = correct(case, raw)
    unit = case.grid.directions[:, axis]
    found = np.einsum("c,cijk->ijk", unit, result.fields[0].data.numpy()) / case.scales[0]
    error = np.abs(found - case.field)[ndimage.binary_erosion(case.brain)]
    assert error.mean() < 0.25
    assert np.percentile(error, 95) < 0.8
    assert result.method == "gre"
    assert result.fieldmap_hz is not None
    expected = found / (SIZE * READOUT) * case.scales[0] / case.blips[0].pe.polarity
    np.testing.assert_allclose(result.fieldmap_hz.numpy(), expected, atol=0.05)
    before = correlation(case.images[0][0].numpy(), case.truth, case.brain)
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > max(0.975, before + 0.015)


def test_field_is_aligned_with_a_head_that_moved() -> None:
    case = Case(make_grid("LAS"), 1, noise=1.0)
    pose = rigid((4.0, -3.0, 3.0), np.array([4.0, -3.0, 5.0]))
    result = correct(case, gre_scan(make_grid("RAS", sizes=(3.6, 3.6, 4.4)), case, pose))
    found = result.fields[0].data.numpy()[1] / case.scales[0]
    error = np.abs(found - case.field)[ndimage.binary_erosion(case.brain)]
    assert error.mean() < 0.45
    assert result.trace[0]["step"] == 1.0


@pytest.mark.parametrize(("pe", "words"), [(PhaseEncoding(1, -1, READOUT), "the opposite sign makes it agree better"),
                                          (PhaseEncoding(0, 1, READOUT), "another axis may be right")])  # fmt: skip
def test_wrong_phase_encoding_is_doubted(pe: PhaseEncoding, words: str) -> None:
    case = Case(make_grid("LAS"), 1, noise=1.0)
    raw = gre_scan(make_grid("RAS", sizes=(3.6, 3.6, 4.4)), case, np.eye(4))
    assert correct(case, raw).doubt == ""
    blip = Blip("only", pe, case.blips[0].epis)
    doubt = correct_with_fieldmap(blip, case.images[0], case.grid, case.mask, raw).doubt
    assert f"along {pe.direction} make the b=0 image agree less with the magnitude image" in doubt
    assert words in doubt


def test_wrapped_phase_is_unwrapped() -> None:
    grid = make_grid("RAS")
    i, j, _ = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    hertz = 5.0 * i + 3.0 * j - 150
    phase = np.angle(np.exp(2j * np.pi * ECHO_DIFFERENCE * hertz)).astype(np.float32)
    mask = Volume(torch.from_numpy((i > 2).astype(np.float32)), grid)
    found = unwrapped_hz(Volume(torch.from_numpy(phase), grid), mask, ECHO_DIFFERENCE).numpy()
    error = (found - hertz)[i > 2]
    assert np.ptp(error) < 0.01
    assert abs(np.median(found[i > 2])) <= 0.5 / ECHO_DIFFERENCE
    assert (found[i <= 2] == 0).all()


def test_steep_shifts_are_smoothed_until_nothing_folds() -> None:
    shift = np.zeros((12, 30, 12))
    shift[4:8, 10:14, 4:8] = 6.0
    out = without_folds(shift, 1)
    assert (1 + np.diff(out, axis=1)).min() > 0.1
    assert np.allclose(out[:, 25:], 0, atol=0.05)
    gentle = 0.3 * np.arange(30.0)[None, :, None] * np.ones((4, 1, 4))
    assert np.array_equal(without_folds(gentle, 1), gentle)


def test_steep_stretch_is_not_smoothed() -> None:
    """A shift that rises by 1.5 voxels per voxel stretches the image; falling as steeply it folds it."""
    rising = np.clip(1.5 * (np.arange(30.0) - 12), 0, 6)[None, :, None] * np.ones((6, 1, 6))
    assert np.array_equal(without_folds(rising, 1), rising)
    falling = without_folds(-rising, 1)
    assert (1 + np.diff(falling, axis=1)).min() > 0.1


def test_unusable_fieldmaps_are_rejected() -> None:
    case = Case(make_grid("RAS"), 1)
    raw = gre_scan(make_grid("RAS", sizes=(5.0, 5.0, 5.0)), case, np.eye(4))
    blip = Blip("only", PhaseEncoding(1, 1), case.blips[0].epis)
    with pytest.raises(InputError, match="TotalReadoutTime"):
        correct_with_fieldmap(blip, case.images[0], case.grid, case.mask, raw)
    affine = raw.field.grid.affine.copy()
    affine[:3, 3] = CENTRE + 90
    far = Grid(raw.field.grid.shape, affine)
    distant = RawFieldmap("far", Volume(raw.field.data, far), Volume(raw.magnitude.data, far), ECHO_DIFFERENCE)
    with pytest.raises(InputError, match="covers less than half"):
        correct(case, distant)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/bids/sub-xa30: a real fieldmap and a blip pair")
def test_real_fieldmap_agrees_with_real_pair() -> None:
    from dsiprep.api.blip_pair import correct_pair
    from dsiprep.data.acquisition import GreFieldmap

    pair = correct_pair(REAL / "dwi" / "sub-xa30_dir-PA_dwi.nii.gz", REAL / "dwi" / "sub-xa30_dir-AP_dwi.nii.gz")
    files = [REAL / "fmap" / f"sub-xa30_{name}.nii.gz" for name in ("phasediff", "magnitude1")]
    sidecar = json.loads((REAL / "fmap" / "sub-xa30_phasediff.json").read_text())
    seconds = sidecar["EchoTime2"] - sidecar["EchoTime1"]
    raw = read_fieldmap(GreFieldmap("phasediff", (files[0],), files[1], seconds))
    pe = PhaseEncoding(1, 1, 0.0475693)
    blip, grid, brain = Blip("only", pe, torch.zeros(0)), pair.dwiref.grid, brain_mask_b0(pair.before[0])
    gre = correct_with_fieldmap(blip, pair.before[0].data[None], grid, brain, raw)
    inside = brain_mask_b0(pair.dwiref).numpy() > 0
    assert gre.fieldmap_hz is not None
    assert pair.fieldmap_hz is not None
    assert correlation(gre.fieldmap_hz.numpy(), pair.fieldmap_hz.numpy(), inside) > 0.9
    difference_mm = np.abs(gre.fieldmap_hz.numpy() - pair.fieldmap_hz.numpy())[inside] * 3 * 0.0475693
    assert difference_mm.mean() < 0.8
    assert correlation(pair.after[0].numpy(), pair.after[1].numpy(), inside) > 0.97


def test_method_is_chosen_by_available_data(tmp_path: Path) -> None:
    """A pair if there is one, then a fieldmap if the readout time is known, else none; each with its reason."""
    from types import SimpleNamespace
    from typing import Any, cast

    from dsiprep.data.acquisition import GreFieldmap, Unit
    from dsiprep.plan import choose_distortion
    from dsiprep.settings import Settings

    gre = GreFieldmap("phasediff", (tmp_path / "p",), tmp_path / "m", ECHO_DIFFERENCE)
    with_gre, without_gre = Unit("01", None, "sub-01", (), gre=gre), Unit("01", None, "sub-01", ())

    def choose(unit: Unit, *encodings: PhaseEncoding | None) -> tuple[str, str]:
        blips = [SimpleNamespace(pe=pe) for pe in encodings]
        return choose_distortion(unit, cast(Any, SimpleNamespace(blips=blips)), Settings())

    with_readout, no_readout = PhaseEncoding(1, -1, 0.05), PhaseEncoding(1, -1)
    assert choose(with_gre, PhaseEncoding(1, 1, 0.05), with_readout)[0] == "drbuddi"
    method, reason = choose(with_gre, with_readout)
    assert method == "gre"
    assert "phasediff" in reason
    method, reason = choose(with_gre, no_readout)
    assert method == "none"
    assert "TotalReadoutTime" in reason
    assert choose(without_gre, with_readout)[0] == "none"
    assert choose(with_gre, None)[0] == "none"
