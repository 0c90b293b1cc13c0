"""Blip-up/blip-down correction by DRBUDDI of TORTOISE V4, replacing the native stage.

Its input and output, according to its sources (github.com/QMICodeBase/TORTOISEV4, DRBUDDI_parserBase.cxx,
DRBUDDIBase.cxx and DRBUDDI.cxx): each NAME.nii needs a NAME.bmtxt with one row of six b-matrix entries per volume. A
JSON file contains the phase-encoding axis, whose sign is not used. The result is in the pose of the "up" image. DRBUDDI
works in the folder of the up image and writes there

- bdown_to_bup_rigidtrans.hdf5: points of up to points of down,
- deformation_FINV.nii.gz (up) and deformation_MINV.nii.gz (down): displacements in mm, LPS, on a finer grid, from the
  undistorted head to each image, the latter before its rigid transform.

So DRBUDDI finds point x in the down image at R (x + m(x)), and dsiprep at P x + u(x): P is R, and u is m rotated by R.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding, Unit
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
from dsiprep.stages.pair_geometry import PairGeometry
from dsiprep.stages.pair_images import finite_mean

METHODS = {
    "tortoise": (
        "Susceptibility distortion was estimated from b=0 images with opposite phase encoding by DRBUDDI "
        "[@irfanoglu2015] of TORTOISE V4, restricted to opposite displacements along the phase-encoding axis."
    )
}
"""doi 10.1016/j.neuroimage.2014.11.042."""

__all__ = ["METHODS", "check", "correct_distortion", "version"]

log = logging.getLogger("dsiprep")
OPTION = "--sdc-engine tortoise"
VARIABLE = "TORTOISE_HOME"
GPU_PROGRAM, CPU_PROGRAM = "DRBUDDI_cuda", "DRBUDDI"
UP, DOWN, RIGID = "deformation_FINV.nii.gz", "deformation_MINV.nii.gz", "bdown_to_bup_rigidtrans.hdf5"
FINE_MM, REFINEMENT = 1.0, 1.3  # DRBUDDI divides voxel sizes by this factor until their mean is at most FINE_MM
BYTES_PER_VOXEL = 460  # of that grid: 16 vector fields and 10 images in double precision, according to its CPU source
READOUT_TOLERANCE = 0.01  # relative difference up to which readout times count as equal
ASYMMETRY_MM = 0.5  # difference between the fields of both blips beyond which a note is added


def version() -> str:
    """Version recorded in the installation."""
    path = programs.find(CPU_PROGRAM, VARIABLE) or programs.find(GPU_PROGRAM, VARIABLE)
    folders = () if path is None else tuple(path.resolve().parents)[:3]
    recorded = next((file for folder in folders if (file := folder / "settings" / "version.txt").is_file()), None)
    return recorded.read_text().strip() if recorded else "TORTOISE of unknown version"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Check that DRBUDDI can run, before any long computation.

    Parameters
    ----------
    unit : Unit or None
        The memory needed depends on its series; None skips that check.
    settings : Settings
        Not used.
    device : torch.device
        On a GPU, DRBUDDI_cuda is used if it is installed.

    Raises
    ------
    EngineError
        If no suitable program is installed, or there is too little memory for DRBUDDI on the CPU.
    """
    if device.type == "cuda" and programs.find(GPU_PROGRAM, VARIABLE):
        return  # its GPU memory is not known in advance; a failure falls back to the CPU
    programs.require(CPU_PROGRAM, VARIABLE, "TORTOISE V4", OPTION)
    if unit is not None:
        header: Any = nib.load(unit.runs[0].image).header
        shape, sizes = np.array(header.get_data_shape()[:3]), np.array(header.get_zooms()[:3], float)
        fine = sizes / REFINEMENT ** max(0, np.ceil(np.log(sizes.mean() / FINE_MM) / np.log(REFINEMENT)))
        voxels = float(np.prod(shape * sizes / fine))
        consumer = f"{CPU_PROGRAM} on {voxels / 1e6:.0f} million voxels"
        programs.require_memory(voxels * BYTES_PER_VOXEL, consumer, OPTION)


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
    """Run DRBUDDI_cuda (for images on a GPU) or DRBUDDI in place of `dsiprep.stages.distortion.correct_distortion`.

    If DRBUDDI_cuda fails, DRBUDDI is run. If that fails too, or if the readout times of the blips differ, the native
    stage is run. The notes of the result report this.

    Parameters
    ----------
    blips, b0s, grid, mask, settings, diffusion
        As in the native stage; DRBUDDI only uses the b=0 images.
    folder : Path, optional
        In the work directory, for large files and logs.

    Returns
    -------
    Distortion
        `method` is "tortoise", or that of the native stage if it was used instead. The fields are exact opposites along
        the phase-encoding axis, computed from the mean of DRBUDDI's fields of both blips.

    Raises
    ------
    SettingsError, InputError
        As in the native stage.
    """
    geometry = distortion.check_pair(blips, b0s, grid, mask, settings)
    means = tuple(finite_mean(b).cpu() for b in b0s)
    notes: list[str] = []
    candidates: tuple[str, ...] = (GPU_PROGRAM, CPU_PROGRAM) if on_gpu(b0s) else (CPU_PROGRAM,)
    if not geometry.same_grid:
        notes, candidates = ["DRBUDDI assumes one grid and one axis of both blips, but they differ."], ()
    elif abs(sum(geometry.scales)) > READOUT_TOLERANCE:
        notes, candidates = ["DRBUDDI assumes equal readout times of both blips, but they differ."], ()
    for name in candidates:
        path = programs.find(name, VARIABLE)
        if path is None:
            notes.append(f"{name} is not installed.")
            continue
        try:
            with programs.working_directory("drbuddi", folder) as workspace:
                arguments = _write_inputs(workspace.folder, geometry.encodings[0], means, grid)
                environment = release_gpu(b0s[0].device) if name == GPU_PROGRAM else None
                programs.run([path, *arguments], workspace, environment)
                estimate = _read_outputs(workspace.folder, grid)
        except EngineError as problem:
            log.warning("%s", problem)
            notes.append(str(problem))
            continue
        notes.append(f"Distortion was estimated by {name} of {version()}.")
        return _result(geometry, means, mask, estimate, notes)
    notes.append("The native stage was used instead.")
    result = distortion.correct_distortion(blips, b0s, grid, mask, settings, diffusion=diffusion)
    return replace(result, notes=(*notes, *result.notes))


