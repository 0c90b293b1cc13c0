"""SHORELine alone: motion, eddy currents and outlier slices of one series, from arrays or from files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

from dsiprep import device as devices
from dsiprep.api.arguments import (
    Array,
    check_affine,
    check_bvals,
    check_bvecs,
    check_phase_encoding,
    check_series,
    check_type,
    read_sidecar,
)
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Motion
from dsiprep.errors import InputError, OutputError
from dsiprep.io import gradients, itk, sidecars
from dsiprep.io.nifti import read_series, read_volume, write_image
from dsiprep.io.qc_tables import write_json
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.settings import MotionSettings
from dsiprep.stages import motion as stage
from dsiprep.stages.acquisition import multiband_groups

__all__ = ["align_series", "estimate_motion", "run_on_files"]

B0_THRESHOLD = 100.0  # s/mm²


def estimate_motion(
    data: Array,
    affine: np.ndarray,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    mask: Array | None = None,
    *,
    phase_encoding: str | None = None,
    multiband: tuple[tuple[int, ...], ...] = (),
    slice_axis: int | None = None,
    settings: MotionSettings | None = None,
    b0_threshold: float = B0_THRESHOLD,
    device: str = "cpu",
) -> Motion:
    """Estimate head motion, eddy currents and outlier slices of a series by SHORELine.

    Parameters
    ----------
    data : ndarray or Tensor, (i, j, k, n)
        Raw intensities in order of acquisition, as nibabel returns them; one phase encoding.
    affine : ndarray, (4, 4)
        Voxels to world RAS+ mm.
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3) or (3, n)
        FSL's convention for this affine, as in the .bvec of BIDS raw data: components along the axes of the array, the
        first negated if the determinant of the affine is positive. For a preprocessed series read
        `_fslbvecs.txt`; its `.bvec` is not in FSL's convention.
    mask : ndarray or Tensor, (i, j, k), optional
        Rough brain mask; computed from the mean b=0 image by default.
    phase_encoding : str, optional
        "i", "j-" and so on, as in BIDS. Eddy currents are modelled along this axis, and not at all without it.
    multiband : tuple of tuple of int
        Groups of slices that are excited together.
    slice_axis : int, optional
        Voxel axis across slices, 0 to 2; by default the last, unless voxels are clearly longest along another axis.
    settings : MotionSettings, optional
        Each volume has one pose: `slices` is not used.
    b0_threshold : float
        b-values at or below this count as b=0.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".

    Returns
    -------
    Motion
        `transforms` (n, 4, 4) map world RAS+ points of the b=0 reference to points of each volume.

    Raises
    ------
    InputError
        If an argument has the wrong type, shape or values; the message says what is wanted.

    References
    ----------
    Cieslak et al. 2024, doi 10.1002/hbm.26570.
    """
    chosen = MotionSettings() if settings is None else check_type(settings, MotionSettings, "settings")
    if chosen.slices == "on":
        raise InputError("motion within volumes is a stage of whole runs; estimate_motion gives each volume one pose")
    pe, on = check_phase_encoding(phase_encoding), devices.choose(device)
    if slice_axis not in (None, 0, 1, 2):
        raise InputError(f"slice_axis is {slice_axis!r}; give 0, 1 or 2, the voxel axis across slices, or None")
    dwi, brain = _series(data, affine, bvals, bvecs, mask, b0_threshold)
    return devices.with_cpu_fallback(
        lambda series, inside: stage.estimate_motion(series, inside, chosen, pe, multiband, slice_axis),
        on,
        (dwi, brain),
    )


def align_series(data: Array, affine: np.ndarray, bvecs: np.ndarray, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Resample a series onto its b=0 reference and rotate its b-vectors.

    One cubic B-spline interpolation; outlier slices are replaced if `motion` holds replacements for them.

    Parameters
    ----------
    data, affine, bvecs
        As for `estimate_motion`.
    motion : Motion
        From `estimate_motion`.

    Returns
    -------
    aligned : ndarray, (i, j, k, n), float32
    bvecs : ndarray, (n, 3)
        FSL's convention for the same affine, as the input. For DIPY negate the first component if the determinant of
        the affine is positive.

    Raises
    ------
    InputError
        If an argument has the wrong type or shape.
    """
    data = check_series(data)
    grid, n = check_affine(affine, tuple(data.shape)), int(data.shape[3])
    if len(motion.transforms) != n:
        raise InputError(f"motion has {len(motion.transforms)} transforms for {n} volumes; give that of this series")
    world = gradients.from_fsl(check_bvecs(bvecs, np.zeros(n), B0_THRESHOLD), grid)
    out = np.empty(data.shape, np.float32)
    for row, matrix in enumerate(motion.transforms):
        volume = motion.with_replaced_slices(row, torch.as_tensor(data[..., row], dtype=torch.float32).contiguous())
        eddy = None if motion.eddy is None else motion.eddy.take(np.array([row]))
        out[..., row] = warp_volume(volume, grid, grid, matrix, eddy=eddy).numpy() * np.float32(motion.density(row))
    return out, gradients.to_fsl(rotate_bvecs(world, motion.transforms), grid)


