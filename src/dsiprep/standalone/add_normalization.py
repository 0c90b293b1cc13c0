"""Normalisation added to a finished run of QSIPrep or dsiprep that skipped it.

`dsiprep-tools add-normalization` is this module on the command line; `add_normalization` is the same as a library call.
QSIRecon brings atlases of a template to a subject by the two transforms that this makes.
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

__all__ = ["Added", "add_normalization"]

WANTED = "MNI152NLin2009cAsym"  # by QSIRecon, for its atlases
LEAST_DICE = 0.8  # of brain and template, below which a warp is not taken for one between them


@dataclass(frozen=True)
class Added:
    """What was written, and what to know of it.

    Attributes
    ----------
    files : tuple of Path
        from-ACPC_to-<template> and its inverse.
    said : tuple of str
        Sentences.
    """

    files: tuple[Path, ...]
    said: tuple[str, ...]


def add_normalization(
    folder: Path,
    participant: str,
    *,
    warp: Path | None = None,
    inverse_warp: Path | None = None,
    template: str | None = None,
    device: str = "cpu",
) -> Added:
    """Write from-ACPC_to-<template>_mode-image_xfm.h5 and its inverse beside the structural image of a subject.

    Parameters
    ----------
    folder : Path
        Root of the derivatives, with `sub-<participant>` in it.
    participant : str
        With or without "sub-".
    warp, inverse_warp : Path, optional
        What SynthMorph (`mri_synthmorph -t` and `-T`) found between the ACPC image, moving, and the template,
        fixed; by default dsiprep's own registration. Without `inverse_warp` the way back is computed.
    template : str, optional
        Name of the template; with `warp` the one that was its fixed image, which no file tells, and
        otherwise MNI152NLin2009cAsym where TemplateFlow has it here, else MNI152NLin2009aSym under that name.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".

    Returns
    -------
    Added

    Raises
    ------
    InputError
        If files are missing, or the warp is not one between these images.
    SettingsError
        If a warp comes without the name of its template.
    OutputError
        If one of the two files is there already, or they cannot be written.
    """
    image, mask = _find(Path(folder), "sub-" + participant.removeprefix("sub-"))
    stem = image.name.partition("_space-ACPC_")[0]
    if warp is not None and (not template or not re.fullmatch(r"[A-Za-z0-9+]+", template)):
        raise SettingsError("--warp: a warp does not tell which template it leads to; name it with --template, such as "
                            f"--template {WANTED}")  # fmt: skip
    if inverse_warp is not None and warp is None:
        raise SettingsError("--inverse-warp goes with --warp; give that too")
    known = load_template(template) if template and warp is None else load_template()
    name = template if warp is not None and template else known.name
    files = [image.parent / f"{stem}_from-{a}_to-{b}_mode-image_xfm.h5" for a, b in (("ACPC", name), (name, "ACPC"))]
    there = [path.name for path in files if path.exists()]
    if there:
        raise OutputError(
            f"{image.parent} holds {' and '.join(there)} already, which are not overwritten; move them away"
        )
    head, brain = read_volume(image), read_volume(mask)
    if not head.grid.matches(brain.grid):
        raise InputError(f"{mask} lies on another grid than {image.name}; take both from one run")
    if warp is None:
        forward, back = _register(head, brain, known, device)
    else:
        forward, back = _from_warp(warp, inverse_warp, head, name)
    dice = _dice(forward, brain, known)
    if dice < LEAST_DICE:
        raise InputError(
            f"{warp or image}: brought to {name}, the brain covers the template's with a Dice of {dice:.2f} only; "
            "wanted is a warp that mri_synthmorph -t wrote for this image, moving, and the template, fixed"
        )
    _write(files, (forward, back))
    return Added(tuple(files), _sentences(name, dice, known, warp))


def _find(folder: Path, subject: str) -> tuple[Path, Path]:
    """The structural image in ACPC space and its brain mask."""
    if not (folder / subject).is_dir():
        raise InputError(f"{folder} holds no folder {subject}; give the root of the derivatives of QSIPrep or dsiprep")
    ending = "_space-ACPC_desc-preproc_T1w.nii.gz"
    images = sorted((folder / subject).glob(f"**/anat/{subject}*{ending}"))
    if not images:
        raise InputError(
            f"{folder / subject}: no anat/{subject}{ending}; a run of QSIPrep 1.0 or later, or of dsiprep, with a T1w "
            "image is wanted"
        )
    if len(images) > 1:
        raise InputError(
            f"{folder / subject}: {len(images)} structural images in ACPC space; give a folder with one session"
        )
    mask = images[0].with_name(images[0].name.replace("_desc-preproc_T1w", "_desc-brain_mask"))
    if not mask.is_file():
        raise InputError(f"{mask}: there is no such file, and the brain is needed; copy it from the run")
    return images[0], mask


def _register(head: Volume, brain: Volume, template: Template, device: str) -> tuple[Chain, Chain]:
    return with_cpu_fallback(lambda image, mask: normalise_brain(image, mask, template), choose(device), (head, brain))


def _from_warp(warp: Path, inverse: Path | None, head: Volume, name: str) -> tuple[Chain, Chain]:
    field = read_warp(warp).field
    back = inverse_on(field, head.grid) if inverse is None else read_warp(inverse).field
    return Chain((field,), "ACPC", name), Chain((back,), name, "ACPC")


def _dice(forward: Chain, brain: Volume, template: Template) -> float:
    """Agreement of the brain, brought over, with the template's; any MNI template will do to see a wrong warp."""
    grid = template.mask.grid.at_spacing(3.0)
    displacement = chain_displacement(forward, grid)
    moved = resample_onto(brain.data[None].float(), brain.grid, grid, displacement=displacement)[0] > 0.5
    inside = resample_onto(template.mask.data[None], template.mask.grid, grid)[0] > 0.5
    return float(2 * (moved & inside).sum() / (moved.sum() + inside.sum()).clamp(min=1))


def _write(files: list[Path], chains: tuple[Chain, Chain]) -> None:
    """Both files or none under their names."""
    folder = files[0].parent
    try:
        beside = Path(tempfile.mkdtemp(prefix=".dsiprep-", dir=folder))
    except OSError as problem:
        raise OutputError(f"{folder}: {problem.strerror}; this folder must be writable") from problem
    try:
        for path, chain in zip(files, chains, strict=True):
            write_composite_h5(beside / path.name, chain)
        for path in files:
            (beside / path.name).replace(path)
    except OSError as problem:
        raise OutputError(f"{folder}: {problem.strerror}; make room or check the rights, then run again") from problem
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sentences(name: str, dice: float, template: Template, warp: Path | None) -> tuple[str, ...]:
    how = f"from {warp}" if warp else f"by dsiprep's own registration to {name} ({template.origin})"
    said = [f"The transforms were made {how}; the masks of brain and template agree with a Dice of {dice:.2f}."]
    if name != WANTED:
        said.append(
            f"QSIRecon looks for {WANTED}, and these lead to {name}: get that template with "
            f"`templateflow get {WANTED}` and run again to have both."
        )
    return tuple(said)
