"""Every setting: its default, unit and meaning. Command line, docs page and cache keys are drawn from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, *flags: str, choices: tuple[Any, ...] = (), metavar: str = "") -> Any:
    """A dataclass field that is also a command-line option; the first flag is the one shown."""
    metadata = {"help": help, "flags": flags, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AcquisitionSettings:
    """Which volumes count as b=0, and how runs are put together."""

    b0_threshold: float = option(100.0, "b-values at or below this (s/mm²) count as b=0", "--b0-threshold", metavar="B")
    harmonize_b0: bool = option(
        True, "do not scale runs so that their mean b=0 intensities agree", "--no-b0-harmonization"
    )


@dataclass(frozen=True)
class DenoiseSettings:
    """Noise, ringing and receive bias."""

    method: str = option(
        "dwidenoise",
        "denoising: MP-PCA, under MRtrix3's name for it, or none",
        "--denoise-method",
        choices=("dwidenoise", "none"),
    )
    window: int = option(
        0,
        "MP-PCA window in voxels along each axis (odd); 0 takes the smallest that holds as many voxels as volumes",
        "--dwidenoise-window",
        "--dwi-denoise-window",
        metavar="VOXELS",
    )
    unringing: str = option("none", "Gibbs-ringing removal", "--unringing-method", choices=("none",))
    biascorrect: str = option(
        "n4",
        "N4 bias correction of the DWI, estimated on the b=0 reference",
        "--dwi-biascorrect",
        choices=("n4", "none"),
    )


@dataclass(frozen=True)
class MotionSettings:
    """SHORELine: predict each volume from the others, register, repeat."""

    method: str = option("shoreline", "head-motion correction", "--hmc-method", choices=("shoreline", "none"))
    model: str = option(
        "auto",
        "signal model that predicts each volume; auto takes 3dSHORE; none aligns b=0 volumes only and interpolates "
        "between them",
        "--hmc-model",
        choices=("auto", "3dSHORE", "tensor", "none"),
    )
    iters: int = option(4, "upper bound on rounds of prediction and registration", "--shoreline-iters", metavar="N")
    transform: str = option("Rigid", "motion of each volume", "--hmc-transform", choices=("Rigid", "Affine"))
    eddy: str = option(
        "quadratic",
        "eddy currents of diffusion-weighted volumes: displacement along the phase-encoding axis, a polynomial of this "
        "order in scanner coordinates, tied to the gradient",
        "--eddy-model",
        choices=("none", "linear", "quadratic"),
    )
    outliers: str = option(
        "report",
        "slices that lost their signal: report them, or replace them by the prediction",
        "--outliers",
        choices=("report", "replace"),
    )
    tolerance: float = option(
        0.02, "stop when no volume moved more than this (mm) between rounds", "--hmc-tolerance", metavar="MM"
    )


@dataclass(frozen=True)
class DistortionSettings:
    """Susceptibility distortion along the phase-encoding axis."""

    method: str = option(
        "auto",
        "susceptibility distortion correction; auto takes drbuddi wherever there are reversed phase encodings, and a "
        "gradient-echo fieldmap elsewhere",
        "--sdc-method",
        choices=("auto", "drbuddi", "none"),
    )
    anat_reference: str = option(
        "none",
        "correct series that no fieldmap reaches against the tissues of a structural image: invt1w (the T1w), t2w, or "
        "auto, the image of --anat-modality",
        "--sdc-anat-reference",
        choices=("none", "auto", "t2w", "invt1w"),
    )
    engine: str = option(
        "native",
        "what does blip-up/blip-down correction: dsiprep itself, or DRBUDDI of TORTOISE, from TORTOISE_HOME or PATH",
        "--sdc-engine",
        choices=("native", "tortoise"),
    )


@dataclass(frozen=True)
class AnatomySettings:
    """The structural image: bias, brain, ACPC, template."""

    modality: str = option(
        "T1w", "structural image; none works from the b=0 reference", "--anat-modality", choices=("T1w", "T2w", "none")
    )
    reference: str = option(
        "first-lex",
        "where structural images are averaged: first-lex, all images of a subject in the space of the first by name; "
        "unbiased, all in a space midway between them; sessionwise, those of each session by themselves, midway",
        "--subject-anatomical-reference",
        choices=("first-lex", "unbiased", "sessionwise"),
    )
    mask: str = option(
        "",
        "brain mask that is taken as it is: a file, a pattern with {subject} and {session}, or a folder of BIDS "
        "derivatives with desc-brain_mask files",
        "--anat-mask",
        metavar="FILE|PATTERN|FOLDER",
    )
    template: str = option(
        "",
        "template: a name of TemplateFlow (MNI152NLin6Asym, MNIInfant+2), fetched where it is not on this machine, or "
        "the T1w or T2w file of one of your own, with mask and tissue priors beside it under TemplateFlow's names; by "
        "default MNI152NLin2009cAsym where TemplateFlow has it, otherwise MNI152NLin2009aSym",
        "--anatomical-template",
        metavar="NAME|FILE",
    )
    biascorrect: str = option(
        "n4", "N4 bias correction of the structural image", "--anat-biascorrect", choices=("n4", "none")
    )
    normalize: bool = option(
        True, "do not register the structural image to the template", "--skip-anat-based-spatial-normalization"
    )
    finest_mm: float = option(1.0, "voxel size in mm at which the registration to the template ends")
    engine: str = option(
        "native",
        "what finds brain and tissue: dsiprep itself, or SynthStrip and SynthSeg of FreeSurfer 7.4 or later, from "
        "FREESURFER_HOME",
        "--anat-engine",
        choices=("native", "freesurfer"),
    )
    normalization: str = option(
        "auto",
        "what registers to the template: dsiprep itself, ANTs (antsRegistration, or antspyx), or SynthMorph of "
        "FreeSurfer; auto takes SynthMorph with --anat-engine freesurfer, and native otherwise",
        "--normalization-engine",
        choices=("auto", "native", "ants", "synthmorph"),
    )
    ants_settings: str = option(
        "precise", "fMRIPrep's settings of ANTs that are taken", "--ants-settings", choices=("precise", "fast")
    )
    synthseg_robust: bool = option(False, "SynthSeg in its robust mode: slower, more memory", "--synthseg-robust")
    synthseg_parc: bool = option(False, "let SynthSeg parcellate the cortex too", "--synthseg-parc")

    @property
    def normalizer(self) -> str:
        """What registers to the template: "none", "native", "ants" or "synthmorph"."""
        if not self.normalize:
            return "none"
        if self.normalization != "auto":
            return self.normalization
        return "synthmorph" if self.engine == "freesurfer" else "native"


@dataclass(frozen=True)
class CoregisterSettings:
    """The b=0 reference to the structural image."""

    dof: int = option(
        6, "degrees of freedom from the b=0 reference to the structural image", "--dwi2anat-dof", choices=(6, 12)
    )


@dataclass(frozen=True)
class ResampleSettings:
    """The one interpolation."""

    resolution: float = option(0.0, "voxel size of the output in mm (required)", "--output-resolution", metavar="MM")
    merge: str = option(
        "none",
        "what becomes of corrected series of different phase encoding: concat joins all corrected outputs of a session "
        "into one; average does so too, and makes one volume of those with the same b-value and b-vector; "
        "least-squares is average with the weights that follow from how much each phase encoding stretched the image",
        "--distortion-group-merge",
        choices=("none", "concat", "average", "least-squares"),
    )


@dataclass(frozen=True)
class Settings:
    """All settings of one run, by stage."""

    acquisition: AcquisitionSettings = AcquisitionSettings()
    denoise: DenoiseSettings = DenoiseSettings()
    motion: MotionSettings = MotionSettings()
    distortion: DistortionSettings = DistortionSettings()
    anatomy: AnatomySettings = AnatomySettings()
    coregister: CoregisterSettings = CoregisterSettings()
    resample: ResampleSettings = ResampleSettings()
