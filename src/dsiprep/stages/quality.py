"""Quality metrics: motion, neighbouring DWI correlation, contrast-to-noise ratio, discontinuous slices."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Coregistration,
    Denoised,
    Distortion,
    Motion,
    Preprocessed,
    Quality,
    eddy_currents,
)
from dsiprep.data.transform import EDDY_TERMS
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.motion.framewise_displacement import framewise_displacement
from dsiprep.ops.motion.series_qc import contrast_to_noise, discontinuous_slices, shore_projection, values_inside
from dsiprep.ops.qspace.tensor import main_directions, tensor_projection
from dsiprep.stages.qspace_quality import measure_qspace, qspace_row

METHODS = {
    "quality": (
        "Framewise displacement was computed from translations and from rotations on a sphere of 50 mm radius "
        "[@power2012]. Neighbouring DWI correlation [@yeh2019], DWI contrast, the number of discontinuous slices and "
        "the coherence index of fibre directions were computed as defined in cs_dmri, before and after preprocessing. "
        "The contrast-to-noise ratio is the standard deviation of the model's signal over that of its residual "
        "[@bastiani2019]; temporal SNR was computed from the b=0 volumes."
    ),
}

CHUNK = 20_000  # voxels per batch
SUMMARY = ("median", "minimum", "maximum", "mean", "standard_deviation")
CNR_SUMMARY = ("mean", "median", "standard_deviation")
LEAST_B0S = 3  # for temporal SNR; the standard deviation of two values is as uncertain as it is large
MAX_TENSOR_B = 3000.0  # s/mm²; above it, the signal is too non-Gaussian for fibre directions from a tensor

Row = dict[str, float | str | None]


def measure_quality(
    unit_name: str,
    acquired: Acquired,
    denoised: Denoised,
    motions: tuple[Motion, ...],
    distortion: Distortion | None,
    coregistration: Coregistration,
    anatomy: Anatomy,
    preprocessed: Preprocessed,
    before: tuple[Row, dict[str, np.ndarray]] | None = None,
) -> Quality:
    """Compute the quality metrics of one unit before and after preprocessing.

    Parameters
    ----------
    unit_name : str
        Prefix of the outputs, from which the BIDS entities are parsed.
    before : (dict, dict of ndarray), optional
        `measure_acquired` of the same series; computed by default.

    Returns
    -------
    Quality
        `table` has the columns of image_qc.tsv, with None where a metric is not available. `confounds` has the columns
        of the confounds table, with `run` (index into the unit's runs) instead of `original_file` and one row per
        acquired volume; volumes that were merged share b-value and b-vector. Translations in mm, rotation vectors about
        the image centre in radians, RAS+. Framewise displacement (FD) is NaN in the first volume of a run.
    """
    dwi = preprocessed.dwi.to("cpu")
    inside = preprocessed.mask.numpy() > 0.5
    table, changes = before or measure_acquired(acquired, denoised, motions)
    confounds = _confounds(acquired, motions, dwi, preprocessed.sources) | changes
    cnr, tsnr = _cnr(dwi, preprocessed.mask, motions[0].model), _tsnr(dwi, preprocessed.mask)
    table = table | _series_metrics("t1_", dwi, inside, 2) | _motion_summary(confounds, acquired.dwi.run)
    table |= _dice_overlaps(anatomy, preprocessed)
    if cnr is not None:
        table |= {f"CNR0_{name}": value for name, value in _summary(cnr.numpy()[inside]).items() if name in CNR_SUMMARY}
    if distortion is not None and distortion.fieldmap_hz is not None:
        table |= _fieldmap_metrics(distortion.fieldmap_hz, motions[0].mask)
    qspace = measure_qspace(dwi, preprocessed.mask, _prescribed(acquired, preprocessed), denoised.noise)
    table |= qspace_row(qspace, ~dwi.is_b0)
    table["coregistration_score"] = float(coregistration.score_after)
    table |= _file_entities(unit_name)
    slices = _all_slice_z(motions, len(acquired.dwi))
    notes = (*_notes(motions, distortion), *_missing_maps(dwi, cnr), *_coverage_note(table))
    return Quality(table, confounds, slices, cnr, tsnr, notes, qspace)


def measure_acquired(
    acquired: Acquired, denoised: Denoised, motions: tuple[Motion, ...]
) -> tuple[Row, dict[str, np.ndarray]]:
    """Metrics of a series as acquired, for `Quality.table`, and what denoising changed, for `Quality.confounds`."""
    row = _series_metrics("raw_", acquired.dwi.to("cpu"), acquired.mask.numpy() > 0.5, motions[0].slice_axis)
    return row, _denoising_confounds(acquired, denoised)


def _prescribed(acquired: Acquired, preprocessed: Preprocessed) -> tuple[np.ndarray, np.ndarray]:
    """b-values and b-vectors of the preprocessed volumes as they were prescribed; the first of those merged."""
    first = [members[0] for members in preprocessed.sources] or list(range(len(acquired.dwi)))
    return acquired.dwi.bvals[first], acquired.dwi.bvecs[first]


def measure_joined(
    name: str,
    parts: tuple[Quality, ...],
    runs: tuple[np.ndarray, ...],
    anatomy: Anatomy,
    preprocessed: Preprocessed,
    model: str,
) -> Quality:
    """Compute the quality metrics of a series joined from several units.

    Parameters
    ----------
    name : str
        Prefix of the output.
    parts : tuple of Quality
        Results of the units, in order; their confounds are concatenated.
    runs : tuple of ndarray of int
        Run index of every volume of each unit; runs are renumbered consecutively across units.
    anatomy : Anatomy
    preprocessed : Preprocessed
        From `dsiprep.stages.joined_series.join`.
    model : str
        Signal model of the motion correction.

    Returns
    -------
    Quality
        `raw_num_*` metrics are summed over the units; all other raw metrics are averaged.
    """
    shared = [column for column in parts[0].confounds if all(column in part.confounds for part in parts)]
    confounds = {column: np.concatenate([part.confounds[column] for part in parts]) for column in shared}
    offsets = np.cumsum([0, *(int(run.max()) + 1 for run in runs)])
    confounds["run"] = np.concatenate([run + offset for run, offset in zip(runs, offsets, strict=False)])
    dwi = preprocessed.dwi.to("cpu")
    for volume, members in enumerate(preprocessed.sources):
        for axis, column in enumerate(("grad_x", "grad_y", "grad_z")):
            confounds[column][list(members)] = dwi.bvecs[volume, axis]
        confounds["bval"][list(members)] = dwi.bvals[volume]
    cnr, tsnr = _cnr(dwi, preprocessed.mask, model), _tsnr(dwi, preprocessed.mask)
    table = _combine_raw(parts) | _series_metrics("t1_", dwi, preprocessed.mask.numpy() > 0.5, 2)
    table |= _motion_summary(confounds, confounds["run"]) | _dice_overlaps(anatomy, preprocessed)
    table |= _file_entities(name)
    width = max(part.slice_z.shape[1] for part in parts)
    padded = [np.pad(p.slice_z, ((0, 0), (0, width - p.slice_z.shape[1])), constant_values=np.nan) for p in parts]
    return Quality(
        table, confounds, np.concatenate(padded), cnr, tsnr, (*_missing_maps(dwi, cnr), *_coverage_note(table))
    )


def _combine_raw(parts: tuple[Quality, ...]) -> Row:
    """Raw metrics of a joined series: counts are summed and all others averaged over its units."""
    row: Row = {}
    for name in parts[0].table:
        values = [part.table.get(name) for part in parts]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if name.startswith("raw_") and len(numbers) == len(values):
            row[name] = sum(numbers) if name.startswith("raw_num_") else sum(numbers) / len(numbers)
    return row


def _confounds(
    acquired: Acquired, motions: tuple[Motion, ...], dwi: DWI, sources: tuple[tuple[int, ...], ...]
) -> dict[str, np.ndarray]:
    """Columns of the confounds table, one row per acquired volume."""
    count = len(acquired.dwi)
    parameters, r2, xcorr = np.zeros((count, 6)), np.full(count, np.nan), np.full(count, np.nan)
    for motion in motions:
        rigid = rigid_parameters(motion.transforms, motion.dwiref.grid.centre)
        parameters[motion.volumes] = rigid[:, [3, 4, 5, 0, 1, 2]]
        r2[motion.volumes], xcorr[motion.volumes] = motion.r2, motion.xcorr
    columns = {"framewise_displacement": framewise_displacement(parameters, acquired.dwi.run)}
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    columns |= dict(zip(names, parameters.T, strict=True))
    eddy = eddy_currents(motions, count)
    if eddy is not None:
        columns |= {f"eddy_{name}": eddy.coefficients[:, term] for term, name in enumerate(EDDY_TERMS)}
    if acquired.drift is not None:
        columns["signal_drift"] = acquired.drift.gains
    columns |= {"hmc_r2": r2, "hmc_xcorr": xcorr, "run": acquired.dwi.run.astype(int)}
    columns |= _b0_shift(motions, count)
    row = np.arange(count)
    for volume, members in enumerate(sources):
        row[list(members)] = volume
    columns |= dict(zip(("grad_x", "grad_y", "grad_z"), dwi.bvecs[row].T, strict=True))
    columns["bval"] = dwi.bvals[row]
    return columns


def _b0_shift(motions: tuple[Motion, ...], count: int) -> dict[str, np.ndarray]:
    """Displacement (mm) of each volume's range of b-values against b=0, as measured and as applied, if measured."""
    measured, applied = np.full(count, np.nan), np.zeros(count)
    for motion in motions:
        if motion.b0_shift is not None:
            measured[motion.volumes], applied[motion.volumes] = motion.b0_shift.measured, motion.b0_shift.applied
    return {"b0_shift_measured": measured, "b0_shift_applied": applied} if np.isfinite(measured).any() else {}


def _denoising_confounds(acquired: Acquired, denoised: Denoised) -> dict[str, np.ndarray]:
    """Per volume: mean brain intensity before and after denoising, and the mean absolute change relative to before."""
    if denoised.noise is None:
        return {}
    brain = np.flatnonzero(acquired.mask.numpy() > 0.5)
    rows = []
    for before, after in zip(acquired.dwi.data.cpu().numpy(), denoised.dwi.data.cpu().numpy(), strict=True):
        a, b = before.ravel()[brain], after.ravel()[brain]
        rows.append([a.mean(), b.mean(), np.abs(b - a).mean() / max(a.mean(), 1e-12)])
    return dict(zip(("denoise_pre", "denoise_post", "denoise_change"), np.array(rows, float).T, strict=True))


def _series_metrics(prefix: str, dwi: DWI, inside: np.ndarray, slice_axis: int) -> Row:
    """Metrics of one series, under the names that DSI Studio and QSIPrep use."""
    from cs_dmri import GradientTable, qc

    data = dwi.data.numpy()
    brain = values_inside(data, inside).T[:, None, None]  # cheaper than passing a mask to cs_dmri
    table = GradientTable(dwi.bvals, dwi.bvecs, b0_threshold=dwi.b0_threshold)
    row: Row = {f"dimension_{axis}": n for axis, n in zip("xyz", dwi.grid.shape, strict=True)}
    row |= {f"voxel_size_{axis}": float(s) for axis, s in zip("xyz", dwi.grid.voxel_sizes, strict=True)}
    row["max_b"] = float(dwi.bvals.max())
    row["neighbor_corr"] = qc.neighboring_dwi_correlation(np.moveaxis(data, 0, -1), table)
    row["masked_neighbor_corr"] = qc.neighboring_dwi_correlation(brain, table)
    row["dwi_contrast"] = qc.dwi_contrast_ratio(brain, table)
    row["num_bad_slices"] = int(discontinuous_slices(data, inside, slice_axis).sum())
    row["num_directions"] = int((~dwi.is_b0).sum())
    row["coherence_index"] = _coherence(dwi, inside)
    return {prefix + name: value for name, value in row.items()}


def _coherence(dwi: DWI, inside: np.ndarray) -> float | None:
    """FA-weighted fraction of voxels whose fibre direction continues into the next voxel along it."""
    from cs_dmri import qc

    low_b = dwi.bvals <= MAX_TENSOR_B
    used = low_b if (low_b & ~dwi.is_b0).sum() >= 12 else np.ones(len(dwi), bool)
    if (used & ~dwi.is_b0).sum() < 6 or not inside.any():
        return None
    signals = values_inside([dwi.data[int(v)].numpy() for v in np.flatnonzero(used)], inside)
    fa, direction = main_directions(signals, dwi.bvals[used], dwi.bvecs[used])
    maps = np.zeros((*inside.shape, 4), np.float32)
    maps[inside] = np.column_stack([fa, direction])
    coherence = qc.fixel_coherence(maps[..., 1:], maps[..., 0], inside, dwi.grid.affine, world_directions=True)
    return coherence["coherence"]


def _cnr(dwi: DWI, mask: Volume, model: str) -> Volume | None:
    """Contrast-to-noise ratio of the diffusion-weighted volumes: tensor if that is the motion model, else 3dSHORE."""
    weighted, tensor = ~dwi.is_b0, "tensor" in model
    if weighted.sum() < 14:
        return None
    inside = mask.numpy() > 0.5
    brain = np.flatnonzero(inside)
    data, cnr = dwi.data.numpy().reshape(len(dwi), -1), np.zeros(inside.size, np.float32)
    if tensor:
        projection, dof = tensor_projection(dwi.bvals, dwi.bvecs)
    else:
        projection, dof = shore_projection(dwi.q, data[:, brain[:: max(1, len(brain) // CHUNK)]])
    projection = projection.astype(np.float32)
    for start in range(0, len(brain), CHUNK):
        part = brain[start : start + CHUNK]
        signals = data[:, part]
        if tensor:
            peak = np.maximum(signals.max(0), 1e-6)
            fitted = np.exp(np.minimum(projection @ np.log(np.maximum(signals / peak, 1e-3)), 1.0)) * peak
        else:
            fitted = projection @ signals
        cnr[part] = contrast_to_noise(signals[weighted], fitted[weighted], dof * weighted.mean())
    return Volume(torch.from_numpy(cnr.reshape(inside.shape)), dwi.grid)


def _tsnr(dwi: DWI, mask: Volume) -> Volume | None:
    """Temporal SNR: mean over standard deviation of the b=0 volumes in the brain; None with too few of them."""
    b0 = dwi.data[torch.as_tensor(np.flatnonzero(dwi.is_b0))]
    if len(b0) < LEAST_B0S:
        return None
    deviation = b0.std(0)
    ratio = torch.where(deviation > 0, b0.mean(0) / deviation.clamp(min=1e-12), 0.0)
    return Volume(ratio * (mask.data.cpu() > 0.5), dwi.grid)


def _motion_summary(confounds: dict[str, np.ndarray], run: np.ndarray) -> Row:
    translations = np.stack([confounds[f"trans_{axis}"] for axis in "xyz"])
    rotations = np.stack([confounds[f"rot_{axis}"] for axis in "xyz"])
    fd, same_run = confounds["framewise_displacement"], run[1:] == run[:-1]
    fd = fd[np.isfinite(fd)]
    return {
        "mean_fd": float(fd.mean()) if len(fd) else None,
        "max_fd": float(fd.max()) if len(fd) else None,
        "max_rotation": float(np.abs(rotations).max()),
        "max_translation": float(np.abs(translations).max()),
        "max_rel_rotation": float(np.abs(np.diff(rotations))[:, same_run].max(initial=0)),
        "max_rel_translation": float(np.abs(np.diff(translations))[:, same_run].max(initial=0)),
    }


def _dice_overlaps(anatomy: Anatomy, preprocessed: Preprocessed) -> Row:
    """Dice overlaps under QSIPrep's column names; despite their names, 1 is perfect overlap."""
    row: Row = {"t1_dice_distance": None, "mni_dice_distance": None}
    row |= _uncovered_brain(anatomy, preprocessed)
    if anatomy.modality != "none":
        structural = resample_onto(anatomy.mask.data[None].float().cpu(), anatomy.mask.grid, preprocessed.mask.grid)[0]
        row["t1_dice_distance"] = _dice(structural.numpy() > 0.5, preprocessed.mask.numpy() > 0.5)
    template, warped = anatomy.template_image, anatomy.warped
    if template is not None and warped is not None and template.grid.matches(warped.grid):
        row["mni_dice_distance"] = _dice(template.numpy() > 0, warped.numpy() > 0)
    return row


def _uncovered_brain(anatomy: Anatomy, preprocessed: Preprocessed) -> Row:
    """Volume (ml) and fraction of the structural brain where fewer than half of the volumes have data."""
    row: Row = {"uncovered_brain_ml": None, "uncovered_brain_fraction": None}
    if anatomy.modality == "none" or preprocessed.coverage is None:
        return row
    grid, brain = anatomy.mask.grid, np.argwhere(anatomy.mask.numpy() > 0.5)
    covered, points = preprocessed.coverage, grid.to_world(brain)
    nearest = np.clip(np.rint(covered.grid.to_voxels(points)).astype(int), 0, np.asarray(covered.grid.shape) - 1)
    uncovered = (covered.numpy()[tuple(nearest.T)] < 0.5) | ~covered.grid.contains(points)
    ml = float(uncovered.sum() * np.prod(grid.voxel_sizes) / 1000)
    return {"uncovered_brain_ml": ml, "uncovered_brain_fraction": float(uncovered.mean()) if len(brain) else 0.0}


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / max(1, first.sum() + second.sum()))


def _summary(values: np.ndarray) -> dict[str, float | None]:
    if not values.size:
        return dict.fromkeys(SUMMARY)
    return {
        "median": float(np.median(values)),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "mean": float(values.mean(dtype=float)),
        "standard_deviation": float(values.std(dtype=float)),
    }


def _fieldmap_metrics(fieldmap: Volume, mask: Volume) -> Row:
    """Statistics of the off-resonance field in the brain, or of the whole map if the mask is on another grid."""
    values = fieldmap.numpy()
    if fieldmap.grid.matches(mask.grid) and (mask.numpy() > 0.5).any():
        values = values[mask.numpy() > 0.5]
    return {f"fieldmap_hz_{name}": value for name, value in _summary(values.ravel()).items()}


def _all_slice_z(motions: tuple[Motion, ...], count: int) -> np.ndarray:
    """Slice z-scores of all volumes, (volumes, slices); NaN without a motion estimate, and as padding."""
    slices = np.full((count, max(motion.slice_z.shape[1] for motion in motions)), np.nan)
    for motion in motions:
        slices[motion.volumes, : motion.slice_z.shape[1]] = motion.slice_z
    return slices


def _file_entities(unit_name: str) -> Row:
    """`file_name` and the BIDS entities in it."""
    entities = dict(part.split("-", 1) for part in unit_name.split("_") if "-" in part)
    columns = {"subject_id": "sub", "session_id": "ses", "task_id": "task", "dir_id": "dir", "acq_id": "acq"}
    row: Row = {"file_name": f"{unit_name}_space-ACPC_desc-preproc_dwi.nii.gz"}
    row |= {column: entities.get(entity) for column, entity in columns.items()}
    return row | {"space_id": "ACPC", "rec_id": entities.get("rec"), "run_id": entities.get("run")}


def _coverage_note(table: Row) -> tuple[str, ...]:
    ml, fraction = table["uncovered_brain_ml"], table["uncovered_brain_fraction"]
    if not isinstance(ml, float) or not isinstance(fraction, float) or ml == 0:
        return ()
    return (f"The series does not cover {ml:.1f} ml ({fraction:.1%}) of the structural brain.",)


def _missing_maps(dwi: DWI, cnr: Volume | None) -> tuple[str, ...]:
    """Why a series has no map of temporal SNR or of the contrast-to-noise ratio."""
    notes, count = [], int(dwi.is_b0.sum())
    if count < LEAST_B0S:
        notes.append(
            f"Temporal SNR is not available: {count} b=0 volume{' is' if count == 1 else 's are'} too few for a "
            f"standard deviation over time; {LEAST_B0S} are the least."
        )
    if cnr is None:
        notes.append("The contrast-to-noise map is not available: there are too few diffusion-weighted volumes.")
    return tuple(notes)


def _notes(motions: tuple[Motion, ...], distortion: Distortion | None) -> tuple[str, ...]:
    notes = []
    if len(motions) > 1:
        notes.append(
            "Motion is relative to the b=0 reference of each phase encoding; framewise displacement (FD) restarts with "
            "every run."
        )
    if distortion is not None and distortion.fieldmap_hz is None:
        notes.append("The off-resonance field in Hz is not available: the readout time is unknown.")
    return tuple(notes)
