"""Brain extraction, tissue segmentation and normalisation with SynthStrip, SynthSeg and SynthMorph of FreeSurfer 7.4+.

Command lines and outputs follow the sources (github.com/freesurfer/freesurfer: mri_synthstrip, mri_synthseg,
mri_synthmorph). SynthSeg uses a GPU unless --cpu is given, the other programs only with -g. SynthMorph of FreeSurfer 8
performs affine and nonlinear registration in one run (-m joint) and writes the inverse with -T; earlier versions need
two runs, write the affine transform as a text file of four rows, and write no inverse. The version is detected from the
program's help text. In all versions, warps are defined on the grid of the fixed image and contain RAS displacements.
With -g, SynthStrip always uses the first visible GPU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import Chain, DisplacementField
from dsiprep.device import free_bytes, release_gpu
from dsiprep.engines import external_programs as programs
from dsiprep.errors import EngineError, InputError
from dsiprep.io.freesurfer import read_warp
from dsiprep.io.nifti import read_volume, write_image
from dsiprep.ops.image.displacement_field import chain_points_back, prefilter
from dsiprep.ops.image.interpolation import resample_onto, voxel_points
from dsiprep.settings import AnatomySettings, Settings

METHODS = {
    "freesurfer": (
        "The brain was extracted with SynthStrip [@hoopes2022], and cerebrospinal fluid, grey matter and white matter "
        "were segmented with SynthSeg [@billot2023], both of FreeSurfer."
    ),
    "synthmorph": "The brain was registered to the template with SynthMorph of FreeSurfer [@hoffmann2022].",
}
"""SynthStrip: doi 10.1016/j.neuroimage.2022.119474. SynthSeg: doi 10.1016/j.media.2023.102789; robust: doi
10.1073/pnas.2216399120. SynthMorph: doi 10.1109/TMI.2021.3116879."""

__all__ = ["METHODS", "TISSUES", "brain_mask", "check", "inverse_on", "normalise", "segment", "version"]

HOME = "FREESURFER_HOME"
PACKAGE = "FreeSurfer 7.4 or later"
STRIP, SEG, MORPH = "mri_synthstrip", "mri_synthseg", "mri_synthmorph"
ANATOMICAL = "--anat-engine freesurfer"
OPTIONS = {STRIP: ANATOMICAL, SEG: ANATOMICAL, MORPH: "--normalization-engine synthmorph"}
# SynthStrip: as requested by MRIQC (nipreps/mriqc#1447). SynthSeg: 12 GB without robust mode and parcellation, more
# with either (BBillot/SynthSeg#58). SynthMorph: estimated from its network, in which a layer of 256 features at half
# the resolution of 256 voxels per axis takes 2.1 GB, and the concatenation of two layers 4.3 GB.
REQUIRED_BYTES = {STRIP: 6e9, SEG: 12e9, MORPH: 16e9}
SYNTHSEG_FACTOR = 1.5  # multiplies the memory of SynthSeg for its robust mode or the parcellation
TISSUES = {  # FreeSurfer labels per tissue class; brain stem and ventral diencephalon count as white matter
    "CSF": (4, 5, 14, 15, 24, 43, 44),
    "GM": (3, 8, 10, 11, 12, 13, 17, 18, 26, 42, 47, 49, 50, 51, 52, 53, 54, 58),
    "WM": (2, 7, 16, 28, 41, 46, 60),
}
MIN_PARCELLATION_LABEL = 1000  # labels above it are cortical parcels
SLAB = 64  # planes inverted at once


def version() -> str:
    """FreeSurfer version from the stamp of the installation, such as "FreeSurfer 7.4.1"."""
    stamp = Path(os.environ.get(HOME, "")) / "build-stamp.txt"
    match = re.search(r"\d+\.\d+\.\d+", stamp.read_text()) if os.environ.get(HOME) and stamp.is_file() else None
    return f"FreeSurfer {match[0] if match else 'of unknown version'}"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Check, before processing starts, that programs, licence and memory are available.

    Parameters
    ----------
    unit : Unit or None
        Not used: the networks resample every image to 1 mm.
    settings : Settings
    device : torch.device
        Device whose free memory is checked.

    Raises
    ------
    EngineError
        If something is missing.
    """
    required = [STRIP, SEG] if settings.anatomy.engine == "freesurfer" else []
    if settings.anatomy.normalizer == "synthmorph":
        required.append(MORPH)
    if not os.environ.get(HOME):
        raise EngineError(
            f"{OPTIONS[required[0]]}: {HOME} is not set; source SetUpFreeSurfer.sh of {PACKAGE}, or use the native "
            "engine, which needs no other software"
        )
    for program in required:
        programs.require(program, HOME, PACKAGE, OPTIONS[program])
    _require_licence(OPTIONS[required[0]])
    for program in required:
        needed = REQUIRED_BYTES[program]
        if program == SEG and (settings.anatomy.synthseg_robust or settings.anatomy.synthseg_parc):
            needed *= SYNTHSEG_FACTOR
        _require_memory(needed, program, device)


