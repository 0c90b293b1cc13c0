"""SHORELine on its own: motion, eddy currents and lost slices of one series, from arrays or from files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsiprep import device as devices
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Motion
from dsiprep.errors import InputError, OutputError
from dsiprep.io import gradients, itk
from dsiprep.io.nifti import read_series, read_volume, write_image
from dsiprep.ops.image.affine import rotate_bvecs
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.settings import MotionSettings
from dsiprep.stages import motion as stage
from dsiprep.stages.acquisition import multiband_groups

__all__ = ["align_series", "estimate_motion", "run_on_files"]

Array = np.ndarray | torch.Tensor
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
    settings: MotionSettings | None = None,
    b0_threshold: float = B0_THRESHOLD,
    device: str = "cpu",
) -> Motion:
    """SHORELine as a function.

    Parameters
    ----------
    data : ndarray or Tensor, (i, j, k, n)
        Raw intensities in the order of acquisition, as nibabel gives them; one phase encoding.
    affine : ndarray, (4, 4)
        Voxels to world RAS+ mm.
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3) or (3, n)
        As in the .bvec file: FSL's convention for this affine.
    mask : ndarray or Tensor, (i, j, k), optional
        Rough brain mask; found on the mean b=0 by default.
    phase_encoding : str, optional
        "i", "j-" and so on, as BIDS has it. Eddy currents are looked for along this axis; not at all without it.
    multiband : tuple of tuple of int
        Slices excited together.
    settings : MotionSettings, optional
    b0_threshold : float
        b-values at or below this count as b=0.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".

    Returns
    -------
    Motion
        `transforms` (n, 4, 4) take world RAS+ points of the b=0 reference to points of each volume.

    Raises
    ------
    InputError
        If shapes do not match, voxels are not finite, the mask is empty or there is no b=0.

    References
    ----------
    Cieslak et al. 2024, doi 10.1002/hbm.26570.
    """
    dwi, brain = _series(data, affine, bvals, bvecs, mask, b0_threshold)
    on = devices.choose(device)
    pe = None if phase_encoding is None else PhaseEncoding.from_bids(phase_encoding)
    chosen = settings or MotionSettings()
    return devices.with_cpu_fallback(
        lambda series, inside: stage.estimate_motion(series, inside, chosen, pe, multiband), on, (dwi, brain)
    )


def align_series(data: Array, affine: np.ndarray, bvecs: np.ndarray, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """The series on its b=0 reference, with b-vectors that turned with the head.

    One cubic B-spline interpolation; lost slices are replaced if `motion` has replacements for them.

    Parameters
    ----------
    data, affine, bvecs
        As for `estimate_motion`.
    motion : Motion

    Returns
    -------
    aligned : ndarray, (i, j, k, n), float32
    bvecs : ndarray, (n, 3)
        FSL's convention for the same affine.
    """
    grid = Grid(tuple(int(n) for n in data.shape[:3]), np.asarray(affine, float))  # type: ignore[arg-type]
    out = np.empty(data.shape, np.float32)
    for row, matrix in enumerate(motion.transforms):
        volume = motion.with_replaced_slices(row, torch.as_tensor(data[..., row], dtype=torch.float32).contiguous())
        eddy = None if motion.eddy is None else motion.eddy.take(np.array([row]))
        out[..., row] = warp_volume(volume, grid, grid, matrix, eddy=eddy).numpy()
    world = gradients.from_fsl(_rows(bvecs, data.shape[3]), grid)
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
    """This one step on a NIfTI series: aligned series, b-table, reference, transforms and tables into `out`.

    Parameters
    ----------
    dwi : Path
        4-D .nii or .nii.gz. A .bval, a .bvec and a .json beside it are taken where no others are given: the sidecar
        tells the phase encoding and which slices were excited together.
    out : Path
        Folder.

    Returns
    -------
    list of Path
        What was written.

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
    sidecar = _sidecar(dwi.with_name(f"{stem}.json"))
    data, fsl = np.moveaxis(volumes, 0, -1), gradients.to_fsl(bvecs, grid)
    motion = estimate_motion(
        data,
        grid.affine,
        bvals,
        fsl,
        None if mask is None else read_volume(mask).numpy(),
        phase_encoding=phase_encoding or sidecar.get("PhaseEncodingDirection"),
        multiband=multiband_groups([tuple(sidecar.get("SliceTiming", ()))]),
        settings=settings,
        device=device,
    )
    aligned, turned = align_series(data, grid.affine, fsl, motion)
    return _write(out, stem, np.moveaxis(aligned, -1, 0), grid, bvals, gradients.from_fsl(turned, grid), motion)


