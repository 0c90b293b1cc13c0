"""All settings of a run: default, unit, range and meaning. Command line, docs and cache keys are derived from here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dsiprep.errors import SettingsError
from dsiprep.option import Checked, option


@dataclass(frozen=True)
class AcquisitionSettings(Checked):
    """b=0 threshold, drift of the signal and concatenation of runs."""

    b0_threshold: float = option(
        100.0, "b-values at or below this (s/mm²) count as b=0", "--b0-threshold", metavar="B", least=0
    )
    drift: str = option(
        "auto",
        "drift of the signal over a run: auto divides out a linear or quadratic function of time where it is "
        "significant, from the b=0 volumes or, without enough of them, from the gain of volumes over their prediction",
        "--signal-drift",
        choices=("auto", "none"),
    )
    harmonize_b0: bool = option(True, "do not scale runs to a common mean b=0 intensity", "--no-b0-harmonization")


@dataclass(frozen=True)
class GradientSettings(Checked):
    """Check of the b-table against the images."""

    check: str = option(
        "warn",
        "compare the b-vectors with their 23 flips and permutations by the length of streamlines, and the order of the "
        "volumes with their b-values: warn of a wrong table, fix wrong b-vectors if the right ones are clear, or off",
        "--bvec-check",
        choices=("warn", "fix", "off"),
    )


@dataclass(frozen=True)
class NonlinearitySettings(Checked):
    """Nonlinearity of the gradients: positions and b-values."""

    coefficients: str = option(
        "",
        "correct gradient nonlinearity with the fields of the scanner's gradient coils: Siemens' coefficients (.grad, "
        ".coef), or the displacement as an ITK field (.nii.gz) from points of the scanner to points of the images",
        "--gradient-coefficients",
        metavar="FILE",
    )
    scanner: str = option(
        "auto",
        "what the scanner corrected of it already, in all images: none, 2d (within slices) or 3d; auto reads ImageType "
        "and NonlinearGradientCorrection",
        "--scanner-gradwarp",
        choices=("auto", "none", "2d", "3d"),
    )


@dataclass(frozen=True)
class DenoiseSettings(Checked):
    """Noise and receive bias field."""

    method: str = option(
        "dwidenoise",
        "denoising: dwidenoise, MP-PCA (named after MRtrix3's program); dwidenoise2, MP-PCA with stabilised variance "
        "and shrinkage; svht, optimal shrinkage of singular values; patch2self, each volume from the others; or none",
        "--denoise-method",
        choices=("dwidenoise", "dwidenoise2", "svht", "patch2self", "none"),
    )
    noise_floor: str = option(
        "auto",
        "noise floor of magnitude images: koay inverts the expected magnitude with the noise map; vst denoises after "
        "stabilising the variance and inverts that without bias; auto takes vst with dwidenoise2 and koay otherwise",
        "--noise-floor",
        choices=("auto", "koay", "vst", "none"),
    )
    window: int = option(
        0,
        "window of MP-PCA and svht in voxels along each axis (odd); 0 takes 3 up to 27 volumes, 5 up to 62, 7 "
        "or more beyond",
        "--dwidenoise-window",
        "--dwi-denoise-window",
        metavar="VOXELS",
        least=0,
    )
    biascorrect: str = option(
        "n4",
        "N4 bias correction of the DWI, estimated on the b=0 reference",
        "--dwi-biascorrect",
        choices=("n4", "none"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.window % 2 == 0:
            raise SettingsError(
                f"DenoiseSettings.window (--dwidenoise-window): {self.window} is even; give an odd number of voxels"
            )
        if self.noise_floor in ("koay", "vst") and self.method == "none":
            raise SettingsError(
                f"--noise-floor {self.noise_floor} needs a denoised series, because single noisy magnitudes cannot be "
                "inverted without bias; choose a --denoise-method, or --noise-floor none"
            )
        if self.noise_floor == "vst" and self.method in ("svht", "patch2self"):
            raise SettingsError(
                f"--noise-floor vst is part of denoising by dwidenoise or dwidenoise2; with --denoise-method "
                f"{self.method} use --noise-floor koay or none"
            )


@dataclass(frozen=True)
class UnringingSettings(Checked):
    """Gibbs ringing."""

    method: str = option(
        "auto",
        "removal of Gibbs ringing: mrdegibbs (local subvoxel shifts, named after MRtrix3's program), rpg (the same "
        "for partial Fourier acquisitions) or none; auto takes the one that fits PartialFourier, and none where it is "
        "unknown or k-space shows that the images were interpolated",
        "--unringing-method",
        choices=("auto", "mrdegibbs", "rpg", "none"),
    )


@dataclass(frozen=True)
class MotionSettings(Checked):
    """Head motion by SHORELine: predict each volume from the others, register it to its prediction, repeat."""

    method: str = option("shoreline", "head-motion correction", "--hmc-method", choices=("shoreline", "none"))
    model: str = option(
        "auto",
        "signal model that predicts each volume; auto takes 3dSHORE where there are enough directions; none aligns the "
        "b=0 volumes only and interpolates between them",
        "--hmc-model",
        choices=("auto", "3dSHORE", "tensor", "none"),
    )
    iters: int = option(
        3,
        "largest number of rounds of prediction and registration at the resolution of the series; up to 10 at each of "
        "two coarser ones precede them",
        "--shoreline-iters",
        metavar="N",
        least=1,
    )
    transform: str = option("Rigid", "transform of each volume", "--hmc-transform", choices=("Rigid", "Affine"))
    eddy: str = option(
        "quadratic",
        "eddy currents of diffusion-weighted volumes: displacement along the phase-encoding axis, a polynomial of this "
        "order in scanner coordinates whose coefficients are linear in the gradient",
        "--eddy-model",
        choices=("none", "linear", "quadratic"),
    )
    outliers: str = option(
        "report",
        "slices with signal dropout: report them, or replace them by their prediction",
        "--outliers",
        choices=("report", "replace"),
    )
    slices: str = option(
        "off",
        "motion of the head while a volume is acquired, with a pose for each shot: auto, in volumes that clearly need "
        "it, if the sidecars give SliceTiming; on, in all volumes; or off",
        "--slice-motion",
        choices=("auto", "off", "on"),
    )
    tolerance: float = option(
        0.02,
        "stop when no volume moves by more than this (mm) in a round",
        "--hmc-tolerance",
        metavar="MM",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slices == "on" and (self.method == "none" or self.model == "none" or self.transform == "Affine"):
            raise SettingsError(
                "--slice-motion on registers slices to predictions of a signal model by rigid transforms; leave out "
                "--hmc-method none, --hmc-model none and --hmc-transform Affine, or choose --slice-motion auto"
            )


@dataclass(frozen=True)
class DistortionSettings(Checked):
    """Susceptibility distortion along the phase-encoding axis."""

    method: str = option(
        "auto",
        "susceptibility distortion correction; auto takes drbuddi where there are reversed phase encodings, and "
        "a gradient-echo fieldmap otherwise",
        "--sdc-method",
        choices=("auto", "drbuddi", "none"),
    )
    anat_reference: str = option(
        "none",
        "correct series without a fieldmap using the tissues of a structural image: invt1w (the T1w), t2w, or auto "
        "(the image of --anat-modality)",
        "--sdc-anat-reference",
        choices=("none", "auto", "t2w", "invt1w"),
    )
    engine: str = option(
        "native",
        "program for blip-up/blip-down correction: dsiprep itself, or TORTOISE's DRBUDDI from TORTOISE_HOME or PATH",
        "--sdc-engine",
        choices=("native", "tortoise"),
    )


@dataclass(frozen=True)
class MovingFieldSettings(Checked):
    """Change of the off-resonance field with pitch and roll of the head."""

    method: str = option(
        "off",
        "change of the off-resonance field with pitch and roll, estimated from the series: auto, where rotations are "
        "large enough to tell and the evidence is clear; on, wherever rotations are large enough; or off",
        "--moving-field",
        choices=("auto", "off", "on"),
    )


@dataclass(frozen=True)
class AnatomySettings(Checked):
    """Structural image: bias field, brain mask, ACPC alignment, template."""

    modality: str = option(
        "T1w",
        "structural image; none uses the b=0 reference instead",
        "--anat-modality",
        choices=("T1w", "T2w", "none"),
    )
    reference: str = option(
        "first-lex",
        "how several structural images are averaged: first-lex, all images of a subject in the space of the first by "
        "name; unbiased, all in a space midway between them; sessionwise, midway within each session",
        "--subject-anatomical-reference",
        choices=("first-lex", "unbiased", "sessionwise"),
    )
    mask: str = option(
        "",
        "brain mask to use as it is: a file, a pattern with {subject} and {session}, or a folder of BIDS derivatives "
        "with desc-brain_mask files",
        "--anat-mask",
        metavar="FILE|PATTERN|FOLDER",
    )
    template: str = option(
        "",
        "template: a TemplateFlow name (MNI152NLin6Asym, MNIInfant+2), downloaded if it is not on this machine, or a "
        "T1w or T2w file of your own with mask and tissue priors beside it under TemplateFlow's names; by default "
        "MNI152NLin2009cAsym, downloaded if possible and otherwise approximated by the bundled MNI152NLin2009aSym",
        "--anatomical-template",
        metavar="NAME|FILE",
    )
    biascorrect: str = option(
        "n4", "N4 bias correction of the structural image", "--anat-biascorrect", choices=("n4", "none")
    )
    normalize: bool = option(
        True, "do not register the structural image to the template", "--skip-anat-based-spatial-normalization"
    )
    finest_mm: float = option(1.0, "voxel size in mm at which the registration to the template ends", least=0.5)
    engine: str = option(
        "native",
        "program for brain mask and tissue segmentation: dsiprep itself, or FreeSurfer's SynthStrip and SynthSeg (7.4 "
        "or later, from FREESURFER_HOME)",
        "--anat-engine",
        choices=("native", "freesurfer"),
    )
    normalization: str = option(
        "auto",
        "program for the registration to the template: dsiprep itself, ANTs (antsRegistration, or antspyx) or "
        "FreeSurfer's SynthMorph; auto takes SynthMorph with --anat-engine freesurfer, native otherwise",
        "--normalization-engine",
        choices=("auto", "native", "ants", "synthmorph"),
    )
    ants_settings: str = option(
        "precise", "which of fMRIPrep's settings ANTs uses", "--ants-settings", choices=("precise", "fast")
    )
    synthseg_robust: bool = option(False, "SynthSeg in robust mode: slower, more memory", "--synthseg-robust")
    synthseg_parc: bool = option(False, "let SynthSeg parcellate the cortex as well", "--synthseg-parc")

    @property
    def normalizer(self) -> str:
        """Program that registers to the template: "none", "native", "ants" or "synthmorph"."""
        if not self.normalize:
            return "none"
        if self.normalization != "auto":
            return self.normalization
        return "synthmorph" if self.engine == "freesurfer" else "native"


@dataclass(frozen=True)
class CoregisterSettings(Checked):
    """Registration of the b=0 reference to the structural image."""

    dof: int = option(
        6, "degrees of freedom from the b=0 reference to the structural image", "--dwi2anat-dof", choices=(6, 12)
    )


@dataclass(frozen=True)
class ResampleSettings(Checked):
    """Output grid, and how series of different phase encoding are combined."""

    resolution: float = option(
        0.0, "voxel size of the output in mm (required)", "--output-resolution", metavar="MM", least=0, most=10
    )
    merge: str = option(
        "none",
        "how corrected series of different phase encoding are combined: concat joins all corrected outputs of a "
        "session; average also averages volumes with the same b-value and b-vector; least-squares averages them with "
        "weights that follow from how much each phase encoding stretched the image",
        "--distortion-group-merge",
        choices=("none", "concat", "average", "least-squares"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.resolution < SMALLEST_VOXEL_MM:  # 0 is the default: not chosen yet
            raise SettingsError(
                f"ResampleSettings.resolution (--output-resolution): {self.resolution:g} mm is too small; "
                f"the smallest accepted value is {SMALLEST_VOXEL_MM:g}"
            )

    def require_resolution(self) -> None:
        """Refuse the default of 0, which stands for a resolution that has not been chosen.

        Raises
        ------
        SettingsError
            With a line that works.
        """
        if not self.resolution:
            raise SettingsError(
                "no output resolution is set; give the voxel size in mm: --output-resolution 2, or in Python "
                "Settings(resample=ResampleSettings(resolution=2.0))"
            )


SMALLEST_VOXEL_MM = 0.5


@dataclass(frozen=True)
class LatticeSettings(Checked):
    """The preprocessed series on a Cartesian lattice in q-space, in addition to the series itself."""

    grid: str = option(
        "none",
        "evaluate the corrected series on a lattice, from which heads that turned have moved it: that which was "
        "acquired, the half (dsi257) or full (dsi515) lattice of radius 5 up to the largest acquired b-value, or the "
        "gradients in a text file with x y z b per row (world RAS+ of the output)",
        "--q-grid",
        metavar="none|acquired|dsi257|dsi515|FILE",
    )


@dataclass(frozen=True)
class ReportSettings(Checked):
    """The report of a subject."""

    bounds: str = option(
        "",
        "TOML file of bounds for the verdicts at the top of the report, such as the group_bounds.toml of a cohort; "
        "checks that it does not name keep dsiprep's bounds",
        "--report-bounds",
        metavar="FILE",
    )
    single_file: bool = option(
        False, "also write sub-X_report.html, one file with all figures inside it, to be mailed", "--report-single-file"
    )


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by stage."""

    acquisition: AcquisitionSettings = AcquisitionSettings()
    gradients: GradientSettings = GradientSettings()
    nonlinearity: NonlinearitySettings = NonlinearitySettings()
    denoise: DenoiseSettings = DenoiseSettings()
    unringing: UnringingSettings = UnringingSettings()
    motion: MotionSettings = MotionSettings()
    distortion: DistortionSettings = DistortionSettings()
    moving_field: MovingFieldSettings = MovingFieldSettings()
    anatomy: AnatomySettings = AnatomySettings()
    coregister: CoregisterSettings = CoregisterSettings()
    resample: ResampleSettings = ResampleSettings()
    lattice: LatticeSettings = LatticeSettings()
    report: ReportSettings = ReportSettings()

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, kind = getattr(self, entry.name), type(entry.default)
            if not isinstance(value, kind):
                raise SettingsError(
                    f"Settings.{entry.name} is {type(value).__name__}; {kind.__name__}(...) is wanted, as in "
                    f"Settings({entry.name}={kind.__name__}())"
                )
