"""Results of a small simulated subject, from which a report can be rendered without running any stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import EpiReference, PhaseEncoding, Run, SamplingScheme, Unit, UnusedImage
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Blip,
    Coregistration,
    Denoised,
    Distortion,
    Motion,
    Preprocessed,
    Quality,
    UnitResults,
    Unringed,
)
from dsiprep.data.transform import Affine, Chain, DisplacementField, EddyCurrents
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.settings import Settings

AIR, CSF, GREY, WHITE, SCALP = range(5)
B0 = np.array([0.02, 1.6, 0.9, 0.65, 0.35])
T1 = np.array([0.01, 0.2, 0.62, 1.0, 0.7])
PHASE_ENCODINGS = (PhaseEncoding(1, -1, 0.05), PhaseEncoding(1, 1, 0.05))
SECONDS = {
    "acquisition": 3.1,
    "denoise": 41.0,
    "unringing": 4.0,
    "motion-up": 88.0,
    "motion-down": 61.0,
    "distortion": 35.5,
    "anatomy": 74.0,
    "coregister": 6.2,
    "resample": 19.0,
    "quality": 9.3,
}
Labels = Callable[[np.ndarray], np.ndarray]


def ellipsoids(points: np.ndarray) -> np.ndarray:
    """Tissue labels at ACPC points (..., 3): nested ellipsoids."""

    def inside(*radii: float) -> np.ndarray:
        return (np.square((points - [0, -12, 8]) / np.array(radii)).sum(-1)) < 1

    labels = np.full(points.shape[:-1], AIR)
    for radii, tissue in (
        ((78, 96, 84), SCALP),
        ((70, 88, 74), CSF),
        ((67, 84, 70), GREY),
        ((55, 70, 56), WHITE),
        ((14, 26, 12), CSF),
    ):
        labels[inside(*radii)] = tissue
    return labels


def fibre(points: np.ndarray) -> np.ndarray:
    """Fibre direction at ACPC points (..., 3): left-right at the midline, inferior-superior laterally."""
    tilt = np.clip(np.abs(points[..., 0]) / 60, 0, 1) * np.pi / 2
    zero = np.zeros_like(tilt)
    return np.stack([np.cos(tilt), zero, np.sign(points[..., 0]) * np.sin(tilt)], -1)


def off_resonance(points: np.ndarray) -> np.ndarray:
    """Off-resonance field in Hz at ACPC points: strong above the sinuses, weak elsewhere."""
    return 110 * np.exp(-np.square((points - [0, 48, -25]) / [28, 26, 24]).sum(-1)) - 8


def lattice(radius: int, max_b: float) -> tuple[np.ndarray, np.ndarray]:
    """Cartesian DSI scheme: b-values (n,) and world b-vectors (n, 3), with b=0 first and every 17th volume."""
    steps = np.arange(-radius, radius + 1)
    q = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    q = q[(np.square(q).sum(1) <= radius**2) & (np.abs(q).sum(1) > 0)]
    q = q[np.random.default_rng(1).permutation(len(q))]
    q = np.insert(q, np.arange(0, len(q), 16), 0, axis=0)
    length = np.linalg.norm(q, axis=1)
    return max_b * length**2 / radius**2, q / np.maximum(length, 1)[:, None]


def head_grid(spacing: float, orientation: np.ndarray, size: tuple[float, float, float]) -> Grid:
    """A grid centred on the head with the columns of `orientation` as axes (world) and `size` in mm along them."""
    shape = np.round(np.asarray(size) / spacing).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = orientation * spacing
    affine[:3, 3] = np.array([0, -12, 8]) - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def rigid(angles: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Rigid matrix (4, 4) from a rotation vector (rad) and a translation (mm)."""
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(angles).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply an affine (4, 4) to points (..., 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def signal(labels: np.ndarray, points: np.ndarray, bval: float, bvec: np.ndarray) -> np.ndarray:
    """Diffusion-weighted signal of one volume at ACPC points with the given tissue labels."""
    along = np.square(fibre(points) @ bvec)
    diffusivity = np.stack(
        [np.zeros_like(along), along * 0 + 3e-3, along * 0 + 8e-4, 2e-4 + 1.5e-3 * along, along * 0 + 1e-3]
    )
    per_voxel = np.take_along_axis(diffusivity, labels[None], 0)[0]
    return B0[labels] * np.exp(-bval * per_voxel)


def volume(values: np.ndarray, grid: Grid) -> Volume:
    """A float32 volume from an array."""
    return Volume(torch.as_tensor(np.ascontiguousarray(values, dtype=np.float32)), grid)


def voxels(grid: Grid) -> np.ndarray:
    """World coordinates of all voxel centres, (i, j, k, 3)."""
    return grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))