def _series(
    data: Array, affine: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray, mask: Array | None, b0_threshold: float
) -> tuple[DWI, Volume]:
    """Arrays as the stage takes them."""
    if data.ndim != 4:
        raise InputError(f"motion: the series has {data.ndim} dimensions; four are wanted: i, j, k and volume")
    n = int(data.shape[3])
    table = _rows(bvecs, n)
    if len(np.ravel(bvals)) != n:
        raise InputError(f"motion: {len(np.ravel(bvals))} b-values for {n} volumes; give one for each")
    grid = Grid(tuple(int(k) for k in data.shape[:3]), np.asarray(affine, float))  # type: ignore[arg-type]
    volumes = torch.as_tensor(data, dtype=torch.float32).permute(3, 0, 1, 2).contiguous()
    none = np.zeros(n, int)
    dwi = DWI(volumes, grid, np.ravel(bvals).astype(float), gradients.from_fsl(table, grid), none, none, b0_threshold)
    if mask is not None:
        if tuple(mask.shape) != grid.shape:
            raise InputError(
                f"motion: the mask is {tuple(mask.shape)}, the volumes are {grid.shape}; give the same grid"
            )
        return dwi, Volume(torch.as_tensor(mask, dtype=torch.float32), grid)
    if not dwi.is_b0.any():
        raise InputError(
            f"motion: no volume has b <= {b0_threshold:g}, the lowest is {dwi.bvals.min():g}; raise b0_threshold"
        )
    return dwi, brain_mask_b0(Volume(volumes[torch.as_tensor(np.flatnonzero(dwi.is_b0))].mean(0), grid))


def _rows(bvecs: np.ndarray, n: int) -> np.ndarray:
    table = np.asarray(bvecs, float)
    table = table.T if table.shape == (3, n) and n != 3 else table
    if table.shape != (n, 3):
        raise InputError(f"motion: b-vectors of shape {table.shape} for {n} volumes; ({n}, 3) is wanted")
    return table


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON sidecar ({error}); mend or remove it") from error


def _write(
    out: Path, stem: str, aligned: np.ndarray, grid: Grid, bvals: np.ndarray, bvecs: np.ndarray, motion: Motion
) -> list[Path]:
    """The files, in the order in which they are listed."""
    name = stem.removesuffix("_dwi")
    paths = {
        key: out / f"{name}_{tail}"
        for key, tail in {
            "series": "desc-hmc_dwi.nii.gz",
            "bval": "desc-hmc_dwi.bval",
            "bvec": "desc-hmc_dwi.bvec",
            "reference": "dwiref.nii.gz",
            "poses": "from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt",
            "eddy": "from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt",
            "slices": "desc-slice_qc.json",
            "rounds": "hmcOptimization.csv",
        }.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_image(paths["series"], torch.from_numpy(np.ascontiguousarray(aligned)), grid)
        write_image(paths["reference"], motion.dwiref.data, grid)
        gradients.write_bvals(paths["bval"], bvals)
        gradients.write_fsl_bvecs(paths["bvec"], bvecs, grid)
        itk.write_affine_series(paths["poses"], motion.transforms)
        if motion.eddy is None:
            del paths["eddy"]
        else:
            itk.write_eddy_series(paths["eddy"], motion.eddy, grid)
        lost = [] if motion.outlier_slices is None else np.argwhere(motion.outlier_slices).tolist()
        paths["slices"].write_text(json.dumps({"slice_z": np.round(motion.slice_z, 3).tolist(), "lost": lost}))
        with paths["rounds"].open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(motion.trace[0]) if motion.trace else ["iter_num"])
            writer.writeheader()
            writer.writerows(motion.trace)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror}; make room or choose another folder") from error
    return list(paths.values())
