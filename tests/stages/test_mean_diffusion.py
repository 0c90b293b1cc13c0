"""Mean diffusion-weighted images of both blips beside those of b=0: which volumes, where they lie, what they tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep import pipeline
from dsiprep.cli.tools import main
from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Acquired, Blip, Distortion, Motion
from dsiprep.data.transform import EddyCurrents
from dsiprep.errors import InputError
from dsiprep.io.gradients import write_bvals, write_fsl_bvecs
from dsiprep.ops.pepolar import normal_equations, pair_model
from dsiprep.ops.qspace.matching_gradients import AT_MOST, low_b_pairs
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion, mean_diffusion
from helpers import epi_pair as simulation
from helpers.epi_pair import CENTRE, READOUT, Case, make_grid, rigid


def directions(count: int) -> np.ndarray:
    """Unit vectors all over a half sphere, (count, 3)."""
    z = (np.arange(count) + 0.5) / count
    turn = np.pi * (1 + 5**0.5) * np.arange(count)
    across = np.sqrt(1 - z * z)
    return np.stack([across * np.cos(turn), across * np.sin(turn), z], -1)


# ---- which volumes


def table(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Group 1 first, then group 0 in reverse order with antipodes: b rises to 3000, one b=0 each."""
    bvals = np.concatenate([[0], np.linspace(500, 2500, count)])
    bvecs = np.concatenate([np.zeros((1, 3)), directions(count)])
    both = np.concatenate([bvals, bvals[::-1]])
    return both, np.concatenate([bvecs, -bvecs[::-1]]), np.repeat([1, 0], count + 1), both < 100


def test_pairs_are_those_of_low_b_with_group_0_first() -> None:
    bvals, bvecs, group, is_b0 = table(40)
    pairs = np.array(low_b_pairs(bvals, bvecs, group, is_b0))
    assert (group[pairs] == [0, 1]).all()
    assert np.array_equal(bvals[pairs[:, 0]], bvals[pairs[:, 1]])
    assert np.allclose(bvecs[pairs[:, 0]], -bvecs[pairs[:, 1]])
    assert np.array_equal(bvals[pairs[:, 1]], bvals[(bvals > 100) & (bvals <= 1300) & (group == 1)])
    assert len(low_b_pairs(*table(100))) == AT_MOST


def test_too_few_pairs_are_none() -> None:
    assert low_b_pairs(*table(25)) == []  # 10 of them low
    bvals, bvecs, group, is_b0 = table(40)
    bvecs[group == 0] = np.roll(bvecs[group == 0], 1, axis=1)  # other gradients
    assert low_b_pairs(bvals, bvecs, group, is_b0) == []


# ---- where they lie


def blob(points: np.ndarray) -> np.ndarray:
    """A head that is no two ways alike, at world points."""
    p = (points - [3.0, -2.0, 1.0]) / [22.0, 27.0, 18.0]
    return 100 * np.exp(-2 * (p**2).sum(-1) ** 2) * (1 + 0.3 * np.sin(points @ [0.12, 0.05, 0.09]))


def series(eddy: bool) -> tuple[DWI, tuple[Motion, ...], np.ndarray]:
    """Twelve pairs of volumes that moved; those of blip 1 come first and are half as bright. And the head at rest."""
    grid = Grid((32, 36, 28), np.array([[2.0, 0, 0, -31], [0, 2, 0, -35], [0, 0, 2, -27], [0, 0, 0, 1]]))
    points = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    rng = np.random.default_rng(2)
    poses = np.stack([rigid(tuple(rng.uniform(-4, 4, 3)), rng.uniform(-3, 3, 3)) for _ in range(24)])
    fades = np.tile(np.linspace(1, 0.3, 12), 2)
    data = np.empty((24, *grid.shape), np.float32)
    eddies = np.pad(rng.uniform(-2, 2, (24, 1)), ((0, 0), (0, 9)))  # a shift along y
    for v, (pose, fade) in enumerate(zip(poses, fades, strict=True)):
        back = np.linalg.inv(pose)
        seen = points - [0, eddies[v, 0], 0]
        data[v] = fade * (0.5 if v < 12 else 1.0) * blob(seen @ back[:3, :3].T + back[:3, 3])
    bvecs = np.tile(directions(12), (2, 1))
    group = np.repeat([1, 0], 12)
    dwi = DWI(torch.from_numpy(data), grid, np.full(24, 1000.0), bvecs, group, group)
    mask = Volume(torch.from_numpy((blob(points) > 30).astype(np.float32)), grid)
    none = np.full(12, np.nan)
    motions = tuple(
        Motion(
            poses[where],
            where,
            mask,
            mask,
            none,
            none,
            none[:, None],
            2,
            [],
            "3dSHORE",
            EddyCurrents(eddies[where], np.eye(3), np.zeros(3), 1) if eddy else None,
        )
        for where in (np.flatnonzero(group == b) for b in (0, 1))
    )
    return dwi, motions, blob(points)


