"""Susceptibility distortion from a blip-up/blip-down pair: one field, exact opposites, and the pose between the blips.

The undistorted head lies in the pose of blip 0. Its point x is found in blip b at P_b x + s_b f(x) e: e the
phase-encoding axis, fixed in the scanner, s_b the readout time of the blip over the mean readout time, with the blip's
polarity as its sign, and f in mm. Intensities are multiplied by the Jacobian determinant of that map.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion, Motion
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.image.filters import gaussian, resized
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.pepolar.common_displacement import common_displacement
from dsiprep.ops.pepolar.initial_field import equal_mass_field
from dsiprep.ops.pepolar.normal_equations import conjugate_gradients
from dsiprep.ops.pepolar.pair_model import (
    Images,
    Pair,
    State,
    change,
    compare,
    cost,
    equations,
    folded,
    make_pair,
    moved,
    outliers,
)
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines
from dsiprep.ops.qspace.matching_gradients import low_b_pairs
from dsiprep.ops.registration.linear import register_linear
from dsiprep.settings import DistortionSettings

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
    ),
    "diffusion": (
        "Beside the b=0 images, the mean diffusion-weighted images of both phase encodings were compared in the same "
        "way: volumes of low b-value that both have with the same gradient, aligned to the b=0 images."
    ),
}
"""Irfanoglu 2015: doi 10.1016/j.neuroimage.2014.11.042. Andersson 2003: doi 10.1016/S1053-8119(03)00336-7. Chang and
Fitzpatrick 1992: doi 10.1109/42.158935."""

COARSEST = 8.0  # mm
START_MM = 12.0  # smoothing of the start across and along lines
STEPS = 40
SETTLED = 0.04  # mm


def correct_distortion(
    blips: tuple[Blip, ...],
    b0s: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    settings: DistortionSettings,
    structural: Volume | None = None,
    diffusion: tuple[torch.Tensor, ...] = (),
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
    structural : Volume, optional
        Undistorted T2w or T1w of the same head, anywhere near it: it is aligned rigidly. With it both displacements get
        a smooth part that they share, which the pair alone cannot tell; they are no exact opposites then, and
        `fieldmap_hz` is half their difference.
    diffusion : two Tensor, (i, j, k), optional
        From `mean_diffusion`, each aligned to the b=0 images of its blip, in their intensities. They have another
        contrast and less noise than a few b=0 images; what they tell is weighted by how alike they are.

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
    encodings = checked_pair(blips, b0s, grid, mask, settings)
    before = tuple(finite_mean(b) for b in b0s)
    axis, scales, readout = encodings[0].axis, *_scales(encodings)
    order = [*(a for a in range(3) if a != axis), axis]
    last = grid.permuted(order)
    inner = (mask.data.to(before[0].device) > 0.5).permute(order).contiguous()
    units = [_brightness(b, mask) for b in before]
    shown = [before, diffusion] if _has_signal(diffusion, grid, mask) else [before]
    pairs = _pyramid([_in_units(both, units, mask, order) for both in shown], last, inner, scales)
    state, trace, notes = _estimate(pairs)
    if structural is not None:
        state, rows, told = _with_structural(pairs[-1], state, structural)
        trace, notes = [*trace, *rows], (*notes, told)
    compared = compare(pairs[-1], state)
    after = [u * v * j for u, v, j in zip(units, compared.values, compared.jacobians, strict=True)]
    gain = units[0] / units[1]  # the rows tell of images whose brains are equally bright
    mean = (after[0] + float(np.exp(state.gain)) * gain * after[1]) / 2
    trace = [{**row, "gain": gain * row["gain"]} if "gain" in row else row for row in trace]

    def as_given(data: torch.Tensor) -> torch.Tensor:
        return data.permute(np.argsort(order).tolist()).contiguous()

    field = as_given(state.field)
    direction = torch.as_tensor(grid.directions[:, axis], dtype=torch.float32, device=field.device)
    hertz = None if readout is None else field / (float(grid.voxel_sizes[axis]) * readout)
    return Distortion(
        poses=np.stack([np.eye(4), state.pose]),
        fields=tuple(
            DisplacementField(as_given(u) * direction[:, None, None, None], grid) for u in state.displacements(scales)
        ),
        fieldmap_hz=None if hertz is None else Volume(hertz, grid),
        dwiref=Volume(as_given(mean), grid),
        before=tuple(Volume(b, grid) for b in before),
        after=tuple(Volume(as_given(a), grid) for a in after),
        trace=trace,
        method="drbuddi",
        notes=notes,
        diffusion=len(shown) > 1,
    )


def mean_diffusion(dwi: DWI, motions: tuple[Motion, ...]) -> tuple[torch.Tensor, ...]:
    """The mean diffusion-weighted image of either blip of a series, aligned to its b=0 reference.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    motions : tuple of Motion
        Of each blip that has volumes in `dwi`, in the order of blips.

    Returns
    -------
    two Tensor, (i, j, k), or none
        Of the volumes that `low_b_pairs` chooses, bright ones with more weight: the less diffusion has taken, the less
        of what remains is noise. Empty where it chooses none, and where eddy currents were not looked for: they move
        volumes of opposite phase encoding apart, as the field does.
    """
    wanted = len(motions) == 2 and all(moved.eddy is not None for moved in motions)
    pairs = low_b_pairs(dwi.bvals, dwi.bvecs, dwi.blip, dwi.is_b0) if wanted else []
    inside, total = motions[0].mask.numpy() > 0.5, 0.0
    means = tuple(torch.zeros(dwi.grid.shape) for _ in motions)
    for pair in pairs:
        seen = [_aligned(dwi, moved, v) for moved, v in zip(motions, pair, strict=True)]
        weight = max(0.0, float(seen[0][inside].mean()))
        total += weight
        for mean, image in zip(means, seen, strict=True):
            mean.add_(image, alpha=weight)
    return tuple(mean / total for mean in means) if total > 0 else ()


def _aligned(dwi: DWI, moved: Motion, volume: int) -> torch.Tensor:
    """A volume (i, j, k) of the series on the b=0 reference of its blip."""
    row = int(np.flatnonzero(moved.volumes == volume)[0])
    eddy = None if moved.eddy is None else moved.eddy.take(np.array([row]))
    image = torch.nan_to_num(moved.with_replaced_slices(row, dwi.data[volume].cpu()), posinf=0.0, neginf=0.0)
    return warp_volume(image, dwi.grid, dwi.grid, moved.transforms[row], eddy=eddy)


def _has_signal(diffusion: tuple[torch.Tensor, ...], grid: Grid, mask: Volume) -> bool:
    """Whether there are diffusion-weighted images to compare."""
    for image in diffusion:
        if tuple(image.shape) != grid.shape:
            raise InputError(f"a mean diffusion-weighted image is {tuple(image.shape)}; wanted {grid.shape}")
    return len(diffusion) == 2 and all(float(d[mask.data.to(d.device) > 0.5].median()) > 0 for d in diffusion)


def checked_pair(
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


def _brightness(image: torch.Tensor, mask: Volume) -> float:
    """Median intensity of the brain; the brightest voxel where the brain is mostly empty."""
    median = float(image[mask.data.to(image.device) > 0.5].median())
    return median if median > 0 else float(image.abs().max())


def _in_units(both: tuple[torch.Tensor, ...], units: list[float], mask: Volume, order: list[int]) -> Images:
    """Images of both blips with their axes in `order`, the brain of the first about 1, brighter or darker in the second
    as the b=0 images are that have the brightness `units`."""
    level = _brightness(both[0], mask) / units[0]
    first, second = (b.permute(order).contiguous() / (u * level) for b, u in zip(both, units, strict=True))
    return first, second


def finite_mean(volumes: torch.Tensor) -> torch.Tensor:
    """Mean of volumes (m, i, j, k), what is not finite counted as zero."""
    return torch.nan_to_num(volumes.float(), posinf=0.0, neginf=0.0).mean(0)


def _scales(encodings: tuple[PhaseEncoding, PhaseEncoding]) -> tuple[tuple[float, float], float | None]:
    """Displacement in each blip per unit of field, and the readout time that a unit stands for."""
    times = [1.0 if pe.readout_time is None else pe.readout_time for pe in encodings]
    mean = (times[0] + times[1]) / 2
    first, second = (pe.polarity * t / mean for pe, t in zip(encodings, times, strict=True))
    return (first, second), (None if encodings[0].readout_time is None else mean)


def _pyramid(images: list[Images], grid: Grid, inner: torch.Tensor, scales: tuple[float, float]) -> list[Pair]:
    """The pair from coarse to fine: of b=0 images, and of what else there is of both blips."""
    finest = float(np.prod(grid.voxel_sizes) ** (1 / 3))
    steps = max(0, round(float(np.log2(COARSEST / finest))))
    centre = grid.to_world(np.argwhere(inner.cpu().numpy()).mean(0))
    pairs = []
    for spacing in np.geomspace(COARSEST, finest, steps + 1)[:-1]:
        coarse = grid.at_spacing(tuple(np.maximum(grid.voxel_sizes, float(spacing))))
        reduced = [(_reduced(a, grid, coarse), _reduced(b, grid, coarse)) for a, b in images]
        brain = _reduced(inner.float(), grid, coarse) > 0.5
        pairs.append(make_pair(reduced[0], brain, coarse, scales, centre, reduced[1:]))
    return [*pairs, make_pair(images[0], inner, grid, scales, centre, images[1:])]


def _reduced(image: torch.Tensor, grid: Grid, coarse: Grid) -> torch.Tensor:
    ratio = coarse.voxel_sizes / grid.voxel_sizes
    widths = (0.5 * np.sqrt(np.maximum(ratio**2 - 1, 0))).tolist()
    return resized(gaussian(image[None], widths)[0], coarse.shape)


def _estimate(pairs: list[Pair]) -> tuple[State, list[dict[str, float]], tuple[str, ...]]:
    state, settled = _start(pairs[0]), True
    trace: list[dict[str, float]] = []
    for number, pair in enumerate(pairs):
        state = _unfolded(pair, replace(state, field=resized(state.field, pair.grid.shape)))
        rows, state, settled = _descend(pair, state)
        trace += [{"level": number, **row} for row in rows]
    unsettled = "the distortion field had not quite settled when its last level's iterations ran out"
    return state, trace, () if settled else (unsettled,)


def _with_structural(pair: Pair, state: State, structural: Volume) -> tuple[State, list[dict[str, float]], str]:
    """The state with the displacement that both blips share, its trace, and a sentence about it."""
    compared = compare(pair, state)
    (v0, v1), (j0, j1) = compared.values, compared.jacobians
    image = (v0 * j0 + float(np.exp(state.gain)) * v1 * j1) / 2
    inner = Volume(pair.inner.float(), pair.grid)
    fit = register_linear(structural.to("cpu"), Volume(image, pair.grid).to("cpu"), fixed_mask=inner.to("cpu"))
    there = resample_onto(structural.data[None].float().to(image.device), structural.grid, pair.grid, fit.matrix)[0]
    level = there[pair.inner].median().clamp(min=1e-6)
    shared, rows = common_displacement(image, there / level, pair.inner, pair.grid)
    lines = line_coefficients(state.field)
    carried, _, inside = sample_lines(lines, shared / float(pair.grid.voxel_sizes[2]))
    moved = replace(state, field=torch.where(inside > 0, carried, state.field), shared=shared)
    if folded(pair, moved, compare(pair, moved)):
        return state, [], "the structural image was left aside: with what it told, the image would have folded"
    size = shared[pair.inner].abs()
    told = (
        f"the structural image moved both blips together by {float(size.mean()):.2f} mm on average and "
        f"{float(size.max()):.2f} mm at most along the phase-encoding axis"
    )
    return moved, [{"level": -1, **row} for row in rows], told


def _start(pair: Pair) -> State:
    """Equal mass along lines, smoothed; or nothing, whichever fits better."""
    nothing = State(torch.zeros_like(pair.lines), np.eye(4), 0.0)
    compared = compare(pair, nothing)
    first, second = (v.clamp(min=0) for v in compared.values)
    field = equal_mass_field(first, second, pair.scales) * float(pair.grid.voxel_sizes[2])
    mass = (first + second).sum(2, keepdim=True).expand_as(field)
    widths = (START_MM / pair.grid.voxel_sizes).tolist()
    blurred, total = gaussian(torch.stack([field * mass, mass]).contiguous(), widths)
    field = blurred / (total + 1e-3 * float(total.max()) + 1e-12)
    ratio = first[pair.inner].mean() / second[pair.inner].mean().clamp(min=1e-6)
    gain = float(np.log(float(ratio.clamp(0.05, 20))))
    candidates = [_unfolded(pair, State(f, np.eye(4), gain)) for f in (nothing.field, field)]
    limits = outliers(pair, compared)
    return min(candidates, key=lambda s: cost(pair, s, compare(pair, s), limits))


def _unfolded(pair: Pair, state: State) -> State:
    """The state, its field made smaller until nothing folds."""
    while folded(pair, state, compare(pair, state)):
        state = replace(state, field=0.9 * state.field)
    return state


def _descend(pair: Pair, state: State) -> tuple[list[dict[str, float]], State, bool]:
    """Gauss-Newton steps at one level until nothing moves: trace, state, and whether it settled."""
    rows: list[dict[str, float]] = []
    compared = compare(pair, state)
    for iteration in range(STEPS):
        limits = outliers(pair, compared)
        now = cost(pair, state, compared, limits)
        normal, right = equations(pair, state, compared, limits)
        field, pose, inner = conjugate_gradients(normal, right, pair.inner)
        share, parameters = 1.0, pose.double().cpu().numpy()
        trial = moved(pair, state, field, parameters)
        compared = compare(pair, trial)
        while not (after := cost(pair, trial, compared, limits)) < now:
            share /= 2
            if share < 0.02:
                return rows, state, True
            trial = moved(pair, state, share * field, share * parameters)
            compared = compare(pair, trial)
        distance = change(pair, state, trial)
        state = trial
        row = {"iteration": iteration, "cost": after, "step": share, "inner": inner, "change_mm": distance}
        rows.append({**row, "outlier": limits[0], "gain": float(np.exp(state.gain))})
        if distance < SETTLED:
            return rows, state, True
    return rows, state, False
