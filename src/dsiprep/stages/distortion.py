"""Susceptibility distortion from a blip-up/blip-down pair: the field, and the head motion between the blips.

The undistorted head is in its pose of blip 0. Its point x is found in blip b at P_b x + s_b f(x) e, where e is the
phase-encoding axis, fixed in the scanner, s_b the blip's polarity times its readout time over the mean readout time,
and f the field in mm. Intensities are multiplied by the Jacobian determinant of that map.
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
    apply_step,
    compare,
    cost,
    displacement_between,
    expecting,
    gauss_newton_equations,
    is_folded,
    make_pair,
    outlier_limits,
)
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines
from dsiprep.ops.qspace.matching_gradients import low_b_pairs
from dsiprep.ops.registration.linear import register_linear
from dsiprep.settings import DistortionSettings

METHODS = {
    "drbuddi": (
        "Susceptibility distortion was estimated from b=0 images with opposite phase encoding. As in DRBUDDI "
        "[@irfanoglu2015], both images were mapped to a common undistorted space by displacements along the "
        "phase-encoding axis that are opposite in Hz, with intensities modulated by the Jacobian determinant; head "
        "motion between the two acquisitions and a global gain were estimated together with the field "
        "[@andersson2003]. The field was initialised by matching cumulative intensities along each line "
        "[@changfitzpatrick1992]. A robust squared difference with penalties on the field's gradient and Laplacian and "
        "a barrier against folding was then minimised from coarse to fine by Gauss-Newton steps."
    ),
    "diffusion": (
        "In addition to the b=0 images, the mean diffusion-weighted images of both phase encodings were compared in "
        "the same way. They were averaged over volumes of low b-value that both phase encodings acquired with the same "
        "gradient, aligned to the b=0 images."
    ),
}
"""Irfanoglu 2015: doi 10.1016/j.neuroimage.2014.11.042. Andersson 2003: doi 10.1016/S1053-8119(03)00336-7. Chang and
Fitzpatrick 1992: doi 10.1109/42.158935."""

__all__ = ["METHODS", "check_pair", "correct_distortion", "fieldmap_hz", "finite_mean", "mean_diffusion"]

COARSEST_MM = 8.0
INITIAL_SMOOTHING_MM = 12.0
MAX_STEPS = 40
CONVERGED_MM = 0.04


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
        Undistorted T2w or T1w of the same head, only roughly aligned: it is registered rigidly. With it both
        displacements include a smooth shared part that the pair alone does not determine. They are then not exact
        opposites, and `fieldmap_hz` is half their difference.
    diffusion : two Tensor, (i, j, k), optional
        From `mean_diffusion`, each aligned to the b=0 images of its blip, in their intensities. They have another
        contrast and less noise than a few b=0 images, and are weighted by their noise.

    Returns
    -------
    Distortion
        `poses[0]` is the identity. Translation of the head along the phase-encoding axis has the same effect as a
        constant field: the centre of the mask is assumed not to move along that axis, and the constant is part of the
        field. `after` and `dwiref` are Jacobian-modulated; `dwiref` is the mean of both, in the intensities of blip 0.

    Raises
    ------
    SettingsError
        If the method is not "auto" or "drbuddi", or the blips are not a pair.
    InputError
        If the images do not fit the grid, or one is empty.

    References
    ----------
    doi 10.1016/j.neuroimage.2014.11.042 (DRBUDDI), doi 10.1016/S1053-8119(03)00336-7 (field from two blips),
    doi 10.1109/42.158935 (equal mass along lines)
    """
    encodings = check_pair(blips, b0s, grid, mask, settings)
    before = tuple(finite_mean(b) for b in b0s)
    axis, scales = encodings[0].axis, _scales(encodings)
    order = [*(a for a in range(3) if a != axis), axis]
    brain = (mask.data.to(before[0].device) > 0.5).permute(order).contiguous()
    units = [_brightness(b, mask) for b in before]
    compared_images = [before, diffusion] if _has_signal(diffusion, grid, mask) else [before]
    normalised = [_normalised(both, units, mask, order) for both in compared_images]
    pairs = _pyramid(normalised, grid.permuted(order), brain, scales)
    state, trace, notes = _estimate(pairs)
    if structural is not None:
        state, rows, note = _with_structural(pairs[-1], state, structural)
        trace, notes = [*trace, *rows], (*notes, note)
    compared = compare(pairs[-1], state)
    after = [u * v * j for u, v, j in zip(units, compared.values, compared.jacobians, strict=True)]
    gain = units[0] / units[1]  # the trace is in units of each image's own brightness
    mean = (after[0] + float(np.exp(state.gain)) * gain * after[1]) / 2

    def to_grid(data: torch.Tensor) -> torch.Tensor:
        return data.permute(np.argsort(order).tolist()).contiguous()

    field = to_grid(state.field)
    direction = torch.as_tensor(grid.directions[:, axis], dtype=torch.float32, device=field.device)
    return Distortion(
        poses=np.stack([np.eye(4), state.pose]),
        fields=tuple(
            DisplacementField(to_grid(u) * direction[:, None, None, None], grid) for u in state.displacements(scales)
        ),
        fieldmap_hz=fieldmap_hz(field, grid, encodings),
        dwiref=Volume(to_grid(mean), grid),
        before=tuple(Volume(b, grid) for b in before),
        after=tuple(Volume(to_grid(a), grid) for a in after),
        trace=[{**row, "gain": gain * row["gain"]} if "gain" in row else row for row in trace],
        method="drbuddi",
        notes=notes,
        diffusion=len(compared_images) > 1,
    )


