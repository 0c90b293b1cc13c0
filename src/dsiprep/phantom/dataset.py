"""Write the phantom as a BIDS dataset, with its ground truth in a separate folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.errors import OutputError
from dsiprep.ops.qspace.fibre_continuity import axis_frames, describe_frame
from dsiprep.phantom.gradient_coil import Coil, coefficient_text
from dsiprep.phantom.head import TEMPLATE, Head, make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.k_space import PHASE_TERMS, STATIC_PHASE, draw_phase, sample
from dsiprep.phantom.scanner import EDDY_TERMS, FIELD_OF_VIEW, READOUT_TIME, add_noise, noise_map
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import Session, plan_session, to_fsl
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import Tissue, fibre_image, make_tissue
from dsiprep.phantom.slice_acquisition import B0_LIMIT, MULTIBAND, REPETITION_TIME, slice_timing

PHASE_CYCLE = 4096  # integers of a stored phase image, as Siemens writes them
IDEAL_SLOPE = 1 / 8  # scaling of the ideal DWI, stored as integers
T1_WEIGHT = {"csf": 0.16, "wm": 0.9, "fluid": 0.14, "bone": 0.07, "marrow": 0.45, "fat": 0.9, "muscle": 0.42}
T1_SCALE = 700.0  # intensity of white matter
UNCORRECTED = ["ORIGINAL", "PRIMARY", "M", "ND"]  # ImageType of images with the effects of gradient nonlinearity
T1_FIELD_OF_VIEW = (200.0, 248.0, 240.0)


def make_phantom(out: Path, settings: PhantomSettings) -> Path:
    """Simulate a subject: the dataset in `out`/bids, the ground truth for `dsiprep.score` in `out`/truth.

    Parameters
    ----------
    out : Path
        Output folder, which must not contain `bids` or `truth`.
    settings : PhantomSettings

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    OutputError
        If `out` already contains a dataset.
    SettingsError, GradientError
        If the settings are invalid.
    """
    settings.check()
    out = Path(out)
    bids, truth = out / "bids", out / "truth"
    for folder in (bids, truth):
        if folder.exists():
            raise OutputError(f"{folder} already exists; remove it, or choose another folder for the phantom")
    table = load_scheme(settings.scheme)
    streams = np.random.default_rng(settings.seed).spawn(4)
    head = make_head(streams[0])
    session = plan_session(head, table, settings, streams[1])
    for folder in (bids / "sub-01" / "anat", bids / "sub-01" / "dwi", bids / "sub-01" / "fmap", truth):
        folder.mkdir(parents=True)
    try:
        _write_t1w(bids, truth, head, settings, streams[2], session.coil)
        _write_scans(bids, truth, head, session, settings, streams[3])
        _write_geometry(truth, head, session, settings)
        _write_descriptions(bids, settings)
    except BaseException:
        shutil.rmtree(bids, ignore_errors=True)
        shutil.rmtree(truth, ignore_errors=True)
        raise
    return out


def simulate_t1w(
    head: Head, resolution: float, rng: np.random.Generator, coil: Coil | None = None
) -> tuple[np.ndarray, Grid, dict[str, np.ndarray]]:
    """A T1w image with receive bias and noise, (i, j, k) float32, its grid, and the maps of `Head.maps` on it."""
    grid = head.box(np.asarray(T1_FIELD_OF_VIEW), resolution)
    grid.affine[2, 3] -= 22.0  # covers more of the neck and less air above the head
    maps = head.maps(grid)
    image = maps["t1"] * maps["brain"]
    for name, weight in T1_WEIGHT.items():
        outside_brain = maps[name] * (1 - maps["brain"])
        image += np.float32(weight) * outside_brain
    image *= T1_SCALE * _receive_bias(grid, rng)
    if coil is not None:
        image = coil.distort(image, grid)
    return add_noise(image, T1_SCALE / 45, rng), grid, maps


def _write_t1w(
    bids: Path, truth: Path, head: Head, settings: PhantomSettings, rng: np.random.Generator, coil: Coil | None
) -> None:
    image, grid, maps = simulate_t1w(head, settings.t1w_resolution, rng, coil)
    write_image(bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz", np.rint(image).astype(np.int16), grid)
    _write_json(
        bids / "sub-01" / "anat" / "sub-01_T1w.json",
        {"Modality": "MR", "Manufacturer": "Simulated", "MagneticFieldStrength": 3, "RepetitionTime": 2.3,
         "EchoTime": 0.003, "InversionTime": 0.9, "FlipAngle": 9, **({"ImageType": UNCORRECTED} if coil else {})},
    )  # fmt: skip
    brain = maps["brain"] > 0.5
    write_image(truth / "T1w_brain_mask.nii.gz", brain.astype(np.uint8), grid)
    tissue = np.argmax(np.stack([maps["gm"], maps["wm"], maps["csf"]]), 0) + 1
    write_image(truth / "T1w_dseg.nii.gz", (tissue * brain).astype(np.uint8), grid)


def _write_scans(
    bids: Path, truth: Path, head: Head, session: Session, settings: PhantomSettings, rng: np.random.Generator
) -> None:
    grid = session.grid
    tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, settings.resolution / 2))
    ideal_b0 = session.ideal(tissue, 0.0, np.zeros(3))
    brain = _brain_in_scanner(head, session)
    level = float(ideal_b0[brain].mean() / settings.snr) if settings.snr else 0.0
    sigma = noise_map(session.grid, head.centre, level, settings.noise_variation)
    write_image(truth / "ideal_b0.nii.gz", ideal_b0, grid)
    write_image(truth / "ideal_brain_mask.nii.gz", brain.astype(np.uint8), grid)
    series, epis, phases = _acquire(tissue, session, settings, sigma, rng)
    _write_runs(bids, session, settings, series, epis, phases)
    if settings.noise_variation:
        write_image(truth / "noise.nii.gz", sigma, session.grid)
    if settings.ideal:
        for v, (bval, bvec) in enumerate(zip(session.bvals, session.bvecs, strict=True)):
            series[..., v] = np.rint(session.ideal(tissue, bval, bvec) / IDEAL_SLOPE)
        write_image(truth / "ideal_dwi.nii.gz", series, grid, slope=IDEAL_SLOPE)


def _acquire(
    tissue: Tissue, session: Session, settings: PhantomSettings, sigma: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Magnitudes of the DWI (i, j, k, n) and of the fieldmap, and the phase of the DWI if it is complex."""
    shape, count, fraction = session.grid.shape, len(session.bvals), settings.sampled_fraction
    series = np.zeros((*shape, count), np.int16, order="F")
    epis = np.zeros((*shape, len(session.epi_poses)), np.int16, order="F")
    if not fraction:
        for v in range(count):
            series[..., v] = np.rint(add_noise(session.acquire(tissue, v), sigma, rng, settings.coils))
        for v, pose in enumerate(session.epi_poses):
            image = session.image(tissue, pose, session.reversed_pe)
            epis[..., v] = np.rint(add_noise(image, sigma, rng, settings.coils))
        return series, epis, None
    fine, axis = session.refined(), session.pe.axis
    static = STATIC_PHASE * rng.standard_normal(PHASE_TERMS)
    phases = np.zeros(series.shape, np.int16, order="F")
    for v in range(count):
        phase = draw_phase(fine.grid, session.bvals[v] > B0_LIMIT, static, rng)
        image = sample(fine.acquire(tissue, v), phase, axis, fraction, float(sigma.flat[0]), rng)
        series[..., v] = np.rint(np.abs(image))
        phases[..., v] = np.rint((np.angle(image) / np.pi + 1) * PHASE_CYCLE / 2) % PHASE_CYCLE
    for v, pose in enumerate(session.epi_poses):
        phase = draw_phase(fine.grid, False, static, rng)
        image = sample(fine.image(tissue, pose, fine.reversed_pe), phase, axis, fraction, float(sigma.flat[0]), rng)
        epis[..., v] = np.rint(np.abs(image))
    return series, epis, phases if settings.complex else None


