"""Normalisation by ANTs, with the settings of fMRIPrep: antsRegistration where it is, else the one inside antspyx.

The settings are those of niworkflows (Apache-2.0), github.com/nipreps/niworkflows, in niworkflows/data:
t1w-mni_registration_precise_000.json and t1w-mni_registration_fast_000.json; as there, both images come without skull,
and the precise ones work on the template at 1 mm, the fast ones at 2 mm. What niworkflows starts from by
antsAI is here the affine transform that gave the pose in ACPC space.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain
from dsiprep.engines import external_programs as programs
from dsiprep.errors import EngineError, InputError
from dsiprep.io.itk import read_composite_h5, write_affine
from dsiprep.io.nifti import write_image
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.settings import AnatomySettings, Settings

METHODS = {
    "ants": (
        "The brain was registered to the template with antsRegistration of ANTs [@avants2008]: rigid, affine, then "
        "symmetric diffeomorphic (SyN), with the settings of fMRIPrep [@esteban2019]."
    )
}
"""SyN: doi 10.1016/j.media.2007.06.004. fMRIPrep: doi 10.1038/s41592-018-0235-4."""

__all__ = ["METHODS", "SETTINGS", "check", "command", "normalise", "version"]

OPTION = "--normalization-engine ants"
VARIABLE = "ANTSPATH"
PROGRAM = "antsRegistration"
WITHIN_PYTHON = """import sys
from ants.internal import get_lib_fn
sys.exit(get_lib_fn("antsRegistration")(sys.argv[1:]))"""
SEED = "1"  # random sampling of the fast settings: the same images give the same result with one thread
# What antspyx 0.6.3 took at its peak on a template of 197 x 233 x 189 voxels: 2.7 GB at 1 mm, 0.8 GB at 2 mm.
BYTES, BYTES_A_VOXEL = 0.5e9, 290


@dataclass(frozen=True)
class Step:
    """One transform of antsRegistration."""

    transform: str
    metric: str  # with two places for the images
    iterations: str
    window: int
    shrink: str
    smooth: str


@dataclass(frozen=True)
class Flavour:
    """A set of settings: its steps, the voxel size of the template, and the share of dark and bright voxels cut off."""

    steps: tuple[Step, ...]
    spacing_mm: float
    winsorize: tuple[float, float] | None


SETTINGS = {
    "precise": Flavour(
        (
            Step("Rigid[0.05]", "Mattes[{},{},1,56,Regular,0.25]", "100x100", 20, "2x1", "2x1"),
            Step("Affine[0.08]", "Mattes[{},{},1,56,Regular,0.25]", "100x100", 20, "2x1", "1x0"),
            Step("SyN[0.1,3,0]", "CC[{},{},1,4,None,1]", "100x70x50x20", 10, "8x4x2x1", "3x2x1x0"),
        ),
        1.0,
        (0.005, 0.995),
    ),
    "fast": Flavour(
        (
            Step("Rigid[0.01]", "Mattes[{},{},1,32,Random,0.15]", "1000", 20, "4", "4"),
            Step("Affine[0.08]", "Mattes[{},{},1,32,Regular,0.15]", "500x250x100", 20, "4x2x1", "4x2x0"),
            Step("SyN[0.1,3,0]", "Mattes[{},{},1,56,Regular,0.25]", "50x20", 10, "2x1", "1x0"),
        ),
        2.0,
        None,
    ),
}


def version() -> str:
    """Of the program that would run.

    Raises
    ------
    EngineError
        If there is none.
    """
    path = _program()
    if path is None:
        return f"antspyx {version_of('antspyx')}"
    with programs.workplace("ants", None) as place:
        printed = programs.run([path, "--version"], place)
    found = re.search(r"ANTs Version:\s*(\S+)", printed)
    return f"ANTs {found[1] if found else 'of unknown version'}"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Whether it can run, before anything long is begun.

    Parameters
    ----------
    unit : Unit or None
        Not looked at.
    settings : Settings
    device : torch.device
        Not looked at: ANTs knows no GPU.

    Raises
    ------
    EngineError
        If there is neither the program nor antspyx, or too little memory.
    """
    _program()
    flavour = SETTINGS[settings.anatomy.ants_settings]
    voxels = 193 * 229 * 193 / flavour.spacing_mm**3  # of MNI152NLin2009cAsym
    programs.require_memory(BYTES + voxels * BYTES_A_VOXEL, f"antsRegistration at {flavour.spacing_mm:g} mm", OPTION)


