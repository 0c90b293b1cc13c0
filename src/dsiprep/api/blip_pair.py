"""Blip-up/blip-down distortion correction alone, from two files: `dsiprep-tools drbuddi`, or `correct_pair`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsiprep.api.arguments import check_phase_encoding, read_sidecar
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.device import choose, with_cpu_fallback
from dsiprep.errors import InputError, MetadataError, OutputError
from dsiprep.io.b_tables import read_bvals
from dsiprep.io.derivatives import sdc_chain
from dsiprep.io.gradients import read_gradients, require_b0
from dsiprep.io.itk import write_composite_h5
from dsiprep.io.nifti import read_image, read_series, read_volume, write_image
from dsiprep.io.sidecars import phase_encoding
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.qspace.matching_gradients import LOW_B, MIN_PAIRS, low_b_pairs
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion
from dsiprep.stages.reference_blip import aligned_mean

__all__ = ["correct_pair", "write_pair"]

B0_THRESHOLD = 100.0  # s/mm²
LEAST_SHARE = 0.5  # smallest fraction of the brain in `up` that `down` covers


def correct_pair(
    up: Path,
    down: Path,
    *,
    pe_dir: str | None = None,
    readout_time: float | None = None,
    mask: Path | None = None,
    structural: Path | None = None,
    diffusion: bool = False,
    device: str = "cpu",
) -> Distortion:
    """Correct two images, or series, of opposite phase encoding.

    Parameters
    ----------
    up, down : Path
        `.nii` or `.nii.gz`, 3-D or 4-D, of either polarity. Volumes at or below 100 s/mm² are used if there is a
        `.bval` beside a series, all volumes otherwise; those of a file are aligned rigidly and averaged. The grids may
        differ, and so may the phase-encoding axes.
    pe_dir : str, optional
        Phase encoding of `up`, as in BIDS ("j", "i-"); that of `down` is the opposite in the scanner. By default both
        are read from `PhaseEncodingDirection` in the sidecars.
    readout_time : float, optional
        Total readout time of both in s; by default `TotalReadoutTime` of the sidecars. Without it the correction is the
        same, but there is no field in Hz.
    mask : Path, optional
        Rough brain mask of `up` (above 0.5); computed from the image by default.
    structural : Path, optional
        Undistorted T2w or T1w of the same session: determines the part of the displacement that both blips share. The
        pose of the head may differ slightly.
    diffusion : bool
        Also compare the mean of the volumes of low b-value. Both files must be series corrected for head motion and
        eddy currents, with `.bval` and `.bvec` beside them.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".

    Returns
    -------
    Distortion
        In the space and on the grid of `up`; `poses[1]` is the pose of the head in `down`.

    Raises
    ------
    InputError
        If a file or argument cannot be used, or if `down` covers less than half of the brain in `up`.
    MetadataError
        If the phase encoding is unknown.
    """
    check_phase_encoding(pe_dir, "pe_dir")
    files = Path(up), Path(down)
    first, second = (_read(path) for path in files)
    grid = first[1]
    images = tuple(aligned_mean([(volume, g) for volume in volumes], g)[None] for volumes, g in (first, second))
    encodings = _encodings(files, (grid, second[1]), pe_dir, readout_time)
    blips = tuple(
        Blip("up" if pe.polarity > 0 else "down", pe, torch.zeros(0, *g.shape), g)
        for pe, g in zip(encodings, (grid, second[1]), strict=True)
    )
    brain = _mask(mask, grid) if mask else brain_mask_b0(Volume(images[0].mean(0), grid))
    _require_overlap(files, brain, second[1])
    anatomical = None if structural is None else read_volume(structural)
    means = _mean_diffusion(files, brain) if diffusion else ()

    def correct(*shown: torch.Tensor) -> Distortion:
        return correct_distortion(blips, shown[:2], grid, brain, DistortionSettings(), anatomical, shown[2:])

    return with_cpu_fallback(correct, choose(device), (*images, *means))


def write_pair(result: Distortion, folder: Path) -> None:
    """Write the correction into a folder.

    `dwiref.nii.gz` (both blips corrected and averaged), `up_before` and `up_after`, `down_before` and `down_after`,
    `fieldmap_hz.nii.gz`, `up_sdc.h5` and `down_sdc.h5` (ITK composites that resample `up` and `down` onto the
    undistorted grid, without the intensity modulation by the Jacobian), and `result.json` with the convergence.

    Parameters
    ----------
    result : Distortion
        From `correct_pair`.
    folder : Path
        Created if it does not exist.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be made ({problem.strerror}); choose another with -o") from None
    grid = result.dwiref.grid
    write_image(folder / "dwiref.nii.gz", result.dwiref.data, grid)
    if result.fieldmap_hz is not None:
        write_image(folder / "fieldmap_hz.nii.gz", result.fieldmap_hz.data, grid)
    for blip, name in enumerate(("up", "down")):
        write_image(folder / f"{name}_before.nii.gz", result.before[blip].data, grid)
        write_image(folder / f"{name}_after.nii.gz", result.after[blip].data, grid)
        write_composite_h5(folder / f"{name}_sdc.h5", sdc_chain(result.poses[blip], result.fields[blip], name))
    facts: dict[str, Any] = {"method": result.method, "notes": list(result.notes), "trace": result.trace}
    facts["diffusion"] = result.diffusion
    facts["pose_of_down"] = result.poses[1].tolist()
    (folder / "result.json").write_text(json.dumps(facts, indent=2) + "\n")


