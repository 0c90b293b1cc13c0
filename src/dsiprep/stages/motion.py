"""SHORELine: predict each volume from the others, register it to its prediction, repeat until nothing moves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsiprep.data.acquisition import SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Motion
from dsiprep.errors import InputError
from dsiprep.ops.affine import point_displacement, rigid_matrix, rotate_bvecs
from dsiprep.ops.agreement import agreement, slice_scores, trust
from dsiprep.ops.align import Rest, align, read
from dsiprep.ops.mask import brain_mask_b0
from dsiprep.ops.points import PointSet, average_blocks, point_set
from dsiprep.ops.pose import (
    decompose,
    interpolate_poses,
    jitter,
    median_pose,
    resting_poses,
    without_trend,
)
from dsiprep.ops.sample import pull
from dsiprep.ops.shore import leave_one_out, near_neighbours, shore_basis, shore_prior, shore_size
from dsiprep.ops.tensor import tensor_basis, tensor_prediction
from dsiprep.settings import MotionSettings

VERSION = 2
_ROUNDS = (
    "registered to its prediction by robust (Student t) Gauss-Newton steps, coarse to fine [@baker2004]. b-vectors "
    "turned with their volumes, volumes that did not fit counted for less in the predictions of the others, and rounds "
    "were repeated until no volume moved. Poses were expected near those that the head rested in around "
    "the same time, with "
    "heavy tails, so that clear movements are left as they are; what poses had in common as an even function "
    "of the gradient was taken away, since a head does not know the gradient."
)
METHODS = {
    "3dSHORE": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        "volume was predicted from all others by a 3dSHORE model [@ozarslan2008; @merlet2013] in closed form, with an "
        "isotropic normal prior on the coefficients estimated from the series by expectation maximisation "
        f"[@dempster1977], and {_ROUNDS}"
    ),
    "tensor": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        f"volume was predicted from all others by a diffusion tensor [@basser1994], and {_ROUNDS}"
    ),
    "none": (
        "The b=0 volumes were aligned to their mean, and diffusion-weighted volumes took the motion of the b=0 "
        "volumes, interpolated in time."
    ),
    "off": "Head motion was not corrected.",
}
__all__ = ["METHODS", "VERSION", "estimate_motion", "explain_model"]

log = logging.getLogger("dsiprep")
COARSE_MM = (8.0, 5.0)  # voxel sizes before the volumes' own
COARSE_ROUNDS = 10
STEPS = 3  # Gauss-Newton steps per round
CHUNK = 16  # volumes aligned at a time
MISFIT = 0.45  # trust below which other starts are tried: a residual 1.5 times the usual


@dataclass(frozen=True, eq=False)
class _Level:
    """The series on voxels of one size."""

    data: torch.Tensor
    grid: Grid
    points: PointSet
    name: str

    def take(self, index: np.ndarray) -> torch.Tensor:
        """Some volumes."""
        return self.data[torch.as_tensor(index, device=self.data.device)]

    def read(self, index: np.ndarray, transforms: np.ndarray, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Some volumes at the points, (len(index), m); `fill` or zero where they do not reach."""
        if fill is None:
            fill = torch.zeros(len(index), len(self.points), device=self.data.device)
        parts = []
        for first in range(0, len(index), CHUNK):
            part = slice(first, first + CHUNK)
            parts.append(read(self.take(index[part]), self.grid, self.points, transforms[index[part]], fill[part]))
        return torch.cat(parts)

    def few(self) -> np.ndarray:
        """A few hundred world points of the brain, for measuring movement."""
        world = self.points.world[:: max(1, len(self.points) // 300)]
        return world.astype(float) + self.points.centre


@dataclass(frozen=True)
class _Model:
    """How volumes are predicted from each other: "3dSHORE" with its radial order, "tensor", "none" or "off"."""

    name: str
    note: str = ""
    order: int = 0


def explain_model(scheme: SamplingScheme, settings: MotionSettings) -> str:
    """What the stage would do for a sampling scheme, in a sentence."""
    if settings.method == "none":
        return "none: switched off"
    model = _choose_model(scheme.n_directions, len(scheme.bvalues) + (scheme.n_b0 > 0), settings)
    return f"SHORELine with {model.name} ({model.note}), {settings.transform}, up to {settings.iters} rounds"


def estimate_motion(dwi: DWI, mask: Volume, settings: MotionSettings) -> Motion:
    """Where the head was in every volume.

    Parameters
    ----------
    dwi : DWI
        Volumes of one phase encoding, in the order of acquisition, at least one b=0.
    mask : Volume
        Rough brain mask on the grid of `dwi`, 0 or 1.
    settings : MotionSettings
        `iters` bounds the rounds on the volumes' own voxels; rounds on coarser voxels come before.

    Returns
    -------
    Motion
        `transforms` take points of the b=0 reference to points of each volume. The frame is the middle
        (geometric median) of the poses of the b=0 volumes.

    Raises
    ------
    InputError
        If the mask is empty, voxels are not finite, there is no b=0, or grids differ.

    References
    ----------
    Cieslak et al. 2024, doi 10.1002/hbm.26570.
    """
    _check(dwi, mask)
    transforms = np.tile(np.eye(4), (len(dwi), 1, 1))
    levels = _levels(dwi, mask)
    if settings.method == "none":
        return _finish(dwi, levels[-1], transforms, _Model("off", "switched off"), [])
    weighted = ~dwi.is_b0
    rings = 1 + len(np.unique(np.round(dwi.bvals[weighted] / 100)))
    model = _choose_model(int(weighted.sum()), rings, settings)
    trace: list[dict[str, Any]] = []
    for number, level in enumerate(levels):
        transforms = _align_b0s(dwi, level, transforms)
        if model.name == "none":
            transforms = _from_b0s(dwi, level, transforms)
            trace += _rows(transforms, level, number + 1)
            continue
        if number == 0:
            transforms = transforms[_nearest_b0(dwi)]
        rounds = settings.iters if number == len(levels) - 1 else COARSE_ROUNDS
        done = int(trace[-1]["iter_num"]) if trace else 0
        transforms, rows = _rounds(dwi, level, transforms, model, settings, (done, rounds))
        trace += rows
    return _finish(dwi, levels[-1], transforms, model, trace)


def _check(dwi: DWI, mask: Volume) -> None:
    if not mask.grid.matches(dwi.grid):
        raise InputError(
            f"motion: the mask is {mask.grid.shape} voxels, the series {dwi.grid.shape}, or they lie apart"
        )
    if not (mask.data > 0.5).any():
        raise InputError("motion: the brain mask has no voxels; give a mask that covers the head")
    for volume, data in enumerate(dwi.data):
        if not torch.isfinite(data).all():
            raise InputError(f"motion: volume {volume} holds NaN or infinite voxels; replace them with zero")
    if not dwi.is_b0.any():
        raise InputError(
            f"motion: no volume has b <= {dwi.b0_threshold:g}, the lowest is {dwi.bvals.min():g}; raise --b0-threshold"
        )


def _choose_model(count: int, rings: int, settings: MotionSettings) -> _Model:
    """3dSHORE where there are at least three b-values (b=0 counted) and enough volumes; the tensor otherwise."""
    if settings.model == "none" or count == 0:
        return _Model("none", "b=0 volumes only" if count else "there are only b=0 volumes")
    if settings.model == "tensor":
        return _tensor(count, "as asked for")
    if settings.model == "auto" and rings < 3:
        return _tensor(count, "one b-value besides b=0")
    for order in (6, 4, 2):
        if count + 1 > shore_size(order):
            few = "" if order == 6 else f", as there are only {count} directions"
            return _Model("3dSHORE", f"{rings} b-values, radial order {order}{few}", order)
    return _tensor(count, f"{count} directions are too few for 3dSHORE")


def _tensor(count: int, why: str) -> _Model:
    if count < 7:
        return _Model("none", f"{why}, and {count} directions are too few for a tensor: b=0 volumes only")
    return _Model("tensor", why)


def _levels(dwi: DWI, mask: Volume) -> list[_Level]:
    """From coarse voxels to the volumes' own."""
    levels = []
    for spacing in COARSE_MM:
        data, grid = average_blocks(dwi.data, dwi.grid, spacing)
        inside, _ = average_blocks(mask.data[None].float(), dwi.grid, spacing)
        if data is not dwi.data and (inside > 0.5).sum() >= 500:
            levels.append(_Level(data, grid, point_set(inside[0], grid), f"{spacing:g} mm"))
    return [*levels, _Level(dwi.data, dwi.grid, point_set(mask.data, dwi.grid), "full")]


def _align_b0s(dwi: DWI, level: _Level, transforms: np.ndarray) -> np.ndarray:
    """b=0 volumes to the mean of the others; the frame is the middle of their poses."""
    index = np.flatnonzero(dwi.is_b0)
    if len(index) < 2:
        return transforms
    out = transforms.copy()
    data = level.take(index)
    for _ in range(4):
        seen = level.read(index, out)
        targets = (seen.sum(0, keepdim=True) - seen) / (len(index) - 1)
        moved = align(data, level.grid, level.points, targets.contiguous(), out[index], steps=2 * STEPS).transforms
        if len(index) == 2:  # each has gone all the way to the other: halfway is enough
            moved[0] = out[index[0]]
        moved = moved @ np.linalg.inv(median_pose(moved, level.points.centre))
        change = point_displacement(out[index], moved, level.few()).mean(1).max()
        out[index] = moved
        if change < 0.01:
            break
    return out


def _nearest_b0(dwi: DWI) -> np.ndarray:
    """For each volume, the b=0 volume of its run nearest in time (of any run where its own has none)."""
    b0 = np.flatnonzero(dwi.is_b0)
    order = np.arange(len(dwi))
    elsewhere = dwi.run[:, None] != dwi.run[b0]
    return b0[(np.abs(order[:, None] - b0) + len(dwi) * elsewhere).argmin(1)]


def _from_b0s(dwi: DWI, level: _Level, transforms: np.ndarray) -> np.ndarray:
    """Diffusion-weighted volumes between the b=0 volumes before and after them, run by run."""
    out = transforms[_nearest_b0(dwi)]
    for run in np.unique(dwi.run):
        own = np.flatnonzero(dwi.run == run)
        known = dwi.is_b0[own]
        if known.any():
            out[own] = interpolate_poses(transforms[own], known, level.points.centre)
    return out


def _rounds(
    dwi: DWI,
    level: _Level,
    transforms: np.ndarray,
    model: _Model,
    settings: MotionSettings,
    count: tuple[int, int],
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Predict, register, repeat: `count` rounds done and allowed. Gives transforms and a row per volume and round."""
    index = np.flatnonzero(~dwi.is_b0)
    out = transforms.copy()
    reference = level.read(np.flatnonzero(dwi.is_b0), out).mean(0, keepdim=True)
    weights, fill = np.ones(len(index)), None
    trace: list[dict[str, Any]] = []
    done, allowed = count
    for number in range(done + 1, done + allowed + 1):
        seen = level.read(index, out, fill)
        for _ in range(3 if number == 1 else 1):
            predicted = _predict(dwi, out, seen, reference, model, weights)
            weights = trust(seen, predicted, dwi.bvals[index])
        if number == 2:
            out = _try_other_starts(dwi, level, out, predicted, weights)
        before = out[index]
        rest = None if number <= 2 else _rest(dwi, level, out)
        out[index] = _register(level, index, predicted, before, settings.transform == "Affine", rest)
        if number > done + 1:
            out = without_trend(out, np.where(dwi.is_b0[:, None], 0, dwi.q), dwi.run, level.points.centre)
        fill = predicted
        trace += _rows(out, level, number)
        moved = point_displacement(before, out[index], level.few()).mean(1)
        log.info("motion: round %d (%s voxels), moved %.3f mm at most", number, level.name, moved.max())
        if moved.max() < settings.tolerance:
            break
    return out, trace


def _predict(
    dwi: DWI,
    transforms: np.ndarray,
    seen: torch.Tensor,
    reference: torch.Tensor,
    model: _Model,
    weights: np.ndarray,
) -> torch.Tensor:
    """Every weighted volume from the others and the mean b=0, (n, m); gradients as the head saw them."""
    index = np.flatnonzero(~dwi.is_b0)
    bvals = np.append(dwi.bvals[index], 0)
    bvecs = np.vstack([rotate_bvecs(dwi.bvecs[index], transforms[index]), np.zeros(3)])
    q = np.sqrt(bvals)[:, None] * bvecs
    samples = torch.cat([seen, reference])
    believed = np.append(weights, 1.0)
    if model.name == "tensor":
        return tensor_prediction(samples, tensor_basis(bvals, bvecs), near_neighbours(q), believed)[:-1].contiguous()
    basis = shore_basis(q, model.order)
    moment = (samples @ samples.T / samples.shape[1]).cpu().numpy().astype(float)
    penalty = shore_prior(moment, basis, model.order, believed)
    matrix = leave_one_out(basis, penalty, near_neighbours(q), believed)[:-1]
    return torch.as_tensor(matrix, dtype=torch.float32, device=samples.device) @ samples


def _try_other_starts(
    dwi: DWI, level: _Level, transforms: np.ndarray, predicted: torch.Tensor, weights: np.ndarray
) -> np.ndarray:
    """Volumes that fit badly start again from other poses; the one that ends with the smallest residual stays."""
    bad = np.flatnonzero(weights < MISFIT)
    out = transforms.copy()
    if not len(bad):
        return out
    volumes = np.flatnonzero(~dwi.is_b0)[bad]
    targets = predicted[torch.as_tensor(bad, device=predicted.device)]
    data, still = level.take(volumes), np.tile(np.eye(4), (len(bad), 1, 1))
    usual = resting_poses(transforms, level.points.centre)[volumes]
    turns = [np.eye(6)[axis] * side * np.deg2rad(10) for axis in range(3) for side in (1, -1)]
    starts = [out[volumes], still, usual, transforms[np.maximum(volumes - 1, 0)]]
    starts += [usual @ rigid_matrix(turn, level.points.centre) for turn in turns]
    best = np.full(len(bad), np.inf)
    for start in starts:
        found = align(data, level.grid, level.points, targets, start, steps=4 * STEPS)
        better = found.rms < 0.98 * best  # the first, unless another is clearly better
        best[better] = found.rms[better]
        out[volumes[better]] = found.transforms[better]
    log.info("motion: %d volumes that did not fit were started again", len(bad))
    return out


def _rest(dwi: DWI, level: _Level, transforms: np.ndarray) -> Rest:
    """Where the head is expected around the time of each volume, run by run, and how closely."""
    poses = np.empty_like(transforms)
    for run in np.unique(dwi.run):
        own = dwi.run == run
        poses[own] = resting_poses(transforms[own], level.points.centre)
    away = point_displacement(transforms, poses, level.few())[~dwi.is_b0]
    return Rest(poses, jitter(np.sqrt((away**2).mean(1))))


def _register(
    level: _Level,
    index: np.ndarray,
    predicted: torch.Tensor,
    starts: np.ndarray,
    affine: bool,
    rest: Rest | None,
) -> np.ndarray:
    out = np.empty_like(starts)
    for first in range(0, len(index), CHUNK):
        part = slice(first, first + CHUNK)
        expected = None if rest is None else Rest(rest.poses[index[part]], rest.jitter)
        out[part] = align(
            level.take(index[part]),
            level.grid,
            level.points,
            predicted[part],
            starts[part],
            affine=affine,
            steps=STEPS,
            rest=expected,
        ).transforms
    return out


def _rows(transforms: np.ndarray, level: _Level, number: int) -> list[dict[str, Any]]:
    """hmcOptimization.csv: shifts in mm and rotations in radians about the brain's centre."""
    name = f"{level.name} round {number}"
    return [
        {"volume": volume} | decompose(matrix, level.points.centre) | {"iter_num": number, "iter_name": name}
        for volume, matrix in enumerate(transforms)
    ]


def _finish(dwi: DWI, level: _Level, transforms: np.ndarray, model: _Model, trace: list[dict[str, Any]]) -> Motion:
    """The b=0 reference, and how well each volume agrees with its prediction at the end."""
    everything = np.arange(len(dwi))
    seen = level.read(everything, transforms)
    weighted = torch.as_tensor(~dwi.is_b0, device=seen.device)
    reference = seen[~weighted].mean(0, keepdim=True)
    predicted = reference.expand_as(seen).clone()
    if model.name in ("3dSHORE", "tensor"):
        ones = np.ones(int(weighted.sum()))
        predicted[weighted] = _predict(dwi, transforms, seen[weighted], reference, model, ones)
    r2, xcorr = agreement(seen, predicted)
    gain = (seen * predicted).sum(1, keepdim=True) / predicted.square().sum(1, keepdim=True).clamp(min=1e-12)
    axis = _slice_axis(dwi.grid)
    dwiref = _reference(dwi, transforms)
    return Motion(
        transforms=transforms,
        volumes=everything,
        dwiref=dwiref,
        mask=brain_mask_b0(dwiref),
        r2=r2,
        xcorr=xcorr,
        slice_z=slice_scores(seen - gain * predicted, level.points, dwi.grid, transforms, axis),
        slice_axis=axis,
        trace=trace,
        model=model.name,
        notes=(f"{model.name}: {model.note}",) if model.name != "3dSHORE" or model.order < 6 else (),
    )


def _reference(dwi: DWI, transforms: np.ndarray) -> Volume:
    """Mean of the aligned b=0 volumes, each where it reaches."""
    total = torch.zeros(dwi.grid.shape, device=dwi.data.device)
    number = torch.zeros_like(total)
    ones = torch.ones_like(dwi.data[:1])
    for volume in np.flatnonzero(dwi.is_b0):
        matrix = transforms[volume]
        total += pull(dwi.data[volume : volume + 1], dwi.grid, dwi.grid, matrix, cubic=True)[0]
        number += pull(ones, dwi.grid, dwi.grid, matrix, cubic=True)[0]
    return Volume((total / number.clamp(min=1e-3)).clamp(min=0) * (number > 0.5), dwi.grid)


def _slice_axis(grid: Grid) -> int:
    """k, unless voxels are clearly longest along another axis."""
    sizes = grid.voxel_sizes
    longest = int(sizes.argmax())
    return longest if sizes[longest] > 1.2 * sizes[2] else 2
