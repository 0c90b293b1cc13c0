"""Blip-up/blip-down correction by DRBUDDI of TORTOISE V4, in place of the native stage.

What the program wants and leaves, read from its sources (github.com/QMICodeBase/TORTOISEV4, DRBUDDI_parserBase.cxx,
DRBUDDIBase.cxx and DRBUDDI.cxx): beside NAME.nii lies NAME.bmtxt, one row of six b-matrix entries per volume; a JSON
file tells the phase-encoding axis, of which the sign is not used; "up" is the image whose pose the result has. It works
in the folder of the up image, where it writes bdown_to_bup_rigidtrans.hdf5, points of up to points of down, and
deformation_FINV.nii.gz (up) and deformation_MINV.nii.gz (down): displacements in mm, LPS, on a finer grid of its own,
from the undistorted head to each image, the latter before its rigid transform. So a point x lies in the down image at
R (x + m(x)), where dsiprep has P x + u(x): P is R, and u is m turned by R.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.data.transform import Affine, DisplacementField
from dsiprep.device import release_gpu
from dsiprep.engines import external_programs as programs
from dsiprep.errors import EngineError, InputError
from dsiprep.io.itk import displacement_of, read_composite_h5
from dsiprep.io.nifti import lps_axes, to_lps, write_image
from dsiprep.io.vector_image import read_vectors
from dsiprep.ops.image.epi_resampling import sample_displacement, warp_volume
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.settings import DistortionSettings, Settings
from dsiprep.stages import distortion

METHODS = {
    "tortoise": (
        "Susceptibility distortion was estimated from b=0 images with opposite phase encoding by DRBUDDI "
        "[@irfanoglu2015] of TORTOISE V4, restricted to displacements along the phase-encoding axis that are opposites."
    )
}
"""doi 10.1016/j.neuroimage.2014.11.042."""

__all__ = ["METHODS", "check", "correct_distortion", "version"]

log = logging.getLogger("dsiprep")
OPTION = "--sdc-engine tortoise"
VARIABLE = "TORTOISE_HOME"
ON_GPU, ON_CPU = "DRBUDDI_cuda", "DRBUDDI"
UP, DOWN, RIGID = "deformation_FINV.nii.gz", "deformation_MINV.nii.gz", "bdown_to_bup_rigidtrans.hdf5"
FINEST_MM, REFINED = 1.0, 1.3  # voxels are made smaller by this factor until their mean size is at most so many mm
BYTES_A_VOXEL = 460  # of that grid: 16 vector fields and 10 images in double precision, as its CPU source holds them
SAME_READOUT = 0.01  # relative difference up to which readout times count as equal
UNLIKE_MM = 0.5  # difference between the fields of both blips that is worth a note


def version() -> str:
    """As the installation tells it."""
    path = programs.find(ON_CPU, VARIABLE) or programs.find(ON_GPU, VARIABLE)
    places = () if path is None else tuple(path.resolve().parents)[:3]
    told = next((file for place in places if (file := place / "settings" / "version.txt").is_file()), None)
    return told.read_text().strip() if told else "TORTOISE of unknown version"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Whether it can run, before anything long is begun.

    Parameters
    ----------
    unit : Unit or None
        Its series tells how much memory is wanted.
    settings : Settings
        Not looked at.
    device : torch.device
        A GPU takes DRBUDDI_cuda where that is installed.

    Raises
    ------
    EngineError
        If neither program is there, or memory is too small for the one on the CPU.
    """
    if device.type == "cuda" and programs.find(ON_GPU, VARIABLE):
        return  # how much of the GPU it takes shows only as it runs; it falls back
    programs.require(ON_CPU, VARIABLE, "TORTOISE V4", OPTION)
    if unit is not None:
        header: Any = nib.load(unit.runs[0].image).header
        shape, sizes = np.array(header.get_data_shape()[:3]), np.array(header.get_zooms()[:3], float)
        fine = sizes / REFINED ** max(0, np.ceil(np.log(sizes.mean() / FINEST_MM) / np.log(REFINED)))
        voxels = float(np.prod(shape * sizes / fine))
        programs.require_memory(voxels * BYTES_A_VOXEL, f"{ON_CPU} on {voxels / 1e6:.0f} million voxels", OPTION)


def correct_distortion(
    blips: tuple[Blip, ...],
    b0s: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    settings: DistortionSettings,
    *,
    diffusion: tuple[torch.Tensor, ...] = (),
    folder: Path | None = None,
) -> Distortion:
    """As `dsiprep.stages.distortion.correct_distortion`, by DRBUDDI_cuda for images on a GPU, else by DRBUDDI.

    Where the first fails the second is tried, and where both fail the native stage, each with a note in the result.

    Parameters
    ----------
    blips, b0s, grid, mask, settings, diffusion
        As there; DRBUDDI is given the b=0 images alone.
    folder : Path, optional
        Of the work directory: for large files, and for the logs.

    Returns
    -------
    Distortion
        `method` is "tortoise"; that of the native stage where that had to step in. Both fields are opposites along the
        phase-encoding axis, from the mean of what DRBUDDI found for each blip.

    Raises
    ------
    SettingsError, InputError
        As the native stage.
    """
    distortion.checked_pair(blips, b0s, grid, mask, settings)
    notes: list[str] = []
    times = [blip.pe.readout_time or 1.0 for blip in blips if blip.pe]
    if abs(times[0] - times[1]) > SAME_READOUT * max(times):
        notes = ["The native stage stepped in: DRBUDDI takes the readout times of both blips for equal; they differ."]
        return _natively(blips, b0s, grid, mask, settings, diffusion, notes)
    means = tuple(distortion.finite_mean(b).cpu() for b in b0s)
    for name in (ON_GPU, ON_CPU) if on_gpu(b0s) else (ON_CPU,):
        path = programs.find(name, VARIABLE)
        if path is None:
            notes.append(f"{name} is not installed.")
            continue
        try:
            with programs.workplace("drbuddi", folder) as place:
                words = _write(place.folder, blips[0], means, grid)
                programs.run([path, *words], place, release_gpu(b0s[0].device) if name == ON_GPU else None)
                found = _read(place.folder, grid)
        except EngineError as problem:
            log.warning("%s", problem)
            notes.append(str(problem))
            continue
        notes.append(f"Distortion was estimated by {name} of {version()}.")
        return _result(blips, means, grid, mask, found, notes)
    return _natively(blips, b0s, grid, mask, settings, diffusion, [*notes, "The native stage stepped in."])