def _require_memory(needed: float, program: str, device: torch.device) -> None:
    if device.type == "cpu":
        programs.require_memory(needed, program, OPTIONS[program])
    elif free_bytes(device) < needed:
        raise EngineError(
            f"{OPTIONS[program]}: {program} needs about {needed / 1e9:.0f} GB of GPU memory, and "
            f"{free_bytes(device) / 1e9:.1f} GB are free; use --device cpu or the native engine"
        )


def _require_licence(option: str) -> None:
    """Look for the licence where FreeSurfer does: in FS_LICENSE if that is set, otherwise in its own folder."""
    path, home = os.environ.get("FS_LICENSE"), Path(os.environ.get(HOME, ""))
    candidates = [Path(path)] if path else [home / "license.txt", home / ".license"]
    if not any(candidate.is_file() and candidate.stat().st_size > 0 for candidate in candidates):
        raise EngineError(
            f"{option}: the FreeSurfer licence is not in {candidates[0]}; get one for free from "
            "https://surfer.nmr.mgh.harvard.edu/registration.html and give the file with --fs-license-file"
        )


def brain_mask(volume: Volume, *, folder: Path | None = None) -> Volume:
    """Brain mask of a structural image by SynthStrip; replaces `dsiprep.ops.intensity.brain_mask.brain_mask_t1w`.

    Parameters
    ----------
    volume : Volume
        Structural image of any contrast.
    folder : Path, optional
        Work folder, for the log.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device.

    Raises
    ------
    EngineError
        If the program fails.
    """
    device = volume.data.device
    with programs.working_directory("synthstrip", folder) as directory:
        image, mask = directory.folder / "image.nii.gz", directory.folder / "mask.nii.gz"
        write_image(image, volume.data, volume.grid)
        gpu: list[str | Path] = ["-g"] if on_gpu(volume) else []
        _run(STRIP, ["-i", image, "-m", mask, *gpu], directory, device)
        result = _read(mask, STRIP)
    if not result.grid.matches(volume.grid):
        raise EngineError(f"{STRIP} wrote a mask on a different grid from the image; is the installation complete?")
    return Volume((result.data > 0.5).float().to(device), volume.grid)


def segment(
    volume: Volume,
    mask: Volume,
    priors: torch.Tensor | None = None,
    *,
    robust: bool = False,
    parc: bool = False,
    folder: Path | None = None,
) -> tuple[torch.Tensor, Volume]:
    """Tissue classes and labels by SynthSeg.

    Replaces `dsiprep.ops.intensity.tissue_segmentation.segment_tissue`.

    Parameters
    ----------
    volume : Volume
        Structural image of any contrast, not skull-stripped.
    mask : Volume
        Brain mask (above 0.5).
    priors : Tensor, optional
        Not used.
    robust, parc : bool
        Options of SynthSeg with the same names.
    folder : Path, optional
        Work folder, for the log.

    Returns
    -------
    tissue : Tensor, (3, i, j, k), float32
        Fractions of CSF, GM and WM, from labels at 1 mm. They sum to 1 in the mask and are 0 outside. Background inside
        the mask counts as CSF.
    labels : Volume
        Labels of structures in FreeSurfer's numbering, resampled to the same grid by nearest neighbour.

    Raises
    ------
    EngineError
        If the program fails, or finds no grey and white matter.
    """
    device = volume.data.device
    with programs.working_directory("synthseg", folder) as directory:
        image, label_file = directory.folder / "image.nii.gz", directory.folder / "labels.nii.gz"
        write_image(image, volume.data, volume.grid)
        modes = [*(["--robust"] if robust else []), *(["--parc"] if parc else [])]
        cpu = [] if on_gpu(volume) else ["--cpu"]
        threads = str(torch.get_num_threads())
        arguments: list[str | Path] = ["--i", image, "--o", label_file, "--threads", threads, *modes, *cpu]
        _run(SEG, arguments, directory, device)
        labels = _read(label_file, SEG)
    inside = mask.data.cpu() > 0.5
    fractions = resample_onto(_tissue_masks(labels.data.round().int()), labels.grid, volume.grid) * inside
    if not bool((fractions[1:].sum(0) > 0).any()):
        raise EngineError(f"{SEG} found no grey or white matter inside the brain mask; check the image and the mask")
    fractions /= fractions.sum(0).clamp(min=1.0)
    fractions[0] += (1 - fractions.sum(0)) * inside
    return fractions.to(device), Volume(_nearest(labels, volume.grid).to(device), volume.grid)


def _tissue_masks(labels: torch.Tensor) -> torch.Tensor:
    """One binary volume per tissue class, (3, i, j, k)."""
    masks = [torch.isin(labels, torch.tensor(numbers, dtype=labels.dtype)) for numbers in TISSUES.values()]
    masks[1] |= labels > MIN_PARCELLATION_LABEL
    return torch.stack(masks).float()