def normalise(
    brain: Volume,
    template: Template,
    rim: Volume,
    initial: np.ndarray,
    settings: AnatomySettings,
    *,
    folder: Path | None = None,
) -> tuple[Chain, Chain]:
    """ACPC to template and back, as the native step gives them.

    Parameters
    ----------
    brain : Volume
        Structural image in ACPC space, zero outside the brain.
    template : Template
    rim : Volume
        Not looked at: the settings are made for images without a mask beside them.
    initial : ndarray, (4, 4)
        World points of the template to points of ACPC.
    settings : AnatomySettings
    folder : Path, optional
        Of the work directory: for large files, and for the log.

    Returns
    -------
    forward, back : Chain
        `forward` maps points of the template to ACPC, `back` points of ACPC to the template.

    Raises
    ------
    EngineError
        If the program fails, or what it leaves behind cannot be read.
    """
    flavour = SETTINGS[settings.ants_settings]
    spacing = np.maximum(template.brain.grid.voxel_sizes, flavour.spacing_mm)
    fixed = template.brain
    if (spacing > 1.01 * fixed.grid.voxel_sizes).any():
        fixed = resample_to_spacing(fixed, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
    with programs.workplace("ants", folder) as place:
        files = {name: place.folder / f"{name}.nii.gz" for name in ("moving", "fixed")}
        write_image(files["moving"], brain.data, brain.grid)
        write_image(files["fixed"], fixed.data, fixed.grid)
        write_affine(place.folder / "initial.mat", Affine(initial, "ACPC", template.name))
        path = _program()
        words = command(files["fixed"], files["moving"], place.folder / "initial.mat", place.folder / "to", flavour)
        start = [path] if path else [sys.executable, "-c", WITHIN_PYTHON]
        programs.run([*start, *words], place, {"ANTS_RANDOM_SEED": SEED}, PROGRAM)
        try:
            forward = read_composite_h5(place.folder / "toComposite.h5", "ACPC", template.name)
            back = read_composite_h5(place.folder / "toInverseComposite.h5", template.name, "ACPC")
        except InputError as problem:
            raise EngineError(f"{PROGRAM} ended well, but left no transform that can be read: {problem}") from problem
    return forward, back


def command(fixed: Path, moving: Path, initial: Path, prefix: Path, flavour: Flavour) -> list[str]:
    """Arguments of antsRegistration.

    Parameters
    ----------
    fixed, moving : Path
        Images.
    initial : Path
        ITK transform: points of the fixed image to points of the moving image.
    prefix : Path
        Of the outputs: `<prefix>Composite.h5` and `<prefix>InverseComposite.h5`.
    flavour : Flavour

    Returns
    -------
    list of str
    """
    words = ["--dimensionality", "3", "--float", "1", "--collapse-output-transforms", "1",
             "--write-composite-transform", "1", "--output", str(prefix), "--interpolation", "LanczosWindowedSinc",
             "--initial-moving-transform", f"[{initial},0]"]  # fmt: skip
    if flavour.winsorize:
        words += ["--winsorize-image-intensities", f"[{flavour.winsorize[0]:g},{flavour.winsorize[1]:g}]"]
    for step in flavour.steps:
        words += ["--transform", step.transform, "--metric", step.metric.format(fixed, moving),
                  "--convergence", f"[{step.iterations},1e-6,{step.window}]", "--shrink-factors", step.shrink,
                  "--smoothing-sigmas", f"{step.smooth}vox", "--use-histogram-matching", "1"]  # fmt: skip
    return words


def _program() -> Path | None:
    """antsRegistration; None where antspyx is to do it."""
    path = programs.find(PROGRAM, VARIABLE)
    if path is None and importlib.util.find_spec("ants") is None:
        raise EngineError(
            f"{OPTION}: {PROGRAM} is neither in the folder that {VARIABLE} names nor on PATH, and the Python package "
            "antspyx is not installed; run `pip install antspyx`, or take --normalization-engine native"
        )
    return path