def mean_diffusion(dwi: DWI, motions: tuple[Motion, ...]) -> tuple[torch.Tensor, ...]:
    """Mean diffusion-weighted image of each blip of a series, aligned to its b=0 reference.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    motions : tuple of Motion
        Of each blip that has volumes in `dwi`, in the order of blips.

    Returns
    -------
    two Tensor, (i, j, k), or none
        Weighted mean of the volumes selected by `low_b_pairs`. The weight is the mean signal in the brain, because
        noise is a smaller part of bright volumes. Empty if no volumes are selected, or if eddy currents were not
        estimated: like the field, they displace volumes of opposite phase encoding relative to each other.
    """
    usable = len(motions) == 2 and all(motion.eddy is not None for motion in motions)
    pairs = low_b_pairs(dwi.bvals, dwi.bvecs, dwi.blip, dwi.is_b0) if usable else []
    inside, total = motions[0].mask.numpy() > 0.5, 0.0
    means = tuple(torch.zeros(dwi.grid.shape) for _ in motions)
    for pair in pairs:
        images = [_aligned(dwi, motion, v) for motion, v in zip(motions, pair, strict=True)]
        weight = max(0.0, float(images[0][inside].mean()))
        total += weight
        for mean, image in zip(means, images, strict=True):
            mean.add_(image, alpha=weight)
    return tuple(mean / total for mean in means) if total > 0 else ()


def check_pair(
    blips: tuple[Blip, ...], b0s: tuple[torch.Tensor, ...], grid: Grid, mask: Volume, settings: DistortionSettings
) -> tuple[PhaseEncoding, PhaseEncoding]:
    """Phase encodings of both blips; parameters and errors as in `correct_distortion`."""
    if settings.method not in ("auto", "drbuddi"):
        raise SettingsError(f"--sdc-method {settings.method} does not correct distortion; use auto or drbuddi")
    if len(blips) != 2 or len(b0s) != 2:
        raise SettingsError(f"blip-up/blip-down correction needs two phase encodings; found {len(blips)}")
    first, second = blips[0].pe, blips[1].pe
    if first is None or second is None:
        raise InputError("a blip has no PhaseEncodingDirection; add it to its sidecar, or use --sdc-method none")
    if first.axis != second.axis or first.polarity == second.polarity:
        raise SettingsError(
            f"phase encodings {first.direction} and {second.direction} are not opposite; correction needs both "
            "polarities of one axis, such as j and j-"
        )
    if (first.readout_time is None) != (second.readout_time is None):
        raise InputError("only one of the two blips has a TotalReadoutTime; give both or neither")
    for pe in (first, second):
        if pe.readout_time is not None and not pe.readout_time > 0:
            raise InputError(f"TotalReadoutTime of {pe.direction} is {pe.readout_time}; it must be above 0 s")
    for blip, volumes in zip(blips, b0s, strict=True):
        if volumes.ndim != 4 or len(volumes) < 1 or tuple(volumes.shape[1:]) != grid.shape:
            raise InputError(f"b=0 images of blip {blip.name} are {tuple(volumes.shape)}; expected (m, *{grid.shape})")
        if not float(torch.nan_to_num(volumes.float()).abs().max()) > 0:
            raise InputError(f"b=0 images of blip {blip.name} are empty; check the files of this phase encoding")
    if tuple(mask.data.shape) != grid.shape or not bool((mask.data > 0.5).any()):
        raise InputError(
            f"the brain mask is empty or has shape {tuple(mask.data.shape)}; expected a non-empty mask of {grid.shape}"
        )
    return first, second


