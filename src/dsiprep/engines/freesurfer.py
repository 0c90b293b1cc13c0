"""Brain, tissue and normalisation by FreeSurfer 7.4 or later: SynthStrip, SynthSeg and SynthMorph.

Command lines and outputs are those of its sources (github.com/freesurfer/freesurfer: mri_synthstrip, mri_synthseg,
mri_synthmorph). SynthSeg takes a GPU unless it is told --cpu, the others only when told -g. SynthMorph of FreeSurfer 8
registers affinely and nonlinearly in one go (-m joint) and writes the way back with -T; earlier ones want
two goes, the affine one as a text of four rows, and write no way back. Which it is, its own help tells. Warps lie on
the fixed image's grid and hold RAS displacements in both. With -g, SynthStrip takes the first GPU of the machine,
whichever was asked for.
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
from dsiprep.ops.image.displacement_field import chain_points_back, fit_between
from dsiprep.ops.image.interpolation import resample_onto, voxel_points
from dsiprep.settings import AnatomySettings, Settings

METHODS = {
    "freesurfer": (
        "The brain was found by SynthStrip [@hoopes2022], and cerebrospinal fluid, grey and white matter by "
        "SynthSeg [@billot2023], both of FreeSurfer."
    ),
    "synthmorph": "The brain was registered to the template by SynthMorph of FreeSurfer [@hoffmann2022].",
}
"""SynthStrip: doi 10.1016/j.neuroimage.2022.119474. SynthSeg: doi 10.1016/j.media.2023.102789; robust: doi
10.1073/pnas.2216399120. SynthMorph: doi 10.1109/TMI.2021.3116879."""

__all__ = ["METHODS", "TISSUES", "brain_mask", "check", "inverse_on", "normalise", "segment", "version"]

HOME = "FREESURFER_HOME"
STRIP, SEG, MORPH = "mri_synthstrip", "mri_synthseg", "mri_synthmorph"
ANATOMICAL = "--anat-engine freesurfer"
OPTIONS = {STRIP: ANATOMICAL, SEG: ANATOMICAL, MORPH: "--normalization-engine synthmorph"}
# SynthStrip: what MRIQC asks for (nipreps/mriqc#1447). SynthSeg: 12 GB without the robust mode and the parcellation, a
# larger GPU with either (BBillot/SynthSeg#58). SynthMorph: counted from its network, whose layers of 256 features on
# half of 256 voxels along each axis take 2.1 GB each, and 4.3 GB where two are joined.
NEEDED = {STRIP: 6e9, SEG: 12e9, MORPH: 16e9}
MORE = 1.5  # times the memory of SynthSeg for its robust mode or the parcellation
TISSUES = {  # FreeSurfer's labels, in the order of the tissues; brain stem and ventral diencephalon are mostly white
    "CSF": (4, 5, 14, 15, 24, 43, 44),
    "GM": (3, 8, 10, 11, 12, 13, 17, 18, 26, 42, 47, 49, 50, 51, 52, 53, 54, 58),
    "WM": (2, 7, 16, 28, 41, 46, 60),
}
CORTEX = 1000  # and above: parts of the cortex
SLAB = 64  # planes that are inverted at once


def version() -> str:
    """From the stamp of the installation: "FreeSurfer 7.4.1"."""
    stamp = Path(os.environ.get(HOME, "")) / "build-stamp.txt"
    told = re.search(r"\d+\.\d+\.\d+", stamp.read_text()) if os.environ.get(HOME) and stamp.is_file() else None
    return f"FreeSurfer {told[0] if told else 'of unknown version'}"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Whether programs, licence and memory are there, before anything long is begun.

    Parameters
    ----------
    unit : Unit or None
        Not looked at: the networks take all images as 1 mm.
    settings : Settings
    device : torch.device
        Whose memory is looked at.

    Raises
    ------
    EngineError
        If something is missing.
    """
    wanted = [STRIP, SEG] if settings.anatomy.engine == "freesurfer" else []
    if settings.anatomy.normalizer == "synthmorph":
        wanted.append(MORPH)
    if not os.environ.get(HOME):
        raise EngineError(
            f"{OPTIONS[wanted[0]]}: {HOME} is not set; source SetUpFreeSurfer.sh of FreeSurfer 7.4 or later, or take "
            "the native engine, which needs nothing"
        )
    for program in wanted:
        programs.require(program, HOME, "FreeSurfer 7.4 or later", OPTIONS[program])
    _require_licence(OPTIONS[wanted[0]])
    for program in wanted:
        needed = NEEDED[program]
        if program == SEG and (settings.anatomy.synthseg_robust or settings.anatomy.synthseg_parc):
            needed *= MORE
        _require_memory(needed, program, device)


