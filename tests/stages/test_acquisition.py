"""Conforming runs to one grid and intensity scale, and assigning them to blips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.settings import AcquisitionSettings
from dsiprep.stages.acquisition import conform, multiband_groups
from dsiprep.stages.pair_geometry import pair_geometry
from helpers.shared_data import SHARED

REAL = SHARED / "bids"
SHAPE = (30, 34, 26)
UP, DOWN = PhaseEncoding(1, 1, 0.05), PhaseEncoding(1, -1, 0.05)
SETTINGS = AcquisitionSettings()


def las(shape: tuple[int, int, int] = SHAPE, size: float = 6.0, shift: float = 0.0) -> Grid:
    affine = np.diag([-size, size, size, 1])
    affine[:3, 3] = affine[:3, :3] @ (-(np.array(shape) - 1) / 2)
    affine[2, 3] += shift
    return Grid(shape, affine)


def head(grid: Grid, brightness: float = 1000.0) -> torch.Tensor:
    """A smooth ball of 75 mm radius with an intensity gradient, so that any rotation is detectable."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(grid.to_world(voxels), -1, 0)
    inside = 1 / (1 + np.exp((np.sqrt(x**2 + y**2 + z**2) - 75) / 4))
    return torch.as_tensor(brightness * inside * (1 + x / 400 + y / 300 + z / 200), dtype=torch.float32)


def run(pe: PhaseEncoding | None, grid: Grid, brightness: float = 1000.0, volumes: int = 8) -> RawRun:
    bvals = np.r_[0, np.full(volumes - 1, 1000.0)]
    bvecs = np.random.default_rng(volumes).normal(size=(volumes, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvecs[0] = 0
    weights = torch.as_tensor(np.where(bvals > 0, 0.4, 1.0), dtype=torch.float32)
    data = head(grid, brightness)[None] * weights[:, None, None, None]
    return RawRun("run", data, grid, bvals, bvecs, pe)


def mean_in(data: torch.Tensor, mask: torch.Tensor) -> float:
    return float(data[mask > 0].mean())


def test_single_run_is_unchanged() -> None:
    single = run(UP, las())
    acquired = conform(RawUnit("u", (single,)), SETTINGS)
    assert acquired.dwi.data is single.data
    assert [(blip.name, blip.pe, len(blip.epis)) for blip in acquired.blips] == [("only", UP, 0)]
    assert acquired.scales.tolist() == [1]
    assert acquired.scheme.kind == "single-shell"
    volume = float(acquired.mask.data.sum()) * 216
    assert 0.8 < volume / (4 / 3 * np.pi * 75**3) < 1.5


def test_runs_are_assigned_to_blips_up_first() -> None:
    raw = RawUnit("u", (run(DOWN, las(), volumes=5), run(UP, las(), volumes=7)))
    acquired = conform(raw, SETTINGS)
    assert [(blip.name, blip.pe) for blip in acquired.blips] == [("up", UP), ("down", DOWN)]
    assert acquired.dwi.blip.tolist() == [1] * 5 + [0] * 7
    assert acquired.dwi.run.tolist() == [0] * 5 + [1] * 7
    np.testing.assert_array_equal(acquired.dwi.bvecs, np.concatenate([r.bvecs for r in raw.runs]))


def test_unknown_phase_encoding_gives_one_blip() -> None:
    acquired = conform(RawUnit("u", (run(None, las()), run(None, las()))), SETTINGS)
    assert [(blip.name, blip.pe) for blip in acquired.blips] == [("only", None)]


def test_b0_intensities_are_harmonised() -> None:
    raw = RawUnit("u", (run(UP, las(), 500), run(DOWN, las(), 2000)))
    before = [r.data.clone() for r in raw.runs]
    acquired = conform(raw, SETTINGS)
    b0s = [mean_in(acquired.dwi.data[v], acquired.mask.data) for v in (0, 8)]
    assert b0s[0] == pytest.approx(b0s[1], rel=1e-5)
    np.testing.assert_allclose(acquired.scales, [2.5, 0.625], rtol=1e-4)
    assert all(torch.equal(r.data, b) for r, b in zip(raw.runs, before, strict=True))  # inputs are not modified
    unscaled = conform(raw, AcquisitionSettings(harmonize_b0=False))
    assert unscaled.scales.tolist() == [1, 1]
    assert torch.equal(unscaled.dwi.data[8], before[1][0])


def test_shifted_run_is_resampled_onto_the_first_grid() -> None:
    first, second = las(), las(shift=2.5)
    acquired = conform(RawUnit("u", (run(UP, first), run(UP, second))), SETTINGS)
    inner = (slice(3, -3),) * 3
    difference = (acquired.dwi.data[8] - acquired.dwi.data[0])[inner].abs()
    assert float(difference.max()) < 12  # of 1000, at the edge of the ball
    assert float((run(UP, second).data[0] - acquired.dwi.data[0])[inner].abs().max()) > 60


def test_epi_stays_on_its_grid() -> None:
    """An EPI stored with flipped i and j axes and smaller voxels: its grid and encoding are kept."""
    series = run(UP, las())
    affine = np.diag([-4.0, -4.0, 4.0, 1])
    shape = (45, 51, 39)
    affine[:3, 3] = affine[:3, :3] @ (-(np.array(shape) - 1) / 2)
    stored = Grid(shape, affine)
    epi = RawEpi("epi", head(stored, 300)[None], stored, PhaseEncoding(1, 1, 0.06))
    acquired = conform(RawUnit("u", (series,), (epi,)), SETTINGS)
    up, down = acquired.blips
    assert (up.name, up.pe, len(up.epis), up.grid) == ("up", UP, 0, None)
    assert (down.name, down.pe, down.grid, tuple(down.epis.shape)) == ("down", epi.pe, stored, (1, *shape))
    assert torch.allclose(down.epis[0], epi.data[0] * (1000 / 300), rtol=0.02)
    geometry = pair_geometry(acquired.blips, acquired.dwi.grid)
    # f Hz displace by f x 0.05 x 6 mm and f x 0.06 x 4 mm
    assert geometry.scales[0] / geometry.scales[1] == pytest.approx(-0.3 / 0.24)
    assert geometry.mm_per_hz == pytest.approx(0.27)
    np.testing.assert_allclose(geometry.direction(0), geometry.direction(1), atol=1e-12)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.grid(1).shape), indexing="ij"), -1)
    expected = head(geometry.grid(1))
    assert voxels.shape[:3] == tuple(geometry.ordered(down.epis[0], 1).shape)
    assert torch.allclose(geometry.ordered(down.epis[0], 1) / expected.mean(), expected / expected.mean(), atol=0.05)