def fieldmap_hz(field: torch.Tensor, grid: Grid, encodings: tuple[PhaseEncoding, PhaseEncoding]) -> Volume | None:
    """Off-resonance field in Hz of a field (i, j, k) in mm at the mean readout time; None if that is unknown."""
    first, second = (pe.readout_time for pe in encodings)
    if first is None or second is None:
        return None
    return Volume(field / (float(grid.voxel_sizes[encodings[0].axis]) * ((first + second) / 2)), grid)


def finite_mean(volumes: torch.Tensor) -> torch.Tensor:
    """Mean of volumes (m, i, j, k), with non-finite values replaced by zero."""
    return torch.nan_to_num(volumes.float(), posinf=0.0, neginf=0.0).mean(0)


def _aligned(dwi: DWI, motion: Motion, volume: int) -> torch.Tensor:
    """A volume (i, j, k) of the series resampled onto the b=0 reference of its blip."""
    row = int(np.flatnonzero(motion.volumes == volume)[0])
    eddy = None if motion.eddy is None else motion.eddy.take(np.array([row]))
    image = torch.nan_to_num(motion.with_replaced_slices(row, dwi.data[volume].cpu()), posinf=0.0, neginf=0.0)
    return warp_volume(image, dwi.grid, dwi.grid, motion.transforms[row], eddy=eddy)


def _has_signal(diffusion: tuple[torch.Tensor, ...], grid: Grid, mask: Volume) -> bool:
    """Whether there are two diffusion-weighted images with signal in the brain."""
    for image in diffusion:
        if tuple(image.shape) != grid.shape:
            raise InputError(f"a mean diffusion-weighted image is {tuple(image.shape)}; expected {grid.shape}")
    return len(diffusion) == 2 and all(float(d[mask.data.to(d.device) > 0.5].median()) > 0 for d in diffusion)


def _brightness(image: torch.Tensor, mask: Volume) -> float:
    """Median intensity of the brain, or the largest absolute intensity if that is not positive."""
    median = float(image[mask.data.to(image.device) > 0.5].median())
    return median if median > 0 else float(image.abs().max())


def _normalised(both: tuple[torch.Tensor, ...], units: list[float], mask: Volume, order: list[int]) -> Images:
    """Images of both blips with their axes in `order`, scaled so that the brain of the first is about 1.

    `units` is the brightness of the b=0 images of both blips. Dividing by it keeps their ratio of gains.
    """
    relative = _brightness(both[0], mask) / units[0]
    first, second = (b.permute(order).contiguous() / (u * relative) for b, u in zip(both, units, strict=True))
    return first, second


def _scales(encodings: tuple[PhaseEncoding, PhaseEncoding]) -> tuple[float, float]:
    """Displacement in each blip per unit of field."""
    times = [1.0 if pe.readout_time is None else pe.readout_time for pe in encodings]
    mean = (times[0] + times[1]) / 2
    first, second = (pe.polarity * t / mean for pe, t in zip(encodings, times, strict=True))
    return first, second


def _pyramid(images: list[Images], grid: Grid, brain: torch.Tensor, scales: tuple[float, float]) -> list[Pair]:
    """The pair at every pyramid level, coarsest first; `images` are b=0, then further contrasts."""
    finest = float(np.prod(grid.voxel_sizes) ** (1 / 3))
    steps = max(0, round(float(np.log2(COARSEST_MM / finest))))
    centre = grid.to_world(np.argwhere(brain.cpu().numpy()).mean(0))
    pairs = []
    for spacing in np.geomspace(COARSEST_MM, finest, steps + 1)[:-1]:
        coarse = grid.at_spacing(tuple(np.maximum(grid.voxel_sizes, float(spacing))))
        reduced = [(_downsampled(a, grid, coarse), _downsampled(b, grid, coarse)) for a, b in images]
        coarse_brain = _downsampled(brain.float(), grid, coarse) > 0.5
        pairs.append(make_pair(reduced[0], coarse_brain, coarse, scales, centre, reduced[1:]))
    return [*pairs, make_pair(images[0], brain, grid, scales, centre, images[1:])]


def _downsampled(image: torch.Tensor, grid: Grid, coarse: Grid) -> torch.Tensor:
    ratio = coarse.voxel_sizes / grid.voxel_sizes
    widths = (0.5 * np.sqrt(np.maximum(ratio**2 - 1, 0))).tolist()
    return resized(gaussian(image[None], widths)[0], coarse.shape)


def _estimate(pairs: list[Pair]) -> tuple[State, list[dict[str, float]], tuple[str, ...]]:
    """Final state, trace, and notes, from the pairs of all pyramid levels."""
    state, converged = _initial_state(pairs[0]), True
    trace: list[dict[str, float]] = []
    for number, pair in enumerate(pairs):
        if number:
            pair = expecting(pair, pairs[number - 1], state.field)
        state = _shrink_until_unfolded(pair, replace(state, field=resized(state.field, pair.grid.shape)))
        rows, state, converged = _minimise(pair, state)
        trace += [{"level": number, **row} for row in rows]
    note = f"the distortion field had not fully converged after {MAX_STEPS} iterations at the finest pyramid level"
    return state, trace, () if converged else (note,)


