"""Meaning of the columns of image_qc.tsv, for the sidecar of the table and for the report."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["column_descriptions", "column_meaning"]

MEANINGS = {
    "file_name": "The preprocessed series",
    "space_id": "Space of the preprocessed series",
    "neighbor_corr": "Neighbouring DWI correlation (NDC)",
    "masked_neighbor_corr": "NDC within the brain mask",
    "dwi_contrast": "NDC divided by the mean correlation of nearly perpendicular volumes, within the brain mask",
    "num_bad_slices": "Number of slices that deviate from the mean of their adjacent slices",
    "coherence_index": "Coherence of fibre directions between adjacent voxels (reduced by incorrect b-vectors)",
    "num_directions": "Number of diffusion-weighted volumes",
    "max_b": "Maximum b-value (s/mm²)",
    "dimension_x": "Number of voxels along the first voxel axis",
    "dimension_y": "Number of voxels along the second voxel axis",
    "dimension_z": "Number of voxels along the third voxel axis",
    "voxel_size_x": "Voxel size along the first voxel axis (mm)",
    "voxel_size_y": "Voxel size along the second voxel axis (mm)",
    "voxel_size_z": "Voxel size along the third voxel axis (mm)",
    "mean_fd": "Mean framewise displacement (mm)",
    "max_fd": "Maximum framewise displacement (mm)",
    "max_rotation": "Maximum rotation about any axis relative to the reference (rad)",
    "max_translation": "Maximum translation along any axis relative to the reference (mm)",
    "max_rel_rotation": "Maximum rotation about any axis between successive volumes (rad)",
    "max_rel_translation": "Maximum translation along any axis between successive volumes (mm)",
    "t1_dice_distance": "Dice coefficient of the diffusion and structural brain masks",
    "mni_dice_distance": "Dice coefficient of the normalised and template brain masks",
    "uncovered_brain_ml": "Structural brain where fewer than half of the volumes have data (ml)",
    "uncovered_brain_fraction": "Fraction of the structural brain where fewer than half of the volumes have data",
    "coregistration_score": "Similarity of the b=0 reference and the image it was coregistered to",
    "CNR0_mean": "Contrast-to-noise ratio of all b-values together, in the brain: mean",
    "CNR0_median": "Contrast-to-noise ratio of all b-values together, in the brain: median",
    "CNR0_standard_deviation": "Contrast-to-noise ratio of all b-values together, in the brain: standard deviation",
    "noise_floor": "Mean of pure noise in magnitude images over the median b=0 signal of the brain",
    "samples_at_noise_floor": "Fraction of samples of high b in the brain below two standard deviations of the noise",
    "prediction_error": "RMS difference of volumes from their prediction from the others, over the median b=0 signal",
    "prediction_error_max": "The largest such difference of one volume",
    "residual_noise": "Noise left in the preprocessed series by the model that predicts it, over the median b=0 signal",
    "antipodal_difference": "RMS difference of antipodal samples over that of noise alone; 1 is perfect agreement",
    "lattice_points": "Number of lattice points that were prescribed in q-space",
    "lattice_points_lost": "Lattice points that no sample lies within half a step of, as the head turned",
    "lattice_samples_turned_off": "Samples more than half a lattice step from their point, as the head turned",
    "lattice_offset_mean": "Mean distance of samples from their lattice points (lattice steps)",
    "lattice_offset_max": "Maximum distance of a sample from its lattice point (lattice steps)",
    "fieldmap_hz_median": "Off-resonance field in the brain (Hz): median",
    "fieldmap_hz_minimum": "Off-resonance field in the brain (Hz): minimum",
    "fieldmap_hz_maximum": "Off-resonance field in the brain (Hz): maximum",
    "fieldmap_hz_mean": "Off-resonance field in the brain (Hz): mean",
    "fieldmap_hz_standard_deviation": "Off-resonance field in the brain (Hz): standard deviation",
}
ENTITIES = {
    "subject_id": "sub",
    "session_id": "ses",
    "task_id": "task",
    "dir_id": "dir",
    "acq_id": "acq",
    "rec_id": "rec",
    "run_id": "run",
}
SERIES = {"raw": "as acquired", "t1": "preprocessed"}


def column_meaning(name: str) -> str:
    """Meaning of a column of image_qc.tsv; an empty string where it is not described."""
    if name in MEANINGS:
        return MEANINGS[name]
    if name in ENTITIES:
        return f"BIDS entity {ENTITIES[name]} of the preprocessed series"
    prefix, _, stem = name.partition("_")
    return f"{MEANINGS[stem]}, {SERIES[prefix]}" if prefix in SERIES and stem in MEANINGS else ""


def column_descriptions(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sidecar of the table: the description of each column."""
    return {name: {"Description": column_meaning(name)} for name in names}