def _require_memory(needed: float, program: str, device: torch.device) -> None:
    if device.type == "cpu":
        programs.require_memory(needed, program, OPTIONS[program])
    elif free_bytes(device) < needed:
        raise EngineError(
            f"{OPTIONS[program]}: {program} needs about {needed / 1e9:.0f} GB of the GPU, and "
            f"{free_bytes(device) / 1e9:.1f} GB are free; take --device cpu, or the native engine"
        )


def _require_licence(option: str) -> None:
    """As FreeSurfer looks for it: where FS_LICENSE points, else in its own folder."""
    named, home = os.environ.get("FS_LICENSE"), Path(os.environ.get(HOME, ""))
    places = [Path(named)] if named else [home / "license.txt", home / ".license"]
    if not any(place.is_file() and place.stat().st_size > 0 for place in places):
        raise EngineError(
            f"{option}: FreeSurfer's licence is not in {places[0]}; it is free, from "
            "https://surfer.nmr.mgh.harvard.edu/registration.html: name the file with --fs-license-file"
        )


def brain_mask(volume: Volume, *, folder: Path | None = None) -> Volume:
    """Brain in a structural image, by SynthStrip; in place of `dsiprep.ops.intensity.brain_mask.brain_mask_t1w`.

    Parameters
    ----------
    volume : Volume
        Of any contrast.
    folder : Path, optional
        Of the work directory, for the log.

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
    with programs.workplace("synthstrip", folder) as place:
        image, mask = place.folder / "image.nii.gz", place.folder / "mask.nii.gz"
        write_image(image, volume.data, volume.grid)
        gpu: list[str | Path] = ["-g"] if on_gpu(volume) else []
        _run(STRIP, ["-i", image, "-m", mask, *gpu], place, device)
        found = _read(mask, STRIP)
    if not found.grid.matches(volume.grid):
        raise EngineError(f"{STRIP} wrote a mask on another grid than that of the image; is its installation whole?")
    return Volume((found.data > 0.5).float().to(device), volume.grid)


def segment(
    volume: Volume,
    mask: Volume,
    priors: torch.Tensor | None = None,
    *,
    robust: bool = False,
    parc: bool = False,
    folder: Path | None = None,
) -> tuple[torch.Tensor, Volume]:
    """CSF, GM and WM by SynthSeg, and its labels; in place of `dsiprep.ops.intensity.tissue_segmentation.segment_tissue`.

    Parameters
    ----------
    volume : Volume
        Structural image of any contrast, with its skull.
    mask : Volume
        Brain (above 0.5).
    priors : Tensor, optional
        Not looked at.
    robust, parc : bool
        SynthSeg's modes of the same names.
    folder : Path, optional
        Of the work directory, for the log.

    Returns
    -------
    tissue : Tensor, (3, i, j, k), float32
        Shares of the tissues, from labels at 1 mm; they sum to 1 in the mask, and are 0 outside. What SynthSeg calls
        background in there is CSF.
    labels : Volume
        Of structures, in FreeSurfer's numbers, on the same grid: those of the nearest voxels.

    Raises
    ------
    EngineError
        If the program fails, or finds no brain.
    """
    device = volume.data.device
    with programs.workplace("synthseg", folder) as place:
        image, labels = place.folder / "image.nii.gz", place.folder / "labels.nii.gz"
        write_image(image, volume.data, volume.grid)
        modes = [*(["--robust"] if robust else []), *(["--parc"] if parc else [])]
        cpu = [] if on_gpu(volume) else ["--cpu"]
        threads = str(torch.get_num_threads())
        words: list[str | Path] = ["--i", image, "--o", labels, "--threads", threads, *modes, *cpu]
        _run(SEG, words, place, device)
        found = _read(labels, SEG)
    inside = mask.data.cpu() > 0.5
    shares = resample_onto(_by_tissue(found.data.round().int()), found.grid, volume.grid) * inside
    if not bool((shares[1:].sum(0) > 0).any()):
        raise EngineError(f"{SEG} found no grey and white matter inside the brain mask; look at the image and the mask")
    shares /= shares.sum(0).clamp(min=1.0)
    shares[0] += (1 - shares.sum(0)) * inside
    return shares.to(device), Volume(_nearest(found, volume.grid).to(device), volume.grid)


def _by_tissue(labels: torch.Tensor) -> torch.Tensor:
    """One volume of 0 and 1 per tissue."""
    parts = [torch.isin(labels, torch.tensor(numbers, dtype=labels.dtype)) for numbers in TISSUES.values()]
    parts[1] |= labels > CORTEX
    return torch.stack(parts).float()


def _nearest(labels: Volume, target: Grid) -> torch.Tensor:
    """Labels at the points of another grid; 0 outside."""
    voxels = voxel_points(target, labels.grid).round().long()
    size = torch.tensor(labels.grid.shape)[:, None, None, None]
    inside = ((voxels >= 0) & (voxels < size)).all(0)
    i, j, k = voxels.clamp(min=0).minimum(size - 1)
    return labels.data[i, j, k] * inside


def normalise(
    brain: Volume,
    template: Template,
    rim: Volume,
    initial: np.ndarray,
    settings: AnatomySettings,
    *,
    folder: Path | None = None,
) -> tuple[Chain, Chain]:
    """ACPC to template and back by SynthMorph; what is given and returned is told at `dsiprep.engines.ants.normalise`.

    `rim`, `initial` and `settings` are not looked at: SynthMorph finds the affine part itself, without a mask. Each
    chain is one displacement field: `forward` on the template's grid, `back` on that of `brain`.

    Raises
    ------
    EngineError
        If the program fails, or what it leaves behind cannot be read.
    """
    device = brain.data.device
    with programs.workplace("synthmorph", folder) as place:
        moving, fixed = place.folder / "moving.nii.gz", place.folder / "fixed.nii.gz"
        write_image(moving, brain.data, brain.grid)
        write_image(fixed, template.brain.data, template.brain.grid)
        files = {name: place.folder / f"{name}.nii.gz" for name in ("forward", "back")}
        gpu = ["-g"] if on_gpu(brain) else []
        common: list[str | Path] = ["-j", str(torch.get_num_threads()), *gpu, moving, fixed]
        if _knows_joint(place):
            words: list[str | Path] = ["-m", "joint", "-t", files["forward"], "-T", files["back"], *common]
            _run(MORPH, words, place, device)
        else:
            affine = place.folder / "affine.txt"
            _run(MORPH, ["-m", "affine", "-t", affine, *common], place, device)
            _run(MORPH, ["-m", "deform", "-i", affine, "-t", files["forward"], *common], place, device)
        forward = _warp(files["forward"], template.brain.grid)
        back = _warp(files["back"], brain.grid) if files["back"].is_file() else inverse_on(forward, brain.grid)
    return Chain((forward,), "ACPC", template.name), Chain((back,), template.name, "ACPC")


def on_gpu(volume: Volume) -> bool:
    """Whether a volume lies on a GPU, so that programs are to work there."""
    return volume.data.device.type == "cuda"


def _knows_joint(place: programs.Workplace) -> bool:
    """Whether this SynthMorph has the joint model, from the help it prints, with exit status 0 or 1."""
    path = programs.require(MORPH, HOME, "FreeSurfer 7.4 or later", OPTIONS[MORPH])
    return "joint" in programs.run([path, "register", "-h"], place, name=f"{MORPH}-help", fine=(0, 1))


def _run(program: str, words: list[str | Path], place: programs.Workplace, device: torch.device) -> None:
    path = programs.require(program, HOME, "FreeSurfer 7.4 or later", OPTIONS[program])
    programs.run([path, *words], place, release_gpu(device))


def _read(path: Path, program: str) -> Volume:
    try:
        return read_volume(path)
    except InputError as problem:
        raise EngineError(f"{program} ended well, but what it left cannot be read: {problem}") from problem


def _warp(path: Path, grid: Grid) -> DisplacementField:
    try:
        field = read_warp(path).field
    except InputError as problem:
        raise EngineError(f"{MORPH} ended well, but what it left cannot be read: {problem}") from problem
    if not field.grid.matches(grid, tolerance=0.01):
        raise EngineError(f"{MORPH} wrote a warp on another grid than that of its image; is its installation whole?")
    return field


def inverse_on(forward: DisplacementField, grid: Grid) -> DisplacementField:
    """The way back as a displacement field.

    Parameters
    ----------
    forward : DisplacementField
        Points of the fixed image to points of the moving image.
    grid : Grid
        Of the moving image: where the inverse lies.

    Returns
    -------
    DisplacementField
        In slabs, so that it takes little memory.
    """
    data = np.empty((3, *grid.shape), np.float32)
    chain = Chain((forward,), "moving", "fixed")
    for part in np.array_split(np.arange(grid.shape[0]), max(1, grid.shape[0] // SLAB)):
        voxels = np.moveaxis(np.indices((len(part), *grid.shape[1:])), 0, -1).reshape(-1, 3)
        points = grid.to_world(voxels + np.array([part[0], 0, 0]))
        shift = chain_points_back(chain, points) - points
        data[:, part] = shift.T.reshape(3, len(part), *grid.shape[1:])
    return fit_between(DisplacementField(torch.from_numpy(data), grid))