def _brain_in_scanner(head: Head, session: Session) -> np.ndarray:
    """Brain mask on the DWI grid for the pose of the first volume, (i, j, k) bool."""
    to_head = np.linalg.inv(session.poses[0])
    brain = np.zeros(session.grid.shape, bool)
    for rows, points in slabs(session.grid):
        template = head.to_template(points @ to_head[:3, :3].T + to_head[:3, 3])
        brain[rows] = (interpolate(head.atlas["brain"], head.atlas_grid, template) > 0.5).reshape(brain[rows].shape)
    return brain


def _write_runs(
    bids: Path,
    session: Session,
    settings: PhantomSettings,
    series: np.ndarray,
    epis: np.ndarray,
    phases: np.ndarray | None,
) -> None:
    stem = bids / "sub-01" / "dwi" / f"sub-01_dir-PA{'' if phases is None else '_part-mag'}_dwi"
    sampled = settings.sampled_fraction
    write_image(_with(stem, ".nii.gz"), series, session.grid)
    frame = next(matrix for matrix in axis_frames() if describe_frame(matrix) == settings.bvec_rows)
    bvals = session.bvals[::-1] if settings.reversed_bvals else session.bvals
    np.savetxt(_with(stem, ".bval"), bvals[None], fmt="%.1f")
    np.savetxt(_with(stem, ".bvec"), frame @ to_fsl(session.bvecs, session.grid).T, fmt="%.8f")
    kind = {"ImageType": UNCORRECTED} if session.coil else {}
    sidecar = {**_sidecar(session.grid, session.pe, sampled), **kind, "B0FieldSource": "pepolar"}
    _write_json(_with(stem, ".json"), sidecar)
    if phases is not None:
        beside = stem.with_name("sub-01_dir-PA_part-phase_dwi")
        write_image(_with(beside, ".nii.gz"), phases, session.grid)
        _write_json(_with(beside, ".json"), {**sidecar, "Units": "arbitrary"})
    target = {"IntendedFor": [f"bids::sub-01/dwi/{stem.name}.nii.gz"]}
    stem = bids / "sub-01" / "fmap" / "sub-01_dir-AP_epi"
    write_image(_with(stem, ".nii.gz"), epis, session.grid)
    _write_json(_with(stem, ".json"), {**_sidecar(session.grid, session.reversed_pe, sampled), **kind, **target})


