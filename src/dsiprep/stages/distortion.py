"""Susceptibility distortion from a blip-up/blip-down pair: one field, exact opposites, and the pose between the blips.

The undistorted head lies in the pose of blip 0. Its point x is found in blip b at P_b x + s_b f(x) e: e the
phase-encoding axis, fixed in the scanner, s_b the readout time of the blip over the mean readout time, with the blip's
polarity as its sign, and f in mm. Intensities are multiplied by the Jacobian determinant of that map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops import blip as kernels
from dsiprep.ops.affine import point_displacement, rigid_matrix
from dsiprep.ops.filter import gaussian
from dsiprep.ops.sample import spline_coefficients
from dsiprep.settings import DistortionSettings

VERSION = 1

METHODS = {
    "drbuddi": (
        "Susceptibility distortion was estimated from b=0 images with opposite phase encoding. As in DRBUDDI "
        "[@irfanoglu2015], both images were mapped to a common undistorted space by displacements along the "
        "phase-encoding axis that are opposites in Hz, with intensities modulated by the Jacobian determinant; head "
        "motion between the two acquisitions and a global gain were estimated together with the field "
        "[@andersson2003]. Starting from equal cumulative intensities along each line [@changfitzpatrick1992], a "
        "robust squared difference with penalties on the field's gradient and Laplacian, and a barrier "
        "against folding, "
        "was minimised from coarse to fine by Gauss-Newton steps."
    )
}
"""Irfanoglu 2015: doi 10.1016/j.neuroimage.2014.11.042. Andersson 2003: doi 10.1016/S1053-8119(03)00336-7. Chang and
Fitzpatrick 1992: doi 10.1109/42.158935."""

GRADIENT_STIFFNESS = 0.02
LAPLACIAN_STIFFNESS = 100.0
BARRIER = 0.5
CG_TOL = 0.1
CG_MAX = 40
STOP = 0.04
OUTLIER = 3.0  # residuals beyond this many standard deviations count as outliers
MISFIT = 0.02
KINK = 0.01
COARSEST = 8.0  # mm


@dataclass(frozen=True, eq=False)
class _Level:
    """The pair at one voxel size, phase-encoding axis last."""

    lines: torch.Tensor
    solid: torch.Tensor
    inner: torch.Tensor
    grid: Grid
    scales: tuple[float, float]
    centre: np.ndarray
    noise: float
    unit: float


@dataclass(frozen=True, eq=False)
class _State:
    """What is estimated: field in mm (a, b, y), pose of blip 1, logarithm of the gain of blip 0 over blip 1."""

    field: torch.Tensor
    pose: np.ndarray
    gain: float


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Both images at the points of the undistorted space."""

    values: tuple[torch.Tensor, torch.Tensor]
    gradients: tuple[torch.Tensor, torch.Tensor]
    jacobians: tuple[torch.Tensor, torch.Tensor]
    inside: torch.Tensor
    residual: torch.Tensor


