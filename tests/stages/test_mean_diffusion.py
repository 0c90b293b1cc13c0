"""Mean diffusion-weighted images of both blips as a further contrast: volume selection, alignment and effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep import stage_calls
from dsiprep.cli.tools import main
from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Acquired, Blip, Distortion, Motion
from dsiprep.data.transform import EddyCurrents
from dsiprep.errors import InputError
from dsiprep.io.gradients import write_bvals, write_fsl_bvecs
from dsiprep.ops.pepolar import normal_equations, pair_model
from dsiprep.ops.qspace.matching_gradients import MAX_PAIRS, low_b_pairs
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion, mean_diffusion
from helpers import epi_pair as simulation
from helpers.epi_pair import CENTRE, READOUT, Case, make_grid, rigid


def directions(count: int) -> np.ndarray:
    """Unit vectors spread over a half sphere, (count, 3)."""
    z = (np.arange(count) + 0.5) / count
    azimuth = np.pi * (1 + 5**0.5) * np.arange(count)
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), z], -1)


# ---- volume selection


def gradient_table(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """b-values, b-vectors, groups and b=0 flags: group 1, then group 0 in reverse order with antipodes.

    Each group has one b=0 volume and b-values from 500 to 2500.
    """
    bvals = np.concatenate([[0], np.linspace(500, 2500, count)])
    bvecs = np.concatenate([np.zeros((1, 3)), directions(count)])
    both = np.concatenate([bvals, bvals[::-1]])
    return both, np.concatenate([bvecs, -bvecs[::-1]]), np.repeat([1, 0], count + 1), both < 100


def test_low_b_pairs_put_group_0_first() -> None:
    bvals, bvecs, group, is_b0 = gradient_table(40)
    pairs = np.array(low_b_pairs(bvals, bvecs, group, is_b0))
    assert (group[pairs] == [0, 1]).all()
    assert np.array_equal(bvals[pairs[:, 0]], bvals[pairs[:, 1]])
    assert np.allclose(bvecs[pairs[:, 0]], -bvecs[pairs[:, 1]])
    assert np.array_equal(bvals[pairs[:, 1]], bvals[(bvals > 100) & (bvals <= 1300) & (group == 1)])
    assert len(low_b_pairs(*gradient_table(100))) == MAX_PAIRS


def test_too_few_pairs_give_none() -> None:
    assert low_b_pairs(*gradient_table(25)) == []  # only 10 low b-values
    bvals, bvecs, group, is_b0 = gradient_table(40)
    bvecs[group == 0] = np.roll(bvecs[group == 0], 1, axis=1)  # different gradients
    assert low_b_pairs(bvals, bvecs, group, is_b0) == []


# ---- alignment


def blob(points: np.ndarray) -> np.ndarray:
    """A head without symmetry, at world points."""
    p = (points - [3.0, -2.0, 1.0]) / [22.0, 27.0, 18.0]
    return 100 * np.exp(-2 * (p**2).sum(-1) ** 2) * (1 + 0.3 * np.sin(points @ [0.12, 0.05, 0.09]))


def series(eddy: bool) -> tuple[DWI, tuple[Motion, ...], np.ndarray]:
    """Twelve pairs of volumes that moved, their motion, and the head at rest.

    The volumes of blip 1 come first and are half as bright.
    """
    grid = Grid((32, 36, 28), np.array([[2.0, 0, 0, -31], [0, 2, 0, -35], [0, 0, 2, -27], [0, 0, 0, 1]]))
    points = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    rng = np.random.default_rng(2)
    poses = np.stack([rigid(tuple(rng.uniform(-4, 4, 3)), rng.uniform(-3, 3, 3)) for _ in range(24)])
    fades = np.tile(np.linspace(1, 0.3, 12), 2)
    data = np.empty((24, *grid.shape), np.float32)
    eddies = np.pad(rng.uniform(-2, 2, (24, 1)), ((0, 0), (0, 9)))  # a shift along y
    for v, (pose, fade) in enumerate(zip(poses, fades, strict=True)):
        inverse = np.linalg.inv(pose)
        undisplaced = points - [0, eddies[v, 0], 0]
        data[v] = fade * (0.5 if v < 12 else 1.0) * blob(undisplaced @ inverse[:3, :3].T + inverse[:3, 3])
    bvecs = np.tile(directions(12), (2, 1))
    group = np.repeat([1, 0], 12)
    dwi = DWI(torch.from_numpy(data), grid, np.full(24, 1000.0), bvecs, group, group)
    mask = Volume(torch.from_numpy((blob(points) > 30).astype(np.float32)), grid)
    unknown = np.full(12, np.nan)
    motions = tuple(
        Motion(
            poses[volumes],
            volumes,
            mask,
            mask,
            unknown,
            unknown,
            unknown[:, None],
            2,
            [],
            "3dSHORE",
            EddyCurrents(eddies[volumes], np.eye(3), np.zeros(3), 1) if eddy else None,
        )
        for volumes in (np.flatnonzero(group == b) for b in (0, 1))
    )
    return dwi, motions, blob(points)


def test_mean_diffusion_aligns_and_weights_volumes() -> None:
    dwi, motions, head = series(eddy=True)
    first, second = mean_diffusion(dwi, motions)
    fades = np.linspace(1, 0.3, 12)
    expected = head * (fades**2).sum() / fades.sum()  # weighted by signal
    inside = motions[0].mask.numpy() > 0
    assert np.abs(first.numpy() - expected)[inside].max() < 0.02 * expected.max()
    assert np.abs(second.numpy() - expected / 2)[inside].max() < 0.01 * expected.max()
    unaligned = replace(motions[0], transforms=np.tile(np.eye(4), (12, 1, 1)))
    blurred = mean_diffusion(dwi, (unaligned, motions[1]))[0].numpy()
    assert np.abs(blurred - expected)[inside].max() > 0.05 * expected.max()


def test_mean_diffusion_needs_eddy_current_estimates_and_both_blips() -> None:
    dwi, motions, _ = series(eddy=False)
    assert mean_diffusion(dwi, motions) == ()
    dwi, motions, _ = series(eddy=True)
    assert mean_diffusion(dwi, motions[:1]) == ()


def test_pipeline_uses_mean_diffusion_if_eddy_currents_were_estimated() -> None:
    for eddy in (True, False):
        dwi, motions, head = series(eddy)
        dwiref = Volume(torch.from_numpy(head.astype(np.float32)), dwi.grid)
        motions = tuple(replace(motion, dwiref=dwiref) for motion in motions)
        blips = tuple(
            Blip(name, PhaseEncoding(1, p, READOUT), torch.zeros(0, *dwi.grid.shape))
            for name, p in (("up", 1), ("down", -1))
        )
        scheme = SamplingScheme("single-shell", True, (1000.0,), 12, 0, 1000.0, "12 directions")
        acquired = Acquired(dwi, blips, scheme, motions[0].mask, np.ones(2))
        result = stage_calls.correct_distortion(
            torch.device("cpu"), None, acquired, motions, ["drbuddi"], DistortionSettings()
        )
        assert result is not None
        assert result.diffusion == eddy


# ---- effect


def test_equations_of_b0_and_a_contrast_add_up() -> None:
    """Their matrix is the sum of both matrices, with a single contribution of priors, penalties and barrier."""
    rng = np.random.default_rng(4)
    shape = (5, 6, 7)

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size).astype(np.float32))

    brain, grid = torch.ones(shape, dtype=torch.bool), Grid(shape, np.diag([2.0, 2.5, 1.5, 1.0]))
    images, other = (draw(*shape) + 3, draw(*shape) + 3), (draw(*shape) + 1, draw(*shape) + 1)
    other[0][2], other[1][2] = 0, 0  # empty: residual derivatives are 0
    b0_only, contrast_only = (pair_model.make_pair(i, brain, grid, (1.0, -0.8), np.zeros(3)) for i in (images, other))
    both = pair_model.make_pair(images, brain, grid, (1.0, -0.8), np.zeros(3), [other])
    contrast_only = replace(contrast_only, noise=both.contrasts[0].noise)
    state = pair_model.State(0.1 * draw(*shape), rigid((1.0, -1.0, 2.0), np.array([0.3, 0.2, 0.1])), 0.2)
    vector = draw(*shape), draw(6)

    def matrix(pair: pair_model.Pair, *limits: float) -> normal_equations.NormalEquations:
        return pair_model.gauss_newton_equations(pair, state, pair_model.compare(pair, state), limits)[0]

    first, second, together = matrix(b0_only, 2.0), matrix(contrast_only, 3.0), matrix(both, 2.0, 3.0)
    pose = torch.diag(torch.tensor(pair_model.POSE_PRIOR))
    without_data = replace(first, weight=0 * first.weight, coupling=0 * first.coupling, pose=pose)
    products = [normal.apply(*vector) for normal in (together, first, second, without_data)]
    for total, a, b, prior in zip(*products, strict=True):
        assert torch.allclose(total, a + b - prior, rtol=1e-4, atol=1e-4 * float(total.abs().max()))


def striped(points: np.ndarray) -> np.ndarray:
    """The same head in another contrast, with stripes where b=0 is uniform."""
    x, y, z = np.moveaxis(np.asarray(points) - CENTRE, -1, 0)
    return 0.3 * b0_head(points) * (1 + 0.5 * np.sin(y / 4 + 1) * np.cos(x / 6) + 0.3 * np.sin(y / 5 + z / 6))


b0_head = simulation.head


def acquire_contrast(case: Case, monkeypatch: pytest.MonkeyPatch, noise: float = 0.3, gain: float = 1.0) -> list:
    """Images of both blips of a case in the contrast of `striped`."""
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


def correct(case: Case, diffusion: list) -> Distortion:
    return correct_distortion(
        case.blips, case.images, case.grid, case.mask, DistortionSettings(), diffusion=tuple(diffusion)
    )


@pytest.mark.parametrize(
    ("codes", "axis", "first", "tilt"), [("RAS", 1, 1, 0), ("PSR", 0, -1, 0), ("LAS", 2, -1, 0), ("LAS", 1, 1, 17)]
)
def test_mean_diffusion_reduces_the_field_error(
    codes: str, axis: int, first: int, tilt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noisy b=0 images, a gain and head motion, a less noisy contrast reduces the error by a quarter."""
    pose = rigid((1.0, -1.5, 1.0), np.array([1.0, 0.0, -1.0]))
    case = Case(make_grid(codes, tilt), axis, first, pose=pose, noise=6.0, gain=1.3)
    b0_only, with_contrast = case.correct(), correct(case, acquire_contrast(case, monkeypatch, gain=1.3))
    assert with_contrast.diffusion
    assert not b0_only.diffusion
    assert case.errors(with_contrast).mean() < 0.75 * case.errors(b0_only).mean()
    points = CENTRE + 30 * np.concatenate([np.eye(3), -np.eye(3)])
    pose_errors = [
        np.delete((points @ (r.poses[1] - pose)[:3, :3].T + (r.poses[1] - pose)[:3, 3]) @ case.grid.directions, axis, 1)
        for r in (b0_only, with_contrast)
    ]
    assert np.abs(pose_errors[1]).max() < max(0.2, np.abs(pose_errors[0]).max())
    assert with_contrast.trace[-1]["gain"] == pytest.approx(1 / 1.3, rel=0.02)


