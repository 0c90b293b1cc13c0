"""Add the transforms to a template to a finished run of QSIPrep or dsiprep that skipped normalisation.

`dsiprep-tools add-normalization` is the command-line interface of `add_normalization`. QSIRecon uses the two transforms
to map atlases from template to subject space.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsiprep.data.grid import Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import Chain
from dsiprep.device import choose, with_cpu_fallback
from dsiprep.engines.freesurfer import inverse_on
from dsiprep.errors import InputError, OutputError, SettingsError
from dsiprep.io.freesurfer import read_warp
from dsiprep.io.itk import write_composite_h5
from dsiprep.io.nifti import read_volume
from dsiprep.io.templates import load_template
from dsiprep.ops.image.displacement_field import chain_displacement
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.stages.anatomy import normalise_brain

__all__ = ["AddedTransforms", "add_normalization"]

QSIRECON_TEMPLATE = "MNI152NLin2009cAsym"  # the template of QSIRecon's atlases
MIN_DICE = 0.8  # overlap of the warped brain mask with the template's, below which the warp is rejected


@dataclass(frozen=True)
class AddedTransforms:
    """The files written by `add_normalization`, with notes for the user.

    Attributes
    ----------
    files : tuple of Path
        The from-ACPC_to-<template> transform and its inverse.
    notes : tuple of str
        One sentence each: the origin of the transforms and their Dice, and what QSIRecon still needs.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def add_normalization(
    folder: Path,
    participant: str,
    *,
    warp: Path | None = None,
    inverse_warp: Path | None = None,
    template: str | None = None,
    device: str = "cpu",
) -> AddedTransforms:
    """Write from-ACPC_to-<template>_mode-image_xfm.h5 and its inverse next to a subject's structural image.

    Parameters
    ----------
    folder : Path
        Root of the derivatives, which contains `sub-<participant>`.
    participant : str
        With or without "sub-".
    warp, inverse_warp : Path, optional
        Warps of SynthMorph (`mri_synthmorph -t` and `-T`) with the ACPC image as the moving and the template as the
        fixed image; by default dsiprep's own registration is used. Without `inverse_warp` the inverse is computed.
    template : str, optional
        Name of the template. With `warp` it is required and names the fixed image of the warp, because warp files do
        not store it. Otherwise MNI152NLin2009cAsym, as `dsiprep.io.templates.load_template` finds it.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".

    Returns
    -------
    AddedTransforms

    Raises
    ------
    InputError
        If files are missing, or if the warp does not map between these images.
    SettingsError
        If a warp is given without the name of its template, or an inverse warp without a warp.
    OutputError
        If one of the two files exists already, or if they cannot be written.
    """
    image, mask = _find(Path(folder), "sub-" + participant.removeprefix("sub-"))
    stem = image.name.partition("_space-ACPC_")[0]
    if warp is not None and (not template or not re.fullmatch(r"[A-Za-z0-9+]+", template)):
        raise SettingsError(
            "--warp: a warp file does not store the name of its template; give it with --template, for example "
            f"--template {QSIRECON_TEMPLATE}"
        )
    if inverse_warp is not None and warp is None:
        raise SettingsError("--inverse-warp requires --warp; give both")
    reference = load_template(template) if template and warp is None else load_template()
    name = template if warp is not None and template else reference.name
    files = [image.parent / f"{stem}_from-{a}_to-{b}_mode-image_xfm.h5" for a, b in (("ACPC", name), (name, "ACPC"))]
    existing = [path.name for path in files if path.exists()]
    if existing:
        raise OutputError(
            f"{image.parent} already contains {' and '.join(existing)}; existing files are not overwritten, move them"
        )
    head, brain = read_volume(image), read_volume(mask)
    if not head.grid.matches(brain.grid):
        raise InputError(f"{mask} and {image.name} have different grids; use files of the same run")
    if warp is None:
        forward, inverse = _register(head, brain, reference, device)
    else:
        forward, inverse = _from_warp(warp, inverse_warp, head, name)
    dice = _dice(forward, brain, reference)
    if dice < MIN_DICE:
        raise InputError(
            f"{warp or image}: after warping to {name}, the brain mask overlaps the template's with a Dice of only "
            f"{dice:.2f}; expected a warp of mri_synthmorph -t, with this image moving and the template fixed"
        )
    _write(files, (forward, inverse))
    return AddedTransforms(tuple(files), _notes(name, dice, reference, warp))