def correct_distortion(
    blips: tuple[Blip, ...],
    b0s: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    settings: DistortionSettings,
) -> Distortion:
    """Displacement field and pose from b=0 images of two opposite phase encodings.

    Parameters
    ----------
    blips : two Blip
        Same phase-encoding axis, opposite polarity. Readout times may differ, or be unknown for both.
    b0s : two Tensor, (m, i, j, k)
        Aligned b=0 volumes of each blip, m >= 1.
    grid : Grid
        Of all volumes.
    mask : Volume
        Rough brain mask on `grid`.
    settings : DistortionSettings

    Returns
    -------
    Distortion
        `poses[0]` is the identity. A translation of the head along the phase-encoding axis looks exactly as a constant
        field does: the centre of the mask is taken not to move along that axis, and the constant goes to the field.
        `after` and `dwiref` are Jacobian-modulated; `dwiref` is the mean of both, in the intensities of blip 0.

    Raises
    ------
    SettingsError
        If the method is not "auto" or "drbuddi", or the blips do not make a pair.
    InputError
        If the images do not fit the grid, or one is empty.

    References
    ----------
    doi 10.1016/j.neuroimage.2014.11.042 (DRBUDDI), doi 10.1016/S1053-8119(03)00336-7 (two blips, one field),
    doi 10.1109/42.158935 (equal mass along lines)
    """
    encodings = _checked(blips, b0s, grid, mask, settings)
    means = [_finite_mean(b) for b in b0s]
    axis, scales, readout = encodings[0].axis, *_scales(encodings)
    order = [*(a for a in range(3) if a != axis), axis]
    images = [m.permute(order).contiguous() for m in means]
    i, j, k = (grid.shape[a] for a in order)
    turned = Grid((i, j, k), grid.affine[:, [*order, 3]])
    inner = mask.data.to(means[0].device).permute(order) > 0.5
    levels = _pyramid(images, turned, inner, scales)
    state, trace, notes = _estimate(levels)
    compared = _compare(levels[-1], state)
    after = [levels[-1].unit * v * j for v, j in zip(compared.values, compared.jacobians, strict=True)]
    reference = (after[0] + float(np.exp(state.gain)) * after[1]) / 2
    back = np.argsort(order).tolist()

    def volume(data: torch.Tensor) -> Volume:
        return Volume(data.permute(back).contiguous(), grid)

    direction = torch.as_tensor(grid.directions[:, axis], dtype=torch.float32, device=state.field.device)
    along = state.field.permute(back) * direction[:, None, None, None]
    hertz = None if readout is None else volume(state.field / float(grid.voxel_sizes[axis]) / readout)
    return Distortion(
        poses=np.stack([np.eye(4), state.pose]),
        fields=tuple(DisplacementField((s * along).contiguous(), grid) for s in scales),
        fieldmap_hz=hertz,
        dwiref=volume(reference),
        before=tuple(Volume(m, grid) for m in means),
        after=tuple(volume(a) for a in after),
        trace=trace,
        method="drbuddi",
        notes=notes,
    )


def _checked(
    blips: tuple[Blip, ...],
    b0s: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    settings: DistortionSettings,
) -> tuple[PhaseEncoding, PhaseEncoding]:
    if settings.method not in ("auto", "drbuddi"):
        raise SettingsError(f"--sdc-method {settings.method} corrects nothing; use auto or drbuddi")
    if len(blips) != 2 or len(b0s) != 2:
        raise SettingsError(f"blip-up/blip-down correction takes two phase encodings; found {len(blips)}")
    first, second = blips[0].pe, blips[1].pe
    if first is None or second is None:
        raise InputError("a blip has no PhaseEncodingDirection; add it to its sidecar, or use --sdc-method none")
    if first.axis != second.axis or first.polarity == second.polarity:
        raise SettingsError(
            f"phase encodings {first.direction} and {second.direction} are no opposites; correction takes one axis "
            "and both polarities, such as j and j-"
        )
    if (first.readout_time is None) != (second.readout_time is None):
        raise InputError("one blip has a TotalReadoutTime and the other has none; give both or neither")
    for pe in (first, second):
        if pe.readout_time is not None and not pe.readout_time > 0:
            raise InputError(f"TotalReadoutTime of {pe.direction} is {pe.readout_time}; it must be above 0 s")
    for blip, volumes in zip(blips, b0s, strict=True):
        if volumes.ndim != 4 or len(volumes) < 1 or tuple(volumes.shape[1:]) != grid.shape:
            raise InputError(f"b=0 images of blip {blip.name} are {tuple(volumes.shape)}; wanted (m, *{grid.shape})")
        if not float(torch.nan_to_num(volumes.float()).abs().max()) > 0:
            raise InputError(f"b=0 images of blip {blip.name} are empty; check the files of this phase encoding")
    if tuple(mask.data.shape) != grid.shape or not bool((mask.data > 0.5).any()):
        raise InputError(f"the brain mask is empty or {tuple(mask.data.shape)}; wanted a brain on {grid.shape}")
    return first, second