def _nearest(labels: Volume, target: Grid) -> torch.Tensor:
    """Nearest-neighbour labels at the voxels of another grid; 0 outside."""
    voxels = voxel_points(target, labels.grid).round().long()
    size = torch.tensor(labels.grid.shape)[:, None, None, None]
    inside = ((voxels >= 0) & (voxels < size)).all(0)
    i, j, k = voxels.clamp(min=0).minimum(size - 1)
    return labels.data[i, j, k] * inside


def normalise(
    brain: Volume,
    template: Template,
    region: Volume,
    initial: np.ndarray,
    settings: AnatomySettings,
    *,
    folder: Path | None = None,
) -> tuple[Chain, Chain]:
    """ACPC to template and back by SynthMorph; parameters and result as in `dsiprep.engines.ants.normalise`.

    `region`, `initial` and `settings` are not used: SynthMorph estimates the affine part itself, without a mask. Each
    chain is one displacement field: `forward` on the grid of the template, `back` on that of `brain`.

    Raises
    ------
    EngineError
        If the program fails, or its output cannot be read.
    """
    device = brain.data.device
    with programs.working_directory("synthmorph", folder) as directory:
        files = {name: directory.folder / f"{name}.nii.gz" for name in ("moving", "fixed", "forward", "back")}
        write_image(files["moving"], brain.data, brain.grid)
        write_image(files["fixed"], template.brain.data, template.brain.grid)
        gpu = ["-g"] if on_gpu(brain) else []
        common: list[str | Path] = ["-j", str(torch.get_num_threads()), *gpu, files["moving"], files["fixed"]]
        if _has_joint_model(directory):
            arguments: list[str | Path] = ["-m", "joint", "-t", files["forward"], "-T", files["back"], *common]
            _run(MORPH, arguments, directory, device)
        else:
            affine = directory.folder / "affine.txt"
            _run(MORPH, ["-m", "affine", "-t", affine, *common], directory, device)
            _run(MORPH, ["-m", "deform", "-i", affine, "-t", files["forward"], *common], directory, device)
        forward = _read_field(files["forward"], template.brain.grid)
        back = _read_field(files["back"], brain.grid) if files["back"].is_file() else inverse_on(forward, brain.grid)
    return Chain((forward,), "ACPC", template.name), Chain((back,), template.name, "ACPC")


def on_gpu(volume: Volume) -> bool:
    """Whether a volume is on a GPU, so that the programs should use it too."""
    return volume.data.device.type == "cuda"


def _has_joint_model(directory: programs.WorkingDirectory) -> bool:
    """Whether this SynthMorph has the joint model, according to its help text (exit status 0 or 1)."""
    path = programs.require(MORPH, HOME, PACKAGE, OPTIONS[MORPH])
    return "joint" in programs.run([path, "register", "-h"], directory, name=f"{MORPH}-help", ok_statuses=(0, 1))


def _run(program: str, arguments: list[str | Path], directory: programs.WorkingDirectory, device: torch.device) -> None:
    path = programs.require(program, HOME, PACKAGE, OPTIONS[program])
    programs.run([path, *arguments], directory, release_gpu(device))


def _read(path: Path, program: str) -> Volume:
    try:
        return read_volume(path)
    except InputError as error:
        raise EngineError(f"{program} finished, but its output cannot be read: {error}") from error


def _read_field(path: Path, grid: Grid) -> DisplacementField:
    """Read a warp of SynthMorph, which must be on `grid`."""
    try:
        field = read_warp(path).field
    except InputError as error:
        raise EngineError(f"{MORPH} finished, but its output cannot be read: {error}") from error
    if not field.grid.matches(grid, tolerance=0.01):
        raise EngineError(f"{MORPH} wrote a warp on a different grid from its image; is the installation complete?")
    return field


def inverse_on(forward: DisplacementField, grid: Grid) -> DisplacementField:
    """Inverse of a displacement field on the grid of the moving image, computed in slabs to limit memory.

    Parameters
    ----------
    forward : DisplacementField
        Points of the fixed image to points of the moving image.
    grid : Grid
        Grid of the moving image, on which the inverse is defined.

    Returns
    -------
    DisplacementField
        Points of the moving image to points of the fixed image.
    """
    data = np.empty((3, *grid.shape), np.float32)
    chain = Chain((forward,), "moving", "fixed")
    for part in np.array_split(np.arange(grid.shape[0]), max(1, grid.shape[0] // SLAB)):
        voxels = np.moveaxis(np.indices((len(part), *grid.shape[1:])), 0, -1).reshape(-1, 3)
        points = grid.to_world(voxels + np.array([part[0], 0, 0]))
        shift = chain_points_back(chain, points) - points
        data[:, part] = shift.T.reshape(3, len(part), *grid.shape[1:])
    return prefilter(DisplacementField(torch.from_numpy(data), grid))