def test_volumes_are_aligned_and_weighted() -> None:
    dwi, motions, head = series(eddy=True)
    first, second = mean_diffusion(dwi, motions)
    fades = np.linspace(1, 0.3, 12)
    expected = head * (fades**2).sum() / fades.sum()  # as bright as the sums of signals times signals
    inside = motions[0].mask.numpy() > 0
    assert np.abs(first.numpy() - expected)[inside].max() < 0.02 * expected.max()
    assert np.abs(second.numpy() - expected / 2)[inside].max() < 0.01 * expected.max()
    apart = replace(motions[0], transforms=np.tile(np.eye(4), (12, 1, 1)))
    blurred = mean_diffusion(dwi, (apart, motions[1]))[0].numpy()
    assert np.abs(blurred - expected)[inside].max() > 0.05 * expected.max()


def test_nothing_is_compared_that_eddy_currents_or_one_blip_alone_may_have_moved() -> None:
    dwi, motions, _ = series(eddy=False)
    assert mean_diffusion(dwi, motions) == ()
    dwi, motions, _ = series(eddy=True)
    assert mean_diffusion(dwi, motions[:1]) == ()


def test_the_pipeline_compares_them_where_it_may() -> None:
    for eddy in (True, False):
        dwi, motions, head = series(eddy)
        scene = Volume(torch.from_numpy(head.astype(np.float32)), dwi.grid)
        motions = tuple(replace(moved, dwiref=scene) for moved in motions)
        blips = tuple(
            Blip(name, PhaseEncoding(1, p, READOUT), torch.zeros(0, *dwi.grid.shape))
            for name, p in (("up", 1), ("down", -1))
        )
        scheme = SamplingScheme("single-shell", True, (1000.0,), 12, 0, 1000.0, "12 directions")
        acquired = Acquired(dwi, blips, scheme, motions[0].mask, np.ones(2))
        result = pipeline._distortion(torch.device("cpu"), None, acquired, motions, ["drbuddi"], DistortionSettings())
        assert result is not None and result.diffusion == eddy


# ---- what they tell


def test_two_residuals_are_one_exactly() -> None:
    """The matrix of b=0 and a contrast is the sum of their matrices; prior and barrier count once."""
    rng = np.random.default_rng(4)
    shape = (5, 6, 7)

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size).astype(np.float32))

    inner, grid = torch.ones(shape, dtype=torch.bool), Grid(shape, np.diag([2.0, 2.5, 1.5, 1.0]))
    images, other = (draw(*shape) + 3, draw(*shape) + 3), (draw(*shape) + 1, draw(*shape) + 1)
    other[0][2], other[1][2] = 0, 0  # nothing there: neither level nor tilt
    alone, beside = (pair_model.make_pair(i, inner, grid, (1.0, -0.8), np.zeros(3)) for i in (images, other))
    both = pair_model.make_pair(images, inner, grid, (1.0, -0.8), np.zeros(3), [other])
    beside = replace(beside, noise=both.contrasts[0].noise)
    state = pair_model.State(0.1 * draw(*shape), rigid((1.0, -1.0, 2.0), np.array([0.3, 0.2, 0.1])), 0.2)
    vector = draw(*shape), draw(6)

    def matrix(pair: pair_model.Pair, *limits: float) -> normal_equations.NormalEquations:
        return pair_model.equations(pair, state, pair_model.compare(pair, state), limits)[0]

    first, second, together = matrix(alone, 2.0), matrix(beside, 3.0), matrix(both, 2.0, 3.0)
    pose = torch.diag(torch.tensor([100.0, 100.0, 100.0, 0.01, 0.01, 1.0]))
    without = replace(first, weight=0 * first.weight, coupling=0 * first.coupling, pose=pose)
    products = [normal.apply(*vector) for normal in (together, first, second, without)]
    for total, a, b, prior in zip(*products, strict=True):
        assert torch.allclose(total, a + b - prior, rtol=1e-4, atol=1e-4 * float(total.abs().max()))


def striped(points: np.ndarray) -> np.ndarray:
    """The same head in another contrast, with stripes where b=0 is even."""
    x, y, z = np.moveaxis(np.asarray(points) - CENTRE, -1, 0)
    return 0.3 * usual_head(points) * (1 + 0.5 * np.sin(y / 4 + 1) * np.cos(x / 6) + 0.3 * np.sin(y / 5 + z / 6))


usual_head = simulation.head