def _finite_mean(volumes: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(volumes.float(), posinf=0.0, neginf=0.0).mean(0)


def _scales(encodings: tuple[PhaseEncoding, PhaseEncoding]) -> tuple[tuple[float, float], float | None]:
    """Displacement in each blip per unit of field, and the readout time that a unit stands for."""
    times = [1.0 if pe.readout_time is None else pe.readout_time for pe in encodings]
    mean = (times[0] + times[1]) / 2
    first, second = (pe.polarity * t / mean for pe, t in zip(encodings, times, strict=True))
    return (first, second), (None if encodings[0].readout_time is None else mean)


def _pyramid(images: list[torch.Tensor], grid: Grid, inner: torch.Tensor, scales: tuple[float, float]) -> list[_Level]:
    """The pair from coarse to fine, in intensities of the brain's median."""
    unit = float(torch.stack(images)[:, inner].median().clamp(min=1e-20))
    finest = float(np.prod(grid.voxel_sizes) ** (1 / 3))
    steps = max(0, round(float(np.log2(COARSEST / finest))))
    spacings = [float(s) for s in np.geomspace(COARSEST, finest, steps + 1)[:-1]]
    where = np.argwhere(inner.cpu().numpy())
    centre = grid.to_world(where.mean(0))
    levels = []
    for spacing in [*spacings, 0.0]:
        coarse = grid.at_spacing(tuple(np.maximum(grid.voxel_sizes, spacing))) if spacing else grid
        blurred = [_reduced(v / unit, grid, coarse) for v in images]
        lines = _line_coefficients(blurred[0])
        solid = spline_coefficients(blurred[1][None])[0]
        small = _reduced(inner.float(), grid, coarse) > 0.5
        small = small if bool(small.any()) else small | True
        levels.append(_Level(lines, solid, small, coarse, scales, centre, _noise(blurred, small), unit))
    return levels


def _reduced(image: torch.Tensor, grid: Grid, coarse: Grid) -> torch.Tensor:
    if coarse.shape == grid.shape:
        return image
    ratio = coarse.voxel_sizes / grid.voxel_sizes
    sigma = 0.5 * np.sqrt(np.maximum(ratio**2 - 1, 0))
    return _resized(gaussian(image[None], sigma)[0], coarse.shape)


def _resized(image: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    return functional.interpolate(image[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0]


def _line_coefficients(image: torch.Tensor) -> torch.Tensor:
    """Spline coefficients along the last axis: the other axes are hidden from the filter."""
    a, b, y = image.shape
    return torch.cat([spline_coefficients(row[:, None, None]) for row in image]).reshape(a, b, y)


def _estimate(levels: list[_Level]) -> tuple[_State, list[dict[str, float]], tuple[str, ...]]:
    state = _start(levels[0])
    trace: list[dict[str, float]] = []
    notes: list[str] = []
    for number, level in enumerate(levels):
        state = replace(state, field=_resized(state.field, level.grid.shape))
        state, converged = _descend(level, state, number, trace)
    if not converged:
        notes.append("the distortion field had not settled when the finest level's iterations ran out")
    return state, trace, tuple(notes)


def _start(level: _Level) -> _State:
    """Equal mass along lines, smoothed; or nothing, whichever fits better."""
    compared = _compare(level, _State(torch.zeros_like(level.lines), np.eye(4), 0.0))
    first, second = compared.values
    field = kernels.equal_mass_field(first, second, level.scales)
    mass = (first + second).clamp(min=0).sum(2, keepdim=True).expand_as(field)
    sigma = (12.0 / level.grid.voxel_sizes).tolist()
    blurred, total = gaussian(torch.stack([field * mass, mass]).contiguous(), sigma)
    field = blurred / (total + 1e-3 * float(total.max()) + 1e-12) * float(level.grid.voxel_sizes[2])
    gain = float(np.log((first[level.inner].mean() / second[level.inner].mean()).clamp(0.05, 20)))
    candidates = [_State(f, np.eye(4), gain) for f in (torch.zeros_like(field), field)]
    return min(candidates, key=lambda s: float(_robust(level, _compare(level, s), 1.0)))


def _descend(
    level: _Level, state: _State, number: int, trace: list[dict[str, float]], iterations: int = 25
) -> tuple[_State, bool]:
    """Gauss-Newton steps at one level, until nothing moves."""
    compared = _compare(level, state)
    for iteration in range(iterations):
        outlier = _outlier(level, compared)
        cost = _cost(level, state, compared, outlier)
        field, pose, inner = _step(level, state, compared, outlier)
        share, accepted = 1.0, None
        while share > 0.02 and accepted is None:
            trial = _moved(level, state, share * field, share * pose)
            trial_compared = _compare(level, trial)
            if _cost(level, trial, trial_compared, outlier) < cost:
                accepted = trial
            else:
                share /= 2
        if accepted is None:
            return state, True
        change = _change(level, share * field, state.pose, accepted.pose)
        state, compared = accepted, trial_compared
        row = {"level": number, "iteration": iteration, "cost": cost, "outlier": outlier, "step": share}
        trace.append({**row, "inner": inner, "change_mm": change, "gain": float(np.exp(state.gain))})
        if change < STOP:
            return state, True
    return state, False


def _compare(level: _Level, state: _State) -> _Comparison:
    affine, h = level.grid.affine, float(level.grid.voxel_sizes[2])
    s0, s1 = level.scales
    v0, g0, in0 = kernels.sample_lines(level.lines, s0 / h * state.field)
    matrix = np.linalg.inv(affine) @ state.pose @ affine
    v1, g1, in1 = kernels.sample_solid(level.solid, matrix, s1 / h * state.field)
    j0 = 1 + s0 / h * kernels.along(state.field, 2)
    # det(R + s e grad(f)') = 1 + s grad(f)' R' e
    turned = np.linalg.inv(affine[:3, :3]) @ state.pose[:3, :3].T @ level.grid.directions[:, 2]
    j1 = torch.ones_like(j0)
    for axis in range(3):
        j1 += s1 * float(turned[axis]) * kernels.along(state.field, axis)
    residual = v0 * j0 - float(np.exp(state.gain)) * v1 * j1
    return _Comparison((v0, v1), (g0, g1), (j0, j1), in0 * in1, residual)


def _noise(images: list[torch.Tensor], inner: torch.Tensor) -> float:
    """Standard deviation of the difference of two images where nothing but noise tells them apart.

    Differences along all three axes at once leave little of the anatomy. Interpolation and the like never let images
    agree better than MISFIT of the brain's intensity.
    """
    total = MISFIT**2
    for image in images:
        rough, where = image, inner
        for axis in range(3):
            if image.shape[axis] > 1:
                rough = torch.diff(rough, dim=axis) / 2**0.5
                where = where.narrow(axis, 1, image.shape[axis] - 1)
        if bool(where.any()):
            local = gaussian((rough * rough)[None].contiguous(), 1.5)[0][where]
            total += float(local.kthvalue(int(0.1 * len(local)) + 1).values)
    return float(total**0.5)


def _outlier(level: _Level, compared: _Comparison) -> float:
    """Residuals beyond this count less and less: wide while the images are still apart."""
    inside = compared.residual[level.inner & (compared.inside > 0)]
    spread = float(1.4826 * inside.abs().median()) if inside.numel() else 0.0
    return OUTLIER * max(spread, level.noise)


def _robust(level: _Level, compared: _Comparison, outlier: float) -> torch.Tensor:
    z = compared.residual / outlier
    return 0.5 * (outlier / level.noise) ** 2 * (compared.inside * torch.log1p(z * z)).sum()


def _stiffness(level: _Level) -> tuple[float, float]:
    volume = float(np.prod(level.grid.voxel_sizes))
    return GRADIENT_STIFFNESS * volume, LAPLACIAN_STIFFNESS * volume


def _cost(level: _Level, state: _State, compared: _Comparison, outlier: float) -> float:
    steep = max(abs(s) for s in level.scales) / float(level.grid.voxel_sizes[2])
    wall = kernels.barrier(state.field, steep)[0]
    if not torch.isfinite(wall) or not bool((compared.jacobians[1] > 0).all()):
        return float("inf")
    weak, stiff = _stiffness(level)
    bend = kernels.laplacian(state.field, level.grid.voxel_sizes)
    smooth = stiff * KINK**2 * (torch.sqrt(1 + (bend / KINK) ** 2) - 1).sum() - 0.5 * weak * (bend * state.field).sum()
    return float(_robust(level, compared, outlier) + smooth + BARRIER * wall)


def _step(level: _Level, state: _State, compared: _Comparison, outlier: float) -> tuple[torch.Tensor, np.ndarray, int]:
    """The Gauss-Newton step of field and pose, and how many inner iterations it took."""
    h, (s0, s1), gain = float(level.grid.voxel_sizes[2]), level.scales, float(np.exp(state.gain))
    (v0, v1), (g0, g1), (j0, j1) = compared.values, compared.gradients, compared.jacobians
    level_of = s0 / h * g0 * j0 - gain * s1 / h * g1[2] * j1
    tilt = s0 / h * v0 - gain * s1 / h * v1
    z = compared.residual / outlier
    weight = compared.inside / (level.noise**2 * (1 + z * z))
    columns = _pose_columns(level, state, compared)
    weighted = weight * compared.residual
    spread = weight * columns
    coupling = level_of * spread + torch.stack([kernels.transposed_along(tilt * c) for c in spread])
    count = len(columns)
    inner_pose = columns.reshape(count, -1) @ spread.reshape(count, -1).T
    inner_pose += torch.diag(torch.tensor([100.0, 100.0, 100.0, 0.01, 0.01, 1.0], device=weight.device))
    _wall, slope, curvature = kernels.barrier(state.field, max(abs(s0), abs(s1)) / h)
    bend = kernels.laplacian(state.field, level.grid.voxel_sizes)
    weak, stiff = _stiffness(level)
    stiffness = (weak, stiff / torch.sqrt(1 + (bend / KINK) ** 2))
    normal = kernels.Normal(
        level_of, tilt, weight, BARRIER * curvature, coupling, inner_pose, level.grid.voxel_sizes, stiffness
    )
    force = level_of * weighted + kernels.transposed_along(tilt * weighted)
    force += kernels.laplacian(stiffness[1] * bend - stiffness[0] * state.field, level.grid.voxel_sizes)
    force[..., 1:] += BARRIER * slope
    force[..., :-1] -= BARRIER * slope
    pull = columns.reshape(count, -1) @ weighted.reshape(-1)
    field, pose, inner = kernels.conjugate_gradients(normal, (-force, -pull), level.inner, CG_TOL, CG_MAX)
    return field, pose.double().cpu().numpy(), inner


def _pose_columns(level: _Level, state: _State, compared: _Comparison) -> torch.Tensor:
    """Derivatives of the residual by rotation (3, about the moved centre), translation across the phase encoding (2,
    mm) and the logarithm of the gain, (6, a, b, y)."""
    affine, gain = level.grid.affine, float(np.exp(state.gain))
    value, gradient, jacobian = compared.values[1], compared.gradients[1], compared.jacobians[1]
    turn = torch.as_tensor(np.linalg.inv(affine[:3, :3]).T, dtype=torch.float32, device=value.device)
    world = -gain * jacobian * torch.einsum("ab,bijk->aijk", turn, gradient)
    moved = state.pose @ affine
    moved[:3, 3] -= state.pose[:3, :3] @ level.centre + state.pose[:3, 3]
    axes = [torch.arange(n, device=value.device, dtype=torch.float32) for n in value.shape]
    x, y, z = (
        float(r[0]) * axes[0][:, None, None] + float(r[1]) * axes[1][:, None] + float(r[2]) * axes[2] + float(r[3])
        for r in moved[:3]
    )
    rows = [y * world[2] - z * world[1], z * world[0] - x * world[2], x * world[1] - y * world[0]]
    across = torch.as_tensor(_across(level.grid), dtype=torch.float32, device=value.device)
    rows += list(torch.einsum("am,aijk->mijk", across, world))
    return torch.stack([*rows, -gain * value * jacobian])


def _across(grid: Grid) -> np.ndarray:
    """Two unit vectors across the last axis of the grid, (3, 2)."""
    return np.linalg.svd(grid.directions[:, 2:])[0][:, 1:]


def _moved(level: _Level, state: _State, field: torch.Tensor, pose: np.ndarray) -> _State:
    centre = (state.pose @ np.append(level.centre, 1))[:3]
    parameters = np.concatenate([pose[:3], _across(level.grid) @ pose[3:5]])
    moved = rigid_matrix(parameters, centre) @ state.pose
    return _State(state.field + field, moved, float(np.clip(state.gain + pose[5], -3, 3)))


def _change(level: _Level, field: torch.Tensor, before: np.ndarray, after: np.ndarray) -> float:
    """How far the last step moved nearly all of the brain, mm."""
    moved = float(field[level.inner].abs().quantile(0.99)) if level.inner.sum() < 1e7 else float(field.abs().max())
    corners = level.centre + 60.0 * np.concatenate([np.eye(3), -np.eye(3)])
    return max(moved, float(point_displacement(before[None], after[None], corners).max()))


_Solver = Callable[[torch.Tensor], torch.Tensor]