def run_on_files(
    dwi: Path,
    out: Path,
    bval: Path | None = None,
    bvec: Path | None = None,
    mask: Path | None = None,
    phase_encoding: str | None = None,
    settings: MotionSettings | None = None,
    device: str = "auto",
) -> list[Path]:
    """Run SHORELine on a NIfTI series and write aligned series, gradients, reference, transforms and tables.

    The b-vectors read and written are in FSL's convention, as BIDS prescribes; the written sidecar states it.

    Parameters
    ----------
    dwi : Path
        4-D .nii or .nii.gz. The .bval, .bvec and .json beside it are used unless others are given; the sidecar
        specifies the phase encoding and which slices are excited together.
    out : Path
        Output folder.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError, GradientError
        If the data cannot be used.
    OutputError
        If `out` cannot be written.
    """
    stem = dwi.name.removesuffix(".gz").removesuffix(".nii")
    volumes, grid = read_series(dwi)
    table = bval or dwi.with_name(f"{stem}.bval")
    bvals, bvecs = gradients.read_gradients(
        table, bvec or dwi.with_name(f"{stem}.bvec"), grid, len(volumes), need_b0=False
    )
    gradients.require_b0(bvals, B0_THRESHOLD, str(table), fixed=True)
    sidecar = read_sidecar(dwi.with_name(f"{stem}.json"))
    data, fsl = np.moveaxis(volumes, 0, -1), gradients.to_fsl(bvecs, grid)
    motion = estimate_motion(
        data,
        grid.affine,
        bvals,
        fsl,
        None if mask is None else read_volume(mask).numpy(),
        phase_encoding=phase_encoding or sidecar.get("PhaseEncodingDirection"),
        multiband=multiband_groups([sidecars.slice_times(sidecar, grid.shape)]),
        slice_axis=sidecars.slice_axis(sidecar, grid.shape),
        settings=settings,
        device=device,
    )
    aligned, turned = align_series(data, grid.affine, fsl, motion)
    series = DWI(
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(aligned, -1, 0))),
        grid,
        bvals,
        gradients.from_fsl(turned, grid),
        np.zeros(len(bvals), int),
        np.zeros(len(bvals), int),
        B0_THRESHOLD,
    )
    return _write(out, stem, series, motion, sidecar.get("RepetitionTime"))


def _series(
    data: Array, affine: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray, mask: Array | None, b0_threshold: float
) -> tuple[DWI, Volume]:
    """The checked arguments as the stage takes them."""
    data = check_series(data)
    grid, n = check_affine(affine, tuple(data.shape)), int(data.shape[3])
    b = check_bvals(bvals, n, b0_threshold)
    directions = gradients.from_fsl(check_bvecs(bvecs, b, b0_threshold), grid)
    volumes, none = torch.as_tensor(data, dtype=torch.float32).permute(3, 0, 1, 2).contiguous(), np.zeros(n, int)
    dwi = DWI(volumes, grid, b, directions, none, none, b0_threshold)
    if mask is not None:
        if tuple(mask.shape) != grid.shape:
            raise InputError(f"the mask has shape {tuple(mask.shape)}, the volumes {grid.shape}; give the same grid")
        return dwi, Volume(torch.as_tensor(mask, dtype=torch.float32), grid)
    return dwi, brain_mask_b0(Volume(volumes[torch.as_tensor(np.flatnonzero(dwi.is_b0))].mean(0), grid))


def _write(out: Path, stem: str, series: DWI, motion: Motion, repetition_time: float | None) -> list[Path]:
    """Write the outputs; their paths in the order they are listed."""
    name = stem.removesuffix("_dwi")
    paths = {
        key: out / f"{name}_{tail}"
        for key, tail in {
            "series": "desc-hmc_dwi.nii.gz",
            "bval": "desc-hmc_dwi.bval",
            "bvec": "desc-hmc_dwi.bvec",
            "sidecar": "desc-hmc_dwi.json",
            "reference": "dwiref.nii.gz",
            "poses": "from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt",
            "eddy": "from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt",
            "slices": "desc-slice_qc.json",
            "rounds": "hmcOptimization.csv",
        }.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_image(paths["series"], series.data, series.grid, repetition_time=repetition_time)
        write_image(paths["reference"], motion.dwiref.data, series.grid)
        gradients.write_bvals(paths["bval"], series.bvals)
        gradients.write_fsl_bvecs(paths["bvec"], series.bvecs, series.grid)
        write_json(paths["sidecar"], {"GradientTables": {paths["bvec"].name: gradients.FSL_FRAME}})
        itk.write_affine_series(paths["poses"], motion.transforms)
        if motion.eddy is None:
            del paths["eddy"]
        else:
            itk.write_eddy_series(paths["eddy"], motion.eddy, series.grid)
        lost = [] if motion.outlier_slices is None else np.argwhere(motion.outlier_slices).tolist()
        paths["slices"].write_text(json.dumps({"slice_z": np.round(motion.slice_z, 3).tolist(), "lost": lost}))
        with paths["rounds"].open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(motion.trace[0]) if motion.trace else ["iter_num"])
            writer.writeheader()
            writer.writerows(motion.trace)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror}; make room or choose another folder") from error
    return list(paths.values())
