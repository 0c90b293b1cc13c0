"""Normalisation with ANTs, with the settings of fMRIPrep: antsRegistration if it is installed, otherwise antspyx.

The settings are those of niworkflows (Apache-2.0, github.com/nipreps/niworkflows), from niworkflows/data:
t1w-mni_registration_precise_000.json and t1w-mni_registration_fast_000.json. As there, both images are skull-stripped,
and the precise settings use the template at 1 mm, the fast ones at 2 mm. The initial transform is the affine
registration that defined the ACPC pose, where niworkflows uses antsAI.
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
        "The brain was registered to the template with antsRegistration of ANTs [@avants2008] by rigid, affine and "
        "symmetric diffeomorphic (SyN) transforms, with the settings of fMRIPrep [@esteban2019]."
    )
}
"""SyN: doi 10.1016/j.media.2007.06.004. fMRIPrep: doi 10.1038/s41592-018-0235-4."""

__all__ = ["METHODS", "PRESETS", "check", "command", "normalise", "version"]

OPTION = "--normalization-engine ants"
VARIABLE = "ANTSPATH"
PROGRAM = "antsRegistration"
RUN_ANTSPYX = """import sys
from ants.internal import get_lib_fn
sys.exit(get_lib_fn("antsRegistration")(sys.argv[1:]))"""
SEED = "1"  # for the random sampling of the fast settings; reproducible with one thread
# Peak memory of antspyx 0.6.3 with a template of 197 x 233 x 189 mm: 2.7 GB at 1 mm, 0.8 GB at 2 mm.
BASE_BYTES, BYTES_PER_VOXEL = 0.5e9, 290


@dataclass(frozen=True)
class RegistrationStage:
    """One stage of antsRegistration."""

    transform: str
    metric: str  # format string with placeholders for the fixed and the moving image
    iterations: str
    convergence_window: int
    shrink: str
    smooth: str


@dataclass(frozen=True)
class Preset:
    """A set of settings: stages, voxel size of the template, and lower and upper quantiles for winsorising."""

    stages: tuple[RegistrationStage, ...]
    spacing_mm: float
    winsorize: tuple[float, float] | None


PRESETS = {
    "precise": Preset(
        (
            RegistrationStage("Rigid[0.05]", "Mattes[{},{},1,56,Regular,0.25]", "100x100", 20, "2x1", "2x1"),
            RegistrationStage("Affine[0.08]", "Mattes[{},{},1,56,Regular,0.25]", "100x100", 20, "2x1", "1x0"),
            RegistrationStage("SyN[0.1,3,0]", "CC[{},{},1,4,None,1]", "100x70x50x20", 10, "8x4x2x1", "3x2x1x0"),
        ),
        1.0,
        (0.005, 0.995),
    ),
    "fast": Preset(
        (
            RegistrationStage("Rigid[0.01]", "Mattes[{},{},1,32,Random,0.15]", "1000", 20, "4", "4"),
            RegistrationStage("Affine[0.08]", "Mattes[{},{},1,32,Regular,0.15]", "500x250x100", 20, "4x2x1", "4x2x0"),
            RegistrationStage("SyN[0.1,3,0]", "Mattes[{},{},1,56,Regular,0.25]", "50x20", 10, "2x1", "1x0"),
        ),
        2.0,
        None,
    ),
}


def version() -> str:
    """Version of the program that would run.

    Raises
    ------
    EngineError
        If neither antsRegistration nor antspyx is installed.
    """
    path = _program()
    if path is None:
        return f"antspyx {version_of('antspyx')}"
    with programs.working_directory("ants", None) as directory:
        output = programs.run([path, "--version"], directory)
    match = re.search(r"ANTs Version:\s*(\S+)", output)
    return f"ANTs {match[1] if match else 'of unknown version'}"


def check(unit: Unit | None, settings: Settings, device: torch.device) -> None:
    """Check, before processing starts, that ANTs can run.

    Parameters
    ----------
    unit : Unit or None
        Not used.
    settings : Settings
    device : torch.device
        Not used: ANTs runs on the CPU.

    Raises
    ------
    EngineError
        If neither antsRegistration nor antspyx is installed, or memory does not suffice.
    """
    _program()
    preset = PRESETS[settings.anatomy.ants_settings]
    voxels = 193 * 229 * 193 / preset.spacing_mm**3  # of MNI152NLin2009cAsym
    programs.require_memory(
        BASE_BYTES + voxels * BYTES_PER_VOXEL, f"antsRegistration at {preset.spacing_mm:g} mm", OPTION
    )


def normalise(
    brain: Volume,
    template: Template,
    region: Volume,
    initial: np.ndarray,
    settings: AnatomySettings,
    *,
    folder: Path | None = None,
) -> tuple[Chain, Chain]:
    """ACPC to template and back; replaces the native normalisation.

    Parameters
    ----------
    brain : Volume
        Structural image in ACPC space, zero outside the brain.
    template : Template
    region : Volume
        Not used: the settings are designed for images without masks.
    initial : ndarray, (4, 4)
        World points of the template to points of ACPC.
    settings : AnatomySettings
    folder : Path, optional
        Work folder, for large files and the log.

    Returns
    -------
    forward, back : Chain
        `forward` maps points of the template to ACPC, `back` points of ACPC to the template.

    Raises
    ------
    EngineError
        If the program fails, or its output cannot be read.
    """
    preset = PRESETS[settings.ants_settings]
    spacing = np.maximum(template.brain.grid.voxel_sizes, preset.spacing_mm)
    fixed = template.brain
    if (spacing > 1.01 * fixed.grid.voxel_sizes).any():
        fixed = resample_to_spacing(fixed, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
    with programs.working_directory("ants", folder) as directory:
        files = {name: directory.folder / f"{name}.nii.gz" for name in ("moving", "fixed")}
        initial_file, prefix = directory.folder / "initial.mat", directory.folder / "to"
        write_image(files["moving"], brain.data, brain.grid)
        write_image(files["fixed"], fixed.data, fixed.grid)
        write_affine(initial_file, Affine(initial, "ACPC", template.name))
        path = _program()
        arguments = command(files["fixed"], files["moving"], initial_file, prefix, preset)
        program = [path] if path else [sys.executable, "-c", RUN_ANTSPYX]
        programs.run([*program, *arguments], directory, {"ANTS_RANDOM_SEED": SEED}, PROGRAM)
        try:
            forward = read_composite_h5(directory.folder / "toComposite.h5", "ACPC", template.name)
            back = read_composite_h5(directory.folder / "toInverseComposite.h5", template.name, "ACPC")
        except InputError as error:
            raise EngineError(f"{PROGRAM} finished, but its transforms cannot be read: {error}") from error
    return forward, back


def command(fixed: Path, moving: Path, initial: Path, prefix: Path, preset: Preset) -> list[str]:
    """Arguments of antsRegistration.

    Parameters
    ----------
    fixed, moving : Path
        Image files.
    initial : Path
        ITK transform that maps points of the fixed image to points of the moving image.
    prefix : Path
        Prefix of the outputs `<prefix>Composite.h5` and `<prefix>InverseComposite.h5`.
    preset : Preset

    Returns
    -------
    list of str
    """
    arguments = ["--dimensionality", "3", "--float", "1", "--collapse-output-transforms", "1",
                 "--write-composite-transform", "1", "--output", str(prefix), "--interpolation", "LanczosWindowedSinc",
                 "--initial-moving-transform", f"[{initial},0]"]  # fmt: skip
    if preset.winsorize:
        arguments += ["--winsorize-image-intensities", f"[{preset.winsorize[0]:g},{preset.winsorize[1]:g}]"]
    for stage in preset.stages:
        convergence = f"[{stage.iterations},1e-6,{stage.convergence_window}]"
        arguments += ["--transform", stage.transform, "--metric", stage.metric.format(fixed, moving),
                      "--convergence", convergence, "--shrink-factors", stage.shrink,
                      "--smoothing-sigmas", f"{stage.smooth}vox", "--use-histogram-matching", "1"]  # fmt: skip
    return arguments


def _program() -> Path | None:
    """Path of antsRegistration; None if only antspyx is installed."""
    path = programs.find(PROGRAM, VARIABLE)
    if path is None and importlib.util.find_spec("ants") is None:
        raise EngineError(
            f"{OPTION}: {PROGRAM} is neither in the folder given by {VARIABLE} nor on PATH, and the Python package "
            "antspyx is not installed; run `pip install antspyx`, or use --normalization-engine native"
        )
    return path