def make_subject(
    spacing: float = 8.0,
    anat_spacing: float = 4.0,
    radius: int = 2,
    labels: Labels = ellipsoids,
    session: str | None = None,
    blips: int = 2,
    seed: int = 0,
) -> UnitResults:
    """Results of a unit with known motion, distortion and noise; `labels` gives the tissue at ACPC points.

    The DWI grid is oblique and LAS; the T1w grid is LPS+, as in the derivatives.
    """
    rng = np.random.default_rng(seed)
    orient = rigid(np.array([0.12, 0.03, 0.0]), np.zeros(3))[:3, :3] @ np.diag([-1.0, 1.0, 1.0])
    grid = head_grid(spacing, orient, (190, 224, 176))
    acpc_from_dwi = rigid(np.array([0.03, -0.02, 0.04]), np.array([2.0, -3.0, 1.0]))
    dwiref_to_acpc = Affine(np.linalg.inv(acpc_from_dwi), "dwiref", "ACPC")
    points = transform_points(acpc_from_dwi, voxels(grid))
    bvals, bvecs = lattice(radius, 4000.0)
    n = len(bvals)
    tissue = labels(points)
    hz = off_resonance(points)
    encodings = PHASE_ENCODINGS[:blips]
    drift = np.cumsum(rng.normal(0, 0.12, (n, 6)), 0) * [1, 1, 1, 0.012, 0.012, 0.012]
    drift[n // 2 :, 3] += 0.02
    transforms = np.stack([rigid(d[3:], d[:3]) for d in drift])
    distorted = [labels(transform_points(acpc_from_dwi, voxels(grid) - _shift(hz, e, grid))) for e in encodings]
    blip_of = np.where(np.arange(n) % 2 == 0, 0, blips - 1) if blips == 2 else np.zeros(n, int)
    blip_of = np.sort(blip_of)
    acpc_bvecs = rotate_bvecs(bvecs, transforms) @ acpc_from_dwi[:3, :3].T
    clean = np.stack([signal(distorted[blip_of[v]], points, bvals[v], acpc_bvecs[v]) for v in range(n)]) * 1000
    sigma = 18 + 14 * np.exp(-np.square(points / 60).sum(-1))
    noisy = np.hypot(clean + sigma * rng.normal(size=clean.shape), sigma * rng.normal(size=clean.shape))
    noisy[n // 3, :, :, grid.shape[2] // 2] *= 0.4

    def series(values: np.ndarray) -> DWI:
        return DWI(torch.as_tensor(values.astype(np.float32)), grid, bvals, bvecs, blip_of, blip_of)

    mask = volume((tissue != AIR) & (tissue != SCALP), grid)
    names = ("up", "down") if blips == 2 else ("only",)
    empty = torch.zeros((0, *grid.shape))
    blip_list = tuple(Blip(name, e, empty) for name, e in zip(names, encodings, strict=True))
    before = [volume(B0[d] * 1000, grid) for d in distorted]
    motions = tuple(_motion(b, blip_of, transforms, before[b], mask, bvals, rng) for b in range(blips))
    dwiref = volume(B0[tissue] * 1000, grid)
    out = head_grid(spacing * 0.9, np.diag([-1.0, -1.0, 1.0]), (170, 204, 166))
    unit = _unit(session, blips)
    z = np.concatenate([m.slice_z for m in motions])
    return UnitResults(
        unit=unit,
        settings=Settings(),
        acquired=Acquired(series(noisy), blip_list, _scheme(bvals, radius), mask, np.ones(blips)),
        denoised=Denoised(series(clean), volume(sigma, grid), None, "MP-PCA denoising with windows of 5x5x5 voxels."),
        unringed=Unringed(series(0.99 * clean), ("mrdegibbs",), "Gibbs ringing is removed by local subvoxel shifts."),
        motions=motions,
        distortion=_distortion(encodings, grid, hz, dwiref, before) if blips == 2 else None,
        distortion_reason="Blip-up/blip-down correction with phase encodings j- and j."
        if blips == 2
        else "Distortion is not corrected: there is only one phase encoding.",
        anatomy=_anatomy(labels, anat_spacing, rng),
        coregistration=Coregistration(dwiref_to_acpc, 1.21, 1.38, "mi"),
        preprocessed=_preprocessed(labels, out, bvals, acpc_bvecs, blip_of, rng),
        quality=_quality(drift, bvals, acpc_bvecs, z, out, labels, unit),
        seconds=SECONDS,
        device="cpu",
    )


def _scheme(bvals: np.ndarray, radius: int) -> SamplingScheme:
    directions = int((bvals > 0).sum())
    return SamplingScheme(
        "DSI",
        False,
        tuple(np.unique(bvals[bvals > 0])),
        directions,
        int((bvals == 0).sum()),
        4000.0,
        f"Cartesian DSI, {directions} directions, radius {radius} (full sphere), b to 4000",
    )


def _shift(hz: np.ndarray, pe: PhaseEncoding, grid: Grid) -> np.ndarray:
    """Susceptibility displacement in mm, (i, j, k, 3)."""
    return (hz * (pe.readout_time or 0) * pe.polarity)[..., None] * pe.vector(grid)


UNUSED = (UnusedImage(Path("sub-01_T2w.nii.gz"), "--anat-modality T1w"),)


def _unit(session: str | None, blips: int) -> Unit:
    name = "sub-01" + (f"_ses-{session}" if session else "") + "_acq-dsi"
    runs = tuple(
        Run(Path(f"{name}_dir-{d}_dwi.nii.gz"), Path(f"{name}.bval"), Path(f"{name}.bvec"), pe, {"dir": d})
        for d, pe in zip(("AP", "PA"), PHASE_ENCODINGS, strict=True)
    )[:blips]
    notes = (
        "Runs 1 and 2 are combined: same grid, opposite phase encodings (j-, j).",
        "TotalReadoutTime was derived from EffectiveEchoSpacing and ReconMatrixPE.",
    )
    epi = EpiReference(Path(f"{name}_dir-PA_epi.nii.gz"), PhaseEncoding(1, 1, 0.05))
    return Unit("01", session, name, runs, (epi,), (Path("sub-01_T1w.nii.gz"),), (), notes, left_out=UNUSED)


def _motion(
    blip: int,
    blip_of: np.ndarray,
    transforms: np.ndarray,
    dwiref: Volume,
    mask: Volume,
    bvals: np.ndarray,
    rng: np.random.Generator,
) -> Motion:
    volumes = np.flatnonzero(blip_of == blip)
    count = len(volumes)
    z = rng.normal(0, 1, (count, dwiref.grid.shape[2]))
    z[count // 3, dwiref.grid.shape[2] // 2] = -7.5
    r2 = 0.97 - bvals[volumes] / 30000 - rng.uniform(0, 0.08, count)
    trace = [
        {
            "iter_num": float(k),
            "volume": float(v),
            "shiftX": transforms[v][0, 3] * (1 - 0.3**k),
            "shiftY": transforms[v][1, 3] * (1 - 0.3**k),
            "shiftZ": transforms[v][2, 3] * (1 - 0.3**k),
            "rotateX": 0.0,
            "rotateY": 0.0,
            "rotateZ": 0.0,
        }
        for k in range(1, 5)
        for v in volumes
    ]
    notes = ("Volume 12 did not converge within four iterations (last change 0.06 mm).",) if blip == 0 else ()
    return Motion(
        transforms[volumes],
        volumes,
        dwiref,
        mask,
        r2,
        np.sqrt(r2),
        z.astype(np.float32),
        2,
        trace,
        "3dSHORE",
        EddyCurrents(
            np.random.default_rng(0).normal(0, 0.3, (len(volumes), 10)), dwiref.grid.directions, dwiref.grid.centre, 1
        ),
        z < -5,
        None,
        notes,
    )


def _distortion(
    encodings: tuple[PhaseEncoding, ...], grid: Grid, hz: np.ndarray, dwiref: Volume, before: list[Volume]
) -> Distortion:
    fields = tuple(
        DisplacementField(torch.as_tensor(np.moveaxis(_shift(hz, e, grid), -1, 0).astype(np.float32)), grid)
        for e in encodings
    )
    trace = [{"level": s, "cost": np.exp(-i / 9), "change_mm": np.exp(-i / 4)} for s in (4, 2, 1) for i in range(20)]
    return Distortion(
        np.stack([np.eye(4)] * len(encodings)),
        fields,
        volume(hz, grid),
        dwiref,
        tuple(before),
        (dwiref, dwiref),
        trace,
        "drbuddi",
    )


def _anatomy(labels: Labels, spacing: float, rng: np.random.Generator) -> Anatomy:
    grid = head_grid(spacing, np.diag([-1.0, -1.0, 1.0]), (190, 228, 200))
    tissue = labels(voxels(grid))
    image = volume(T1[tissue] * 800 + rng.normal(0, 12, grid.shape), grid)
    mask = volume((tissue != AIR) & (tissue != SCALP), grid)
    probability = torch.as_tensor(np.stack([tissue == t for t in (CSF, GREY, WHITE)]).astype(np.float32))
    brain = Volume(image.data * mask.data, grid)
    identity = Chain((Affine(np.eye(4), "ACPC", "MNI"),), "ACPC", "MNI")
    return Anatomy(
        "T1w",
        image,
        mask,
        probability,
        Affine(np.eye(4), "anat", "ACPC"),
        identity,
        identity,
        "MNI152NLin2009cAsym",
        brain,
        volume(np.roll(brain.numpy(), 1, 1), grid),
        orig_to_anat=(Affine(np.eye(4), "orig", "anat"),),
    )


def _preprocessed(
    labels: Labels,
    grid: Grid,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    blip: np.ndarray,
    rng: np.random.Generator,
) -> Preprocessed:
    points = voxels(grid)
    tissue = labels(points)
    data = np.stack([signal(tissue, points, b, g) for b, g in zip(bvals, bvecs, strict=True)]) * 1000
    data = data + rng.normal(0, 8, data.shape)
    dwi = DWI(torch.as_tensor(data.astype(np.float32)), grid, bvals, bvecs, blip, blip)
    mask = volume((tissue != AIR) & (tissue != SCALP), grid)
    return Preprocessed(dwi, volume(B0[tissue] * 1000, grid), mask, "cubic B-spline")


def _quality(
    drift: np.ndarray,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    z: np.ndarray,
    grid: Grid,
    labels: Labels,
    unit: Unit,
) -> Quality:
    step = np.abs(np.diff(drift, axis=0)) @ np.array([1, 1, 1, 50, 50, 50.0])
    fd = np.concatenate([[np.nan], step])
    confounds = {"framewise_displacement": fd, "bval": bvals}
    for d, axis in enumerate("xyz"):
        confounds[f"trans_{axis}"], confounds[f"rot_{axis}"] = drift[:, d], drift[:, 3 + d]
        confounds[f"grad_{axis}"] = bvecs[:, d]
    table: dict[str, float | str | None] = {
        "file_name": unit.name,
        "subject_id": unit.subject,
        "raw_neighbor_corr": 0.71,
        "t1_neighbor_corr": 0.83,
        "raw_masked_neighbor_corr": 0.74,
        "raw_num_bad_slices": 2.0,
        "raw_coherence_index": 0.87,
        "raw_dwi_contrast": 1.13,
        "t1_dwi_contrast": 1.25,
        "t1_coherence_index": 0.90,
        "raw_max_b": 4000.0,
        "raw_dimension_x": 24.0,
        "raw_voxel_size_x": 8.0,
        "mean_fd": float(np.nanmean(fd)),
        "max_fd": float(np.nanmax(fd)),
        "max_rotation": 0.03,
        "max_translation": 1.9,
        "t1_dice_distance": 0.94,
        "mni_dice_distance": 0.96,
        "CNR0_mean": 1.9,
        "CNR0_median": 1.7,
        "fieldmap_hz_median": -7.0,
        "fieldmap_hz_minimum": -8.1,
        "fieldmap_hz_maximum": 101.0,
        "session_id": None,
    }
    tissue = labels(voxels(grid))
    inside = (tissue != AIR) & (tissue != SCALP)
    return Quality(
        table,
        confounds,
        z,
        volume(inside * 1.8, grid),
        volume(inside * 22.0, grid),
        ("There are too few b=0 volumes for a reliable temporal SNR.",),
    )