def _with_structural(pair: Pair, state: State, structural: Volume) -> tuple[State, list[dict[str, float]], str]:
    """The state with the displacement shared by both blips, its trace, and a note."""
    compared = compare(pair, state)
    (v0, v1), (j0, j1) = compared.values, compared.jacobians
    image = (v0 * j0 + float(np.exp(state.gain)) * v1 * j1) / 2
    brain = Volume(pair.brain.float(), pair.grid)
    fit = register_linear(structural.to("cpu"), Volume(image, pair.grid).to("cpu"), fixed_mask=brain.to("cpu"))
    aligned = resample_onto(structural.data[None].float().to(image.device), structural.grid, pair.grid, fit.matrix)[0]
    median = aligned[pair.brain].median().clamp(min=1e-6)
    shared, rows = common_displacement(image, aligned / median, pair.brain, pair.grid)
    lines = line_coefficients(state.field)
    shifted, _, inside = sample_lines(lines, shared / float(pair.grid.voxel_sizes[2]))
    updated = replace(state, field=torch.where(inside > 0, shifted, state.field), shared=shared)
    if is_folded(pair, updated, compare(pair, updated)):
        return state, [], "the structural image was not used, because its displacement would have folded the image"
    size = shared[pair.brain].abs()
    note = (
        f"the structural image displaced both blips together by {float(size.mean()):.2f} mm on average and at most "
        f"{float(size.max()):.2f} mm along the phase-encoding axis"
    )
    return updated, [{"level": -1, **row} for row in rows], note


def _initial_state(pair: Pair) -> State:
    """Smoothed field of equal mass along lines, or a zero field, whichever has the lower cost."""
    zero = State(torch.zeros_like(pair.line_splines), np.eye(4), 0.0)
    compared = compare(pair, zero)
    first, second = (v.clamp(min=0) for v in compared.values)
    field = equal_mass_field(first, second, pair.scales) * float(pair.grid.voxel_sizes[2])
    mass = (first + second).sum(2, keepdim=True).expand_as(field)
    widths = (INITIAL_SMOOTHING_MM / pair.grid.voxel_sizes).tolist()
    blurred, total = gaussian(torch.stack([field * mass, mass]).contiguous(), widths)
    field = blurred / (total + 1e-3 * float(total.max()) + 1e-12)
    ratio = first[pair.brain].mean() / second[pair.brain].mean().clamp(min=1e-6)
    gain = float(np.log(float(ratio.clamp(0.05, 20))))
    candidates = [_shrink_until_unfolded(pair, State(f, np.eye(4), gain)) for f in (zero.field, field)]
    limits = outlier_limits(pair, compared)
    return min(candidates, key=lambda s: cost(pair, s, compare(pair, s), limits))


def _shrink_until_unfolded(pair: Pair, state: State) -> State:
    """The state with its field scaled down until nothing folds."""
    while is_folded(pair, state, compare(pair, state)):
        state = replace(state, field=0.9 * state.field)
    return state


def _minimise(pair: Pair, state: State) -> tuple[list[dict[str, float]], State, bool]:
    """Gauss-Newton steps at one pyramid level: trace, final state, and whether it converged."""
    rows: list[dict[str, float]] = []
    compared = compare(pair, state)
    for iteration in range(MAX_STEPS):
        limits = outlier_limits(pair, compared)
        cost_before = cost(pair, state, compared, limits)
        normal, right_hand_side = gauss_newton_equations(pair, state, compared, limits)
        field, pose, inner_iterations = conjugate_gradients(normal, right_hand_side, pair.brain)
        length, parameters = 1.0, pose.double().cpu().numpy()
        trial = apply_step(pair, state, field, parameters)
        compared = compare(pair, trial)
        while not (cost_after := cost(pair, trial, compared, limits)) < cost_before:
            length /= 2
            if length < 0.02:
                return rows, state, True
            trial = apply_step(pair, state, length * field, length * parameters)
            compared = compare(pair, trial)
        distance = displacement_between(pair, state, trial)
        state = trial
        row = {"iteration": iteration, "cost": cost_after, "step": length, "inner": inner_iterations}
        rows.append({**row, "change_mm": distance, "outlier": limits[0], "gain": float(np.exp(state.gain))})
        if distance < CONVERGED_MM:
            return rows, state, True
    return rows, state, False