def test_empty_images_are_ignored_and_misshapen_ones_rejected() -> None:
    case = Case(make_grid("RAS", sizes=(6.0, 6.0, 6.0)), 1)
    result = correct(case, [torch.zeros(case.grid.shape)] * 2)
    assert not result.diffusion
    assert torch.equal(result.fields[0].data, case.correct().fields[0].data)
    with pytest.raises(InputError, match="mean diffusion-weighted image is"):
        correct(case, [torch.ones(4, 4, 4)] * 2)


# ---- command-line tool


def write_series(folder: Path, case: Case, means: list, count: int) -> list[str]:
    """Write a series of each blip (b=0, and the mean image for each direction of b=1000); return the command line."""
    for name, b0, mean in zip(("up", "down"), case.images, means, strict=True):
        data = np.stack([b0[0].numpy(), *[mean.numpy()] * count], -1)
        nib.save(nib.Nifti1Image(data, case.grid.affine), folder / f"{name}.nii.gz")
        write_bvals(folder / f"{name}.bval", np.array([0.0] + [1000.0] * count))
        bvecs = np.concatenate([np.zeros((1, 3)), directions(count)])
        write_fsl_bvecs(folder / f"{name}.bvec", bvecs, case.grid)
    files = ["--up", str(folder / "up.nii.gz"), "--down", str(folder / "down.nii.gz"), "-o", str(folder / "out")]
    return ["drbuddi", *files, "--pe-dir", "j", "--readout-time", str(READOUT), "--device", "cpu"]


def test_tool_uses_mean_diffusion_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(make_grid("LAS"), 1, noise=6.0)
    means = acquire_contrast(case, monkeypatch)
    command, errors = write_series(tmp_path, case, means, 12), []
    for extra in ([], ["--diffusion"]):
        assert main([*command, *extra]) == 0
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["diffusion"] == bool(extra)
        hertz = np.asarray(nib.load(tmp_path / "out" / "fieldmap_hz.nii.gz").dataobj)
        error = (hertz * READOUT * case.grid.voxel_sizes[1] - case.field)[case.brain]
        errors.append(np.abs(error - np.median(error)).mean())
    assert errors[1] < 0.75 * errors[0]
    assert main([*write_series(tmp_path, case, means, 11), "--diffusion"]) == 1
    assert "omit --diffusion" in capsys.readouterr().err