def test_series_comes_first_and_the_reference_second() -> None:
    """The undistorted image lies in the pose of the first blip, so this is the series, whatever its polarity."""
    epi = RawEpi("epi", head(las())[None], las(), UP)
    acquired = conform(RawUnit("u", (run(DOWN, las()),), (epi,)), SETTINGS)
    assert [(blip.name, blip.pe, len(blip.epis)) for blip in acquired.blips] == [("down", DOWN, 0), ("up", UP, 1)]
    assert set(acquired.dwi.blip) == {0}


@pytest.mark.parametrize(("pe", "names"), [(PhaseEncoding(0, 1, 0.05), ["up", "down"]), (UP, ["only"])])
def test_epi_along_another_axis_is_used_and_one_of_the_same_encoding_is_not(
    pe: PhaseEncoding, names: list[str]
) -> None:
    acquired = conform(RawUnit("u", (run(UP, las()),), (RawEpi("epi", head(las())[None], las(), pe),)), SETTINGS)
    assert [blip.name for blip in acquired.blips] == names


def test_resampling_matches_scipy() -> None:
    grid, other = las(), las(shift=2.0)
    data = head(other)[None]
    result = resample_onto(data, other, grid, cubic=True)[0].numpy()
    expected = ndimage.shift(data[0].numpy(), (0, 0, 2 / 6), order=3, mode="mirror")
    np.testing.assert_allclose(result[..., 1:], expected[..., 1:], atol=0.1)


def test_multiband_groups() -> None:
    times = (0.0, 1.0, 0.5, 0.0, 1.0, 0.5)
    assert multiband_groups([times]) == ((0, 3), (2, 5), (1, 4))
    jitter = (0.0, 1.0025, 0.5, 0.0, 1.0, 0.5)
    assert multiband_groups([times, jitter]) == ((0, 3), (2, 5), (1, 4))
    assert multiband_groups([(0.2, 0.1, 0.0)]) == ((2,), (1,), (0,))
    assert multiband_groups([times, ()]) == ()
    assert multiband_groups([times, (0.5, 1.0, 0.0, 0.5, 1.0, 2.0)]) == ()
    assert multiband_groups([(0.0, 0.0, 1.0)]) == ()


@pytest.mark.skipif(not REAL.is_dir(), reason="the public datasets are not available")
def test_real_blip_pair() -> None:
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.settings import Settings

    (unit,) = find_units(REAL, Settings(), participants=["xa30"])
    acquired = conform(read_unit(unit, Settings()), SETTINGS)
    assert [blip.name for blip in acquired.blips] == ["up", "down"]
    assert acquired.dwi.blip.tolist() == [1] * 21 + [0] * 21
    assert len(acquired.multiband) == 13
    assert {len(group) for group in acquired.multiband} == {3}
    np.testing.assert_allclose(acquired.scales, 1, atol=0.01)
    assert 1.0e6 < float(acquired.mask.data.sum()) * 27 < 1.8e6  # mm³