def _sidecar(grid: Grid, pe: PhaseEncoding, sampled: float) -> dict[str, object]:
    return {
        **({"PartialFourier": sampled} if sampled else {}),
        "Modality": "MR",
        "Manufacturer": "Simulated",
        "MagneticFieldStrength": 3,
        "RepetitionTime": REPETITION_TIME,
        "EchoTime": 0.09,
        "FlipAngle": 90,
        "PhaseEncodingDirection": pe.direction,
        "TotalReadoutTime": READOUT_TIME,
        "EffectiveEchoSpacing": READOUT_TIME / (grid.shape[pe.axis] - 1),
        "SliceEncodingDirection": "k",
        "MultibandAccelerationFactor": MULTIBAND,
        "SliceTiming": slice_timing(grid.shape[2]),
        "B0FieldIdentifier": "pepolar",
    }


def _write_geometry(truth: Path, head: Head, session: Session, settings: PhantomSettings) -> None:
    _write_json(truth / "truth.json", _truth_table(head, session, settings))
    if session.slice_poses is not None:
        np.save(truth / "slice_head_to_scanner.npy", session.slice_poses)
    write_image(truth / "field_hz.nii.gz", session.field, session.field_grid)
    if session.moving_field is not None:
        components = np.moveaxis(session.moving_field.components, 0, -1)
        write_image(truth / "moving_field_hz.nii.gz", components, session.field_grid)
    if session.coil is not None:
        (truth.parent / "gradient_coefficients.grad").write_text(coefficient_text(session.coil.scale))
        for name, maps in (("displacement", session.coil.displacement), ("deviation", session.coil.deviation)):
            write_image(truth / f"gradient_{name}.nii.gz", np.moveaxis(maps, 0, -1), session.coil.grid)
    template = head.atlas_grid.at_spacing(4.0)
    _write_positions(truth / "template_to_head.nii.gz", head.to_head, template)
    brain = [interpolate(head.atlas["brain"], head.atlas_grid, points) > 0.5 for _, points in slabs(template)]
    mask = np.concatenate(brain).reshape(template.shape).astype(np.uint8)
    write_image(truth / "template_brain_mask.nii.gz", mask, template)
    _write_positions(truth / "head_to_template.nii.gz", head.to_template, head.box(np.array([190, 230, 190]), 4.0))
    grid = head.box(np.array([170, 210, 180]), 3.0)
    fibres, shares = fibre_image(head, grid)
    write_image(truth / "fibres.nii.gz", fibres.reshape(*grid.shape, 6), grid)
    write_image(truth / "fibre_shares.nii.gz", shares, grid)