def with_contrast(case: Case, monkeypatch: pytest.MonkeyPatch, noise: float = 0.3, gain: float = 1.0) -> list:
    """The other contrast in both blips of a case."""
    axis = case.grid.directions[:, case.axis]
    polarity = axis * np.sign(axis.sum())
    rng = np.random.default_rng(8)
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "head", striped)
        images = [
            simulation.acquire(case.grid, case.axis, s, p, 6.0, polarity)
            for s, p in zip(case.scales, (np.eye(4), case.pose), strict=True)
        ]
    images[1] *= gain
    return [torch.from_numpy((i + rng.normal(0, noise, i.shape)).astype(np.float32)) for i in images]


def corrected(case: Case, diffusion: list) -> Distortion:
    return correct_distortion(
        case.blips, case.images, case.grid, case.mask, DistortionSettings(), diffusion=tuple(diffusion)
    )


@pytest.mark.parametrize(
    ("codes", "axis", "first", "tilt"), [("RAS", 1, 1, 0), ("PSR", 0, -1, 0), ("LAS", 2, -1, 0), ("LAS", 1, 1, 17)]
)
def test_a_second_contrast_makes_the_field_better(
    codes: str, axis: int, first: int, tilt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noisy b=0 images, a gain, a head that moved, and a mean image of less noise: errors fall by a quarter."""
    pose = rigid((1.0, -1.5, 1.0), np.array([1.0, 0.0, -1.0]))
    case = Case(make_grid(codes, tilt), axis, first, pose=pose, noise=6.0, gain=1.3)
    alone, helped = case.correct(), corrected(case, with_contrast(case, monkeypatch, gain=1.3))
    assert helped.diffusion and not alone.diffusion
    assert case.errors(helped).mean() < 0.75 * case.errors(alone).mean()
    points = CENTRE + 30 * np.concatenate([np.eye(3), -np.eye(3)])
    off = [
        np.delete((points @ (r.poses[1] - pose)[:3, :3].T + (r.poses[1] - pose)[:3, 3]) @ case.grid.directions, axis, 1)
        for r in (alone, helped)
    ]
    assert np.abs(off[1]).max() < max(0.2, np.abs(off[0]).max())
    assert helped.trace[-1]["gain"] == pytest.approx(1 / 1.3, rel=0.02)


def test_empty_images_are_left_aside_and_others_refused() -> None:
    case = Case(make_grid("RAS", sizes=(6.0, 6.0, 6.0)), 1)
    nothing = [torch.zeros(case.grid.shape)] * 2
    result = corrected(case, nothing)
    assert not result.diffusion
    assert torch.equal(result.fields[0].data, case.correct().fields[0].data)
    with pytest.raises(InputError, match="mean diffusion-weighted image is"):
        corrected(case, [torch.ones(4, 4, 4)] * 2)


# ---- from files


def write_series(folder: Path, case: Case, means: list, count: int) -> list[str]:
    """Series of both blips: b=0, and the mean at every direction of b=1000; arguments of the tool."""
    for name, b0, mean in zip(("up", "down"), case.images, means, strict=True):
        data = np.stack([b0[0].numpy(), *[mean.numpy()] * count], -1)
        nib.save(nib.Nifti1Image(data, case.grid.affine), folder / f"{name}.nii.gz")
        write_bvals(folder / f"{name}.bval", np.array([0.0] + [1000.0] * count))
        vectors = np.concatenate([np.zeros((1, 3)), directions(count)])
        write_fsl_bvecs(folder / f"{name}.bvec", vectors, case.grid)
    files = ["--up", str(folder / "up.nii.gz"), "--down", str(folder / "down.nii.gz"), "-o", str(folder / "out")]
    return ["drbuddi", *files, "--pe-dir", "j", "--readout-time", str(READOUT), "--device", "cpu"]


def test_the_tool_takes_them_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(make_grid("LAS"), 1, noise=6.0)
    means = with_contrast(case, monkeypatch)
    command, errors = write_series(tmp_path, case, means, 12), []
    for extra in ([], ["--diffusion"]):
        assert main([*command, *extra]) == 0
        told = json.loads((tmp_path / "out" / "result.json").read_text())
        assert told["diffusion"] == bool(extra)
        hertz = np.asarray(nib.load(tmp_path / "out" / "fieldmap_hz.nii.gz").dataobj)
        error = (hertz * READOUT * case.grid.voxel_sizes[1] - case.field)[case.brain]
        errors.append(np.abs(error - np.median(error)).mean())
    assert errors[1] < 0.75 * errors[0]
    assert main([*write_series(tmp_path, case, means, 11), "--diffusion"]) == 1
    assert "leave --diffusion out" in capsys.readouterr().err
