"""Susceptibility distortion from a blip-up/blip-down pair: the field, and the head motion between the blips.

The undistorted head is in its pose of blip 0, the series that is corrected. Its point x is found in blip b at
P_b x + s_b f(x) e_b, where e_b is the phase-encoding axis of the blip, fixed in the scanner, s_b its polarity times its
readout time and voxel size over the mean of both, and f the field in mm. Intensities are multiplied by the Jacobian
determinant of that map. Blip 1 stays on its own grid, so tilted planes and other voxels need no interpolation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

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
    Pair,
    State,
    apply_step,
    compare,
    cost,
    displacement_between,
    expecting,
    gauss_newton_equations,
    is_folded,
    outlier_limits,
)
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines
from dsiprep.ops.qspace.matching_gradients import low_b_pairs
from dsiprep.ops.registration.linear import register_linear
from dsiprep.settings import DistortionSettings
from dsiprep.stages.pair_geometry import PairGeometry, pair_geometry
from dsiprep.stages.pair_images import COARSEST_MM, brains_and_brightness, finite_mean, normalised, pair_at, pyramid

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

__all__ = [
    "METHODS",
    "check_pair",
    "coarse_misfit",
    "correct_distortion",
    "fieldmap_hz",
    "mean_diffusion",
]

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
        Opposite polarities of one phase-encoding axis, or two axes. Readout times may differ, or be unknown for both.
    b0s : two Tensor, (m, i, j, k)
        Aligned b=0 volumes of each blip, m >= 1.
    grid : Grid
        Of blip 0, and of blip 1 unless that has a grid of its own.
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
    geometry = check_pair(blips, b0s, grid, mask, settings)
    before = tuple(finite_mean(b) for b in b0s)
    brains, units = brains_and_brightness(before, geometry, mask)
    compared_images = [before, diffusion] if _has_signal(diffusion, geometry, brains) else [before]
    images = [normalised(both, units, mask, geometry) for both in compared_images]
    pairs = pyramid(images, geometry, brains)
    state, trace, notes = _estimate(pairs)
    if structural is not None:
        state, rows, note = _with_structural(pairs[-1], state, structural)
        trace, notes = [*trace, *rows], (*notes, note)
    compared = compare(pairs[-1], state)
    after = [u * v * j for u, v, j in zip(units, compared.values, compared.jacobians, strict=True)]
    gain = units[0] / units[1]  # the trace is in units of each image's own brightness
    total = after[0] + float(np.exp(state.gain)) * gain * after[1]
    mean = torch.where(compared.inside > 0, total / 2, total)  # one of them is 0 where only the other has data
    return Distortion(
        poses=np.stack([np.eye(4), state.pose]),
        fields=tuple(
            _along(geometry.direction(b), geometry.stored(u), grid)
            for b, u in enumerate(state.displacements(geometry.scales))
        ),
        fieldmap_hz=fieldmap_hz(geometry.stored(state.field), geometry),
        dwiref=Volume(geometry.stored(mean), grid),
        before=(Volume(before[0], grid), Volume(geometry.onto_first(before[1]), grid)),
        after=tuple(Volume(geometry.stored(a), grid) for a in after),
        trace=[{**row, "gain": gain * row["gain"]} if "gain" in row else row for row in trace],
        method="drbuddi",
        notes=notes,
        diffusion=len(compared_images) > 1,
    )


def coarse_misfit(blips: tuple[Blip, ...], b0s: tuple[torch.Tensor, ...], grid: Grid, mask: Volume) -> float:
    """Objective function of the pair at the coarsest pyramid level, where it is cheap; parameters as above."""
    geometry = check_pair(blips, b0s, grid, mask, DistortionSettings())
    before = tuple(finite_mean(b) for b in b0s)
    brains, units = brains_and_brightness(before, geometry, mask)
    pair = pair_at([normalised(before, units, mask, geometry)], geometry, brains, COARSEST_MM)
    rows = _minimise(pair, _initial_state(pair))[0]
    return rows[-1]["cost"] if rows else 0.0


def _along(direction: np.ndarray, displacement: torch.Tensor, grid: Grid) -> DisplacementField:
    unit = torch.as_tensor(direction, dtype=torch.float32, device=displacement.device)
    return DisplacementField(displacement * unit[:, None, None, None], grid)


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
) -> PairGeometry:
    """Geometry of both blips; parameters and errors as in `correct_distortion`."""
    if settings.method not in ("auto", "drbuddi"):
        raise SettingsError(f"--sdc-method {settings.method} does not correct distortion; use auto or drbuddi")
    if len(blips) != 2 or len(b0s) != 2:
        raise SettingsError(f"blip-up/blip-down correction needs two phase encodings; found {len(blips)}")
    geometry = pair_geometry(blips, grid)
    for blip, volumes, expected in zip(blips, b0s, geometry.grids, strict=True):
        if volumes.ndim != 4 or len(volumes) < 1 or tuple(volumes.shape[1:]) != expected.shape:
            raise InputError(
                f"b=0 images of blip {blip.name} are {tuple(volumes.shape)}; expected (m, *{expected.shape})"
            )
        if not float(torch.nan_to_num(volumes.float()).abs().max()) > 0:
            raise InputError(f"b=0 images of blip {blip.name} are empty; check the files of this phase encoding")
    if tuple(mask.data.shape) != grid.shape or not bool((mask.data > 0.5).any()):
        raise InputError(
            f"the brain mask is empty or has shape {tuple(mask.data.shape)}; expected a non-empty mask of {grid.shape}"
        )
    return geometry


def fieldmap_hz(field: torch.Tensor, geometry: PairGeometry) -> Volume | None:
    """Off-resonance field in Hz of a field (i, j, k) in mm; None without readout times."""
    return None if geometry.mm_per_hz is None else Volume(field / geometry.mm_per_hz, geometry.grids[0])


def _aligned(dwi: DWI, motion: Motion, volume: int) -> torch.Tensor:
    """A volume (i, j, k) of the series resampled onto the b=0 reference of its blip."""
    row = int(np.flatnonzero(motion.volumes == volume)[0])
    eddy = None if motion.eddy is None else motion.eddy.take(np.array([row]))
    image = torch.nan_to_num(motion.with_replaced_slices(row, dwi.data[volume].cpu()), posinf=0.0, neginf=0.0)
    return warp_volume(image, dwi.grid, dwi.grid, motion.transforms[row], eddy=eddy)


def _has_signal(diffusion: tuple[torch.Tensor, ...], geometry: PairGeometry, brains: tuple[torch.Tensor, ...]) -> bool:
    """Whether there are two diffusion-weighted images with signal in the brain."""
    for image, grid in zip(diffusion, geometry.grids, strict=False):
        if tuple(image.shape) != grid.shape:
            raise InputError(f"a mean diffusion-weighted image is {tuple(image.shape)}; expected {grid.shape}")
    return len(diffusion) == 2 and all(
        float(geometry.ordered(image, b)[brains[b]].median()) > 0 for b, image in enumerate(diffusion)
    )


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