def _find(folder: Path, subject: str) -> tuple[Path, Path]:
    """Find the structural image in ACPC space and its brain mask."""
    if not (folder / subject).is_dir():
        raise InputError(f"{folder} contains no folder {subject}; give the output folder of QSIPrep or dsiprep")
    ending = "_space-ACPC_desc-preproc_T1w.nii.gz"
    images = sorted((folder / subject).glob(f"**/anat/{subject}*{ending}"))
    if not images:
        raise InputError(
            f"{folder / subject}: no anat/{subject}{ending}; expected a run of QSIPrep 1.0 or later, or of dsiprep, "
            "with a T1w image"
        )
    if len(images) > 1:
        raise InputError(
            f"{folder / subject}: {len(images)} structural images in ACPC space; give a folder with a single session"
        )
    mask = images[0].with_name(images[0].name.replace("_desc-preproc_T1w", "_desc-brain_mask"))
    if not mask.is_file():
        raise InputError(f"{mask} does not exist; copy the brain mask of the run there")
    return images[0], mask


def _register(head: Volume, brain: Volume, template: Template, device: str) -> tuple[Chain, Chain]:
    return with_cpu_fallback(lambda image, mask: normalise_brain(image, mask, template), choose(device), (head, brain))


def _from_warp(warp: Path, inverse: Path | None, head: Volume, name: str) -> tuple[Chain, Chain]:
    field = read_warp(warp).field
    inverse_field = inverse_on(field, head.grid) if inverse is None else read_warp(inverse).field
    return Chain((field,), "ACPC", name), Chain((inverse_field,), name, "ACPC")


def _dice(forward: Chain, brain: Volume, template: Template) -> float:
    """Dice of the warped brain mask and the template's; any MNI template is close enough to detect a wrong warp."""
    grid = template.mask.grid.at_spacing(3.0)
    displacement = chain_displacement(forward, grid)
    warped = resample_onto(brain.data[None].float(), brain.grid, grid, displacement=displacement)[0] > 0.5
    template_brain = resample_onto(template.mask.data[None], template.mask.grid, grid)[0] > 0.5
    return float(2 * (warped & template_brain).sum() / (warped.sum() + template_brain.sum()).clamp(min=1))


def _write(files: list[Path], chains: tuple[Chain, Chain]) -> None:
    """Write both files, or neither if writing fails."""
    folder = files[0].parent
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".dsiprep-", dir=folder))
    except OSError as problem:
        raise OutputError(f"{folder}: {problem.strerror}; the folder must be writable") from problem
    try:
        for path, chain in zip(files, chains, strict=True):
            write_composite_h5(temporary / path.name, chain)
        for path in files:
            (temporary / path.name).replace(path)
    except OSError as problem:
        raise OutputError(f"{folder}: {problem.strerror}; check free space and permissions, then rerun") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _notes(name: str, dice: float, template: Template, warp: Path | None) -> tuple[str, ...]:
    origin = f"from {warp}" if warp else f"by dsiprep's own registration to {name} ({template.origin})"
    notes = [f"The transforms were made {origin}; the brain mask overlaps the template's with a Dice of {dice:.2f}."]
    if warp is None and template.note:
        notes.append(template.note)
    if name != QSIRECON_TEMPLATE:
        notes.append(
            f"QSIRecon needs transforms to {QSIRECON_TEMPLATE}, and these lead to {name}: download that template with "
            f"`templateflow get {QSIRECON_TEMPLATE}` and rerun to get both."
        )
    return tuple(notes)