def on_gpu(images: tuple[torch.Tensor, ...]) -> bool:
    """Whether the images lie on a GPU, so that its program is to take them."""
    return images[0].device.type == "cuda"


def _natively(
    blips: tuple[Blip, ...],
    b0s: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    settings: DistortionSettings,
    diffusion: tuple[torch.Tensor, ...],
    notes: list[str],
) -> Distortion:
    result = distortion.correct_distortion(blips, b0s, grid, mask, settings, diffusion=diffusion)
    return replace(result, notes=(*notes, *result.notes))


def _write(folder: Path, first: Blip, means: tuple[torch.Tensor, ...], grid: Grid) -> list[str | Path]:
    """The input files, turned to LPS+ axes as those of QSIPrep's are, and the arguments."""
    assert first.pe is not None
    order, flipped = lps_axes(grid)
    axis = order.index(first.pe.axis)
    polarity = -first.pe.polarity if flipped[axis] else first.pe.polarity
    for name, image in zip(("up", "down"), means, strict=True):
        data, turned = to_lps(image.numpy(), grid)
        write_image(folder / f"{name}.nii", data, turned)
        (folder / f"{name}.bmtxt").write_text("0 0 0 0 0 0\n")
    sidecar = {"PhaseEncodingDirection": "ijk"[axis] + ("-" if polarity < 0 else "")}
    (folder / "up.json").write_text(json.dumps(sidecar))
    # the last two of its stages bend space in all directions, and not alike for both blips, unless it is told
    return ["-u", folder / "up.nii", "-d", folder / "down.nii", "--up_json", folder / "up.json",
            "--enforce_full_symmetry", "1"]  # fmt: skip


def _read(folder: Path, grid: Grid) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """The pose of the down image, and the displacements of up and down in mm RAS+, (3, i, j, k) on `grid`."""
    fields = []
    try:
        for name in (UP, DOWN):
            field = displacement_of(read_vectors(folder / name))
            fields.append(resample_onto(field.data, field.grid, grid))
        rigid = read_composite_h5(folder / RIGID, "down", "up").steps
    except InputError as problem:
        raise EngineError(f"DRBUDDI ended well, but what it left cannot be read: {problem}") from problem
    if len(rigid) != 1 or not isinstance(rigid[0], Affine):
        raise EngineError(f"DRBUDDI left {len(rigid)} transforms in {RIGID}; one rigid transform was expected")
    pose = rigid[0].matrix
    turn = torch.as_tensor(pose[:3, :3], dtype=torch.float32)
    return pose, fields[0], torch.einsum("ab,bijk->aijk", turn, fields[1])


def _result(
    blips: tuple[Blip, ...],
    means: tuple[torch.Tensor, ...],
    grid: Grid,
    mask: Volume,
    found: tuple[np.ndarray, torch.Tensor, torch.Tensor],
    notes: list[str],
) -> Distortion:
    first, second = (blip.pe for blip in blips)
    assert first is not None and second is not None
    pose, *displacements = found
    axis = torch.as_tensor(grid.directions[:, first.axis], dtype=torch.float32)
    along = [torch.einsum("a,aijk->ijk", axis, u) for u in displacements]
    opposite = first.polarity * (along[0] - along[1]) / 2  # mm towards +axis per unit of polarity
    inside = mask.numpy() > 0.5
    unlike = float((along[0] + along[1]).abs().numpy()[inside].max())
    if unlike > UNLIKE_MM:
        notes.append(f"DRBUDDI's fields of both blips differ by up to {unlike:.1f} mm; their mean was taken.")
    vectors = opposite * axis[:, None, None, None]
    fields = tuple(DisplacementField(pe.polarity * vectors, grid) for pe in (first, second))
    poses = np.stack([np.eye(4), pose])
    after = [
        warp_volume(image, grid, grid, p, sample_displacement(field, grid, np.eye(4)), p[:3, :3])
        for image, p, field in zip(means, poses, fields, strict=True)
    ]
    medians = [float(np.median(image.numpy()[inside])) for image in after]
    gain = medians[0] / medians[1] if min(medians) > 0 else 1.0
    readout = None if first.readout_time is None else (first.readout_time + (second.readout_time or 0)) / 2
    hertz = None if readout is None else opposite / (float(grid.voxel_sizes[first.axis]) * readout)
    return Distortion(
        poses=poses,
        fields=fields,
        fieldmap_hz=None if hertz is None else Volume(hertz, grid),
        dwiref=Volume((after[0] + gain * after[1]) / 2, grid),
        before=tuple(Volume(image, grid) for image in means),
        after=tuple(Volume(image, grid) for image in after),
        trace=[],
        method="tortoise",
        notes=tuple(notes),
    )