def _read(path: Path) -> tuple[torch.Tensor, Grid]:
    """The b=0 volumes of a file, (m, i, j, k)."""
    data, grid = read_image(path)
    volumes = data.reshape(-1, *grid.shape)
    table = path.with_name(_stem(path) + ".bval")
    if len(volumes) > 1 and table.is_file():
        bvals = read_bvals(table, len(volumes))
        require_b0(bvals, B0_THRESHOLD, str(table), fixed=True)
        volumes = np.ascontiguousarray(volumes[bvals <= B0_THRESHOLD])
    return torch.from_numpy(volumes), grid


def _mean_diffusion(files: tuple[Path, Path], mask: Volume) -> tuple[torch.Tensor, ...]:
    """Means of the low-b volumes that both series share, (i, j, k) each, on the grids of the series."""
    first, second = (_low_b(path) for path in files)
    bvals, bvecs = (np.concatenate([first[column], second[column]]) for column in (2, 3))
    count = len(first[2])
    pairs = np.array(low_b_pairs(bvals, bvecs, np.arange(len(bvals)) >= count, bvals <= B0_THRESHOLD))
    if not len(pairs):
        raise InputError(
            f"{files[0]} and {files[1]} have fewer than {MIN_PAIRS} volumes of b up to {LOW_B:g} s/mm² with the same "
            "gradients; omit --diffusion"
        )
    weights = np.maximum(first[0][pairs[:, 0]][:, mask.numpy() > 0.5].mean(1), 0)
    chosen = zip((first, second), (pairs[:, 0], pairs[:, 1] - count), strict=True)
    return tuple(
        torch.from_numpy(np.tensordot(weights, volumes[rows], 1).astype(np.float32)) / float(weights.sum())
        for (volumes, *_), rows in chosen
    )


def _low_b(path: Path) -> tuple[np.ndarray, Grid, np.ndarray, np.ndarray]:
    """The low-b volumes (n, i, j, k) of a series, their grid, b-values and b-vectors."""
    data, grid = read_series(path)
    bval, bvec = (path.with_name(_stem(path) + ending) for ending in (".bval", ".bvec"))
    bvals, bvecs = read_gradients(bval, bvec, grid, len(data), B0_THRESHOLD)
    low = bvals <= LOW_B
    return data[low], grid, bvals[low], bvecs[low]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _encodings(
    files: tuple[Path, Path], grids: tuple[Grid, Grid], pe_dir: str | None, readout_time: float | None
) -> tuple[PhaseEncoding, PhaseEncoding]:
    given = [{"PhaseEncodingDirection": d} if d else {} for d in (pe_dir, _opposite(pe_dir, grids))]
    known = {} if readout_time is None else {"TotalReadoutTime": readout_time}
    found = []
    for path, told in zip(files, given, strict=True):
        metadata = {**read_sidecar(path.with_name(_stem(path) + ".json")), **told, **known}
        pe = phase_encoding(metadata, path.name, "--readout-time and --pe-dir")[0]
        if pe is None:
            raise MetadataError(
                f"{path}: no PhaseEncodingDirection in {_stem(path)}.json; add it, or set that of --up with --pe-dir"
            )
        found.append(pe)
    if None in (found[0].readout_time, found[1].readout_time):
        found = [replace(pe, readout_time=None) for pe in found]
    return found[0], found[1]


def _opposite(direction: str | None, grids: tuple[Grid, Grid]) -> str | None:
    """The opposite direction in the scanner, along the axes of the second grid."""
    if direction is None:
        return None
    pe = PhaseEncoding.from_bids(direction)
    along = -pe.polarity * (grids[1].directions.T @ grids[0].directions[:, pe.axis])
    axis = int(np.argmax(np.abs(along)))
    return PhaseEncoding(axis, 1 if along[axis] > 0 else -1).direction


def _require_overlap(files: tuple[Path, Path], brain: Volume, other: Grid) -> None:
    """Refuse a second image that covers too little of the brain to estimate a field from."""
    reached = other.contains(brain.grid.to_world(np.argwhere(brain.numpy() > 0.5)))
    if reached.sum() < LEAST_SHARE * len(reached):
        raise InputError(
            f"{files[1]}: covers {reached.mean():.0%} of the brain in {files[0].name}; at least "
            f"{LEAST_SHARE:.0%} is needed: give a whole-brain image of the same session in the same scanner coordinates"
        )


def _mask(path: Path, grid: Grid) -> Volume:
    volume = read_volume(path)
    if not grid.matches(volume.grid):
        raise InputError(f"{path}: the mask is not on the grid of --up; resample it, or omit it")
    return volume