def on_gpu(images: tuple[torch.Tensor, ...]) -> bool:
    """Whether the images are in GPU memory."""
    return images[0].device.type == "cuda"


@dataclass(frozen=True, eq=False)
class _Estimate:
    """DRBUDDI's result on the grid of the b=0 images.

    Attributes
    ----------
    pose : ndarray, (4, 4)
        Of the down image, world RAS+ mm.
    up, down : Tensor, (3, i, j, k)
        Displacements in mm RAS+.
    """

    pose: np.ndarray
    up: torch.Tensor
    down: torch.Tensor


def _write_inputs(folder: Path, pe: PhaseEncoding, means: tuple[torch.Tensor, ...], grid: Grid) -> list[str | Path]:
    """Write the input files, reoriented to LPS+ like those of QSIPrep; return the command-line arguments."""
    order, flipped = lps_axes(grid)
    axis = order.index(pe.axis)
    polarity = -pe.polarity if flipped[axis] else pe.polarity
    for name, image in zip(("up", "down"), means, strict=True):
        data, reoriented = to_lps(image.numpy(), grid)
        write_image(folder / f"{name}.nii", data, reoriented)
        (folder / f"{name}.bmtxt").write_text("0 0 0 0 0 0\n")
    sidecar = {"PhaseEncodingDirection": "ijk"[axis] + ("-" if polarity < 0 else "")}
    (folder / "up.json").write_text(json.dumps(sidecar))
    # without this option its last two stages displace in all directions, and differently for the two blips
    return ["-u", folder / "up.nii", "-d", folder / "down.nii", "--up_json", folder / "up.json",
            "--enforce_full_symmetry", "1"]  # fmt: skip


def _read_outputs(folder: Path, grid: Grid) -> _Estimate:
    """Read pose and displacements, resampled onto `grid`."""
    fields = []
    try:
        for name in (UP, DOWN):
            field = displacement_of(read_vectors(folder / name))
            fields.append(resample_onto(field.data, field.grid, grid))
        rigid = read_composite_h5(folder / RIGID, "down", "up").steps
    except InputError as problem:
        raise EngineError(f"DRBUDDI ended without an error, but its output cannot be read: {problem}") from problem
    if len(rigid) != 1 or not isinstance(rigid[0], Affine):
        raise EngineError(f"DRBUDDI wrote {len(rigid)} transforms to {RIGID}; expected one rigid transform")
    pose = rigid[0].matrix
    rotation = torch.as_tensor(pose[:3, :3], dtype=torch.float32)
    return _Estimate(pose, fields[0], torch.einsum("ab,bijk->aijk", rotation, fields[1]))


def _result(
    geometry: PairGeometry,
    means: tuple[torch.Tensor, ...],
    mask: Volume,
    estimate: _Estimate,
    notes: list[str],
) -> Distortion:
    grid, first = mask.grid, geometry.encodings[0]
    axis = torch.as_tensor(grid.directions[:, first.axis], dtype=torch.float32)
    along = [torch.einsum("a,aijk->ijk", axis, u) for u in (estimate.up, estimate.down)]
    field = first.polarity * (along[0] - along[1]) / 2  # mm towards +axis per unit of polarity
    inside = mask.numpy() > 0.5
    asymmetry = float((along[0] + along[1]).abs().numpy()[inside].max())
    if asymmetry > ASYMMETRY_MM:
        notes.append(f"DRBUDDI's fields of both blips differ by up to {asymmetry:.1f} mm; their mean was used.")
    vectors = field * axis[:, None, None, None]
    fields = tuple(DisplacementField(sign * vectors, grid) for sign in (first.polarity, -first.polarity))
    poses = np.stack([np.eye(4), estimate.pose])
    after = [
        warp_volume(image, grid, grid, pose, sample_displacement(displacement, grid, np.eye(4)), pose[:3, :3])
        for image, pose, displacement in zip(means, poses, fields, strict=True)
    ]
    medians = [float(np.median(image.numpy()[inside])) for image in after]
    gain = medians[0] / medians[1] if min(medians) > 0 else 1.0
    return Distortion(
        poses=poses,
        fields=fields,
        fieldmap_hz=distortion.fieldmap_hz(field, geometry),
        dwiref=Volume((after[0] + gain * after[1]) / 2, grid),
        before=tuple(Volume(image, grid) for image in means),
        after=tuple(Volume(image, grid) for image in after),
        trace=[],
        method="tortoise",
        notes=tuple(notes),
    )