def _write_positions(path: Path, mapping: Callable[[np.ndarray], np.ndarray], grid: Grid) -> None:
    """Write the position of each voxel of `grid` in the other space, (i, j, k, 3), mm RAS+."""
    positions = np.concatenate([mapping(points) for _, points in slabs(grid)])
    write_image(path, positions.reshape(*grid.shape, 3).astype(np.float32), grid)


def _truth_table(head: Head, session: Session, settings: PhantomSettings) -> dict[str, object]:
    size = float(session.grid.voxel_sizes[session.pe.axis])
    hz = interpolate(session.field, session.field_grid, head.brain_points(3))
    fraction = session.signal_fraction
    outliers = [[int(v), int(s), float(fraction[v, s])] for v, s in np.argwhere(fraction < 1)]
    return {
        "template": TEMPLATE,
        "settings": settings.described(),
        "brain_centre": head.centre.tolist(),
        "bvals": session.bvals.tolist(),
        "bvecs_scanner": session.bvecs.tolist(),
        "bvecs_head": session.head_bvecs.tolist(),
        "head_to_scanner": session.poses.tolist(),
        **({"moving_field_reference": session.moving_field.reference.tolist()} if session.moving_field else {}),
        "epi_head_to_scanner": session.epi_poses.tolist(),
        "moved": session.moved.tolist(),
        "phase_encoding_direction": session.pe.direction,
        "readout_time_s": READOUT_TIME,
        "grid_shape": list(session.grid.shape),
        "grid_affine": session.grid.affine.tolist(),
        "largest_displacement_mm": float(np.abs(hz).max() * READOUT_TIME * size),
        "eddy_basis": EDDY_TERMS,
        "eddy_mm": session.eddy.tolist(),
        "lost_slices": outliers,
        **({"signal_gain": session.gain.tolist()} if settings.signal_drift else {}),
    }


def _write_descriptions(bids: Path, settings: PhantomSettings) -> None:
    _write_json(
        bids / "dataset_description.json",
        {
            "Name": "A simulated subject for diffusion spectrum imaging",
            "BIDSVersion": "1.9.0",
            "DatasetType": "raw",
            "License": "CC0",
            "Authors": ["dsiprep"],
            "Acknowledgements": "Brain: ICBM 152 nonlinear symmetric 2009a (McGill University), from nilearn.",
            "ReferencesAndLinks": ["https://doi.org/10.1016/j.neuroimage.2010.07.033"],
        },
    )
    (bids / "README").write_text(
        "A simulated subject\n===================\n\n"
        "A simulated head with known motion, distortion and noise, written by `dsiprep-tools phantom`\n"
        "to test diffusion preprocessing. The dataset contains no human data.\n\nSettings: "
        + ", ".join(f"{name} {value}" for name, value in settings.described().items())
        + ".\n"
    )
    (bids / "participants.tsv").write_text("participant_id\tspecies\nsub-01\tn/a\n")
    _write_json(bids / "participants.json", {"species": {"Description": "Species; not applicable to simulated data"}})


def write_image(path: Path, data: np.ndarray, grid: Grid, slope: float | None = None) -> None:
    """Write (i, j, k[, n]) as NIfTI with sform and qform; true values are `slope` times the stored ones."""
    image = nib.Nifti1Image(data, grid.affine)
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        image.header["pixdim"][4] = REPETITION_TIME
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, path)


def _receive_bias(grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """A smooth receive (B1-) bias field, about 0.75 to 1.25, (i, j, k) float32."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in grid.shape]
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    c = rng.uniform(-0.12, 0.12, 6).astype(np.float32)
    return 1 + c[0] * x + c[1] * y + c[2] * z + c[3] * x * x + c[4] * y * y + c[5] * x * y


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
