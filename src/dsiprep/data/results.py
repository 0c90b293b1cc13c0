"""Results of the stages: frozen dataclasses with what later stages, derivatives and the report need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.acquisition import KSpace, PhaseEncoding, SamplingScheme, Unit
from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import GradientNonlinearity
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.motion import Motion, eddy_currents
from dsiprep.data.moving_field import MovingField
from dsiprep.data.qspace import GradientCheck, Lattice, QSpaceQuality
from dsiprep.data.summary import Summarised
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.settings import Settings


@dataclass(frozen=True, eq=False, repr=False)
class Blip(Summarised):
    """Volumes of one phase-encoding direction: DWI of the unit, or b=0 images that serve as their counterpart.

    Attributes
    ----------
    name : str
        "up" (polarity +1), "down" (-1) or "only".
    pe : PhaseEncoding or None
        None if the sidecars do not give the direction.
    epis : Tensor, (m, i, j, k)
        b=0 images that serve only to estimate the distortion; m is 0 where the blip has DWI volumes.
    grid : Grid or None
        Of `epis`, whose axes `pe` refers to; None if it is that of the DWI.
    """

    name: str
    pe: PhaseEncoding | None
    epis: torch.Tensor
    grid: Grid | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Drift(Summarised):
    """Drift of the signal over each run.

    Attributes
    ----------
    gains : ndarray, (n,)
        Signal of each volume relative to the first of its run, as fitted; 1 where there is no significant drift.
    measured : ndarray, (n,)
        The same as measured in single volumes; NaN where it was not.
    notes : tuple of str
        What was found, a sentence for each run with drift.
    """

    gains: np.ndarray
    measured: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Acquired(Summarised):
    """The conformed series, with the voxel axes of the first run's file.

    Attributes
    ----------
    dwi : DWI
        All runs, concatenated. `dwi.blip` indexes `blips`.
    blips : tuple of Blip
        One or two.
    scheme : SamplingScheme
    mask : Volume
        Rough, generous brain mask of the mean b=0 (0 or 1), for denoising and motion correction.
    scales : ndarray, (runs,)
        Factor applied to each run so that b=0 intensities agree.
    multiband : tuple of tuple of int
        Simultaneously excited slices, from SliceTiming; empty where unknown.
    slice_axis : int or None
        Voxel axis across slices, from the sidecars; None where they do not give it or differ.
    drift : Drift or None
        Divided out of `dwi`; None if it was not estimated.
    k_space : tuple of KSpace or None
        Of each run; None for runs that were resampled.
    phase : Tensor, (n, i, j, k), or None
        Phase in radians where all runs are complex; `dwi` holds magnitudes.
    references : str
        What was done about Gibbs ringing in the images that serve only to estimate the distortion.
    """

    dwi: DWI
    blips: tuple[Blip, ...]
    scheme: SamplingScheme
    mask: Volume
    scales: np.ndarray
    multiband: tuple[tuple[int, ...], ...] = ()
    slice_axis: int | None = None
    drift: Drift | None = None
    k_space: tuple[KSpace | None, ...] = ()
    phase: torch.Tensor | None = None
    references: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Denoised(Summarised):
    """The denoised series.

    Attributes
    ----------
    dwi : DWI
    noise : Volume or None
        Noise standard deviation per voxel; of magnitudes, that of one channel.
    rank : Volume or None
        Mean number of principal components kept per voxel.
    method : str
        What was done, for log and report.
    floor : str
        How the noise floor of magnitudes was removed: "koay", "vst" or "none".
    coils : float or None
        Effective number of coils with which it was removed; None if it was not.
    """

    dwi: DWI
    noise: Volume | None
    rank: Volume | None
    method: str
    floor: str = "none"
    coils: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Unringed(Summarised):
    """The series without Gibbs ringing.

    Attributes
    ----------
    dwi : DWI
    methods : tuple of str
        Of each run: "mrdegibbs", "rpg" or "none".
    description : str
        What was done and why, for log and report.
    """

    dwi: DWI
    methods: tuple[str, ...]
    description: str

    @property
    def applied(self) -> bool:
        """Whether ringing was removed from any run."""
        return any(method != "none" for method in self.methods)


@dataclass(frozen=True, eq=False, repr=False)
class Reference(Summarised):
    """The least distorted b=0 reference image (dwiref) available, and its brain mask (0 or 1)."""

    dwiref: Volume
    mask: Volume


@dataclass(frozen=True, eq=False, repr=False)
class Distortion(Summarised):
    """Susceptibility distortion: transforms from the undistorted dwiref to the dwiref of each blip.

    A point x of the undistorted dwiref appears in the dwiref of blip b at poses[b] @ x + u_b(x) with u_b =
    `fields[b]`: the rigid pose of the head, then the displacement along the phase-encoding axis, which is fixed in
    the scanner. In volume v it appears at x_v = transforms[v] @ poses[b] @ x + u_b(x): the field moves with the head.

    Attributes
    ----------
    poses : ndarray, (blips, 4, 4), float64
    fields : tuple of DisplacementField
        u_b in mm RAS+ on the grid of the dwiref, one per blip.
    fieldmap_hz : Volume or None
        Off-resonance field in Hz on the grid of the dwiref; None without a known readout time.
    dwiref : Volume
        The corrected b=0 reference image.
    before, after : tuple of Volume
        b=0 image of each blip before and after correction, on the grid of the dwiref.
    trace : list of dict
        One row per iteration: pyramid level, cost, step.
    method : str
    notes : tuple of str
        Remarks for the report.
    diffusion : bool
        Whether diffusion-weighted images of both blips were compared in addition to b=0 images.
    doubt : str
        Why the correction should not be applied unless it is asked for; empty if nothing speaks against it.
    """

    poses: np.ndarray
    fields: tuple[DisplacementField, ...]
    fieldmap_hz: Volume | None
    dwiref: Volume
    before: tuple[Volume, ...]
    after: tuple[Volume, ...]
    trace: list[dict[str, float]]
    method: str
    notes: tuple[str, ...] = ()
    diffusion: bool = False
    doubt: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Anatomy(Summarised):
    """The structural image in ACPC (anterior-posterior commissure) space, and its transforms.

    Without a structural image, `modality` is "none", `image` is the b=0 reference image, and tissue and template are
    None.

    Attributes
    ----------
    modality : str
        "T1w", "T2w" or "none".
    image, mask : Volume
        Bias-corrected structural image and its brain mask (0 or 1) in ACPC space, LPS+.
    tissue : Tensor, (3, i, j, k) or None
        Probabilities of CSF, GM, WM on the grid of `image`.
    anat_to_acpc : Affine
        Rigid; maps points of ACPC space to points of the native structural image.
    acpc_to_template, template_to_acpc : Chain or None
        `acpc_to_template` maps points of the template to points of ACPC space; None without normalisation.
    template : str
        TemplateFlow name of the template.
    template_image, warped : Volume or None
        Brain of the template, and the structural brain normalised to it.
    notes : tuple of str
        Remarks for the report.
    orig_to_anat : tuple of Affine
        For each acquired structural image: maps points of their average to points of that image.
    magnification : float
        Factor by which the head was enlarged during processing: 1 for human heads, larger for small animals.
    labels : Volume or None
        FreeSurfer structure labels on the grid of `image`, if SynthSeg segmented it.
    template_origin : str
        Where the template came from, as `dsiprep.data.template.Template.origin`.
    """

    modality: str
    image: Volume
    mask: Volume
    tissue: torch.Tensor | None
    anat_to_acpc: Affine
    acpc_to_template: Chain | None
    template_to_acpc: Chain | None
    template: str
    template_image: Volume | None
    warped: Volume | None
    notes: tuple[str, ...] = ()
    orig_to_anat: tuple[Affine, ...] = ()
    magnification: float = 1.0
    labels: Volume | None = None
    template_origin: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Coregistration(Summarised):
    """Coregistration of the dwiref to ACPC space.

    Attributes
    ----------
    dwiref_to_acpc : Affine
        Maps points of ACPC space to points of the undistorted dwiref.
    score_before, score_after : float
        Similarity with the scanner coordinates alone, and after registration; larger is better.
    metric : str
        "mi" (normalised mutual information), "cc" (correlation) or "none" (nothing to register to).
    target_unit : str
        Name of the output whose b=0 reference image was the registration target; empty if the target was a structural
        image or the unit's own reference.
    notes : tuple of str
        Remarks for the report.
    """

    dwiref_to_acpc: Affine
    score_before: float
    score_after: float
    metric: str
    target_unit: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Preprocessed(Summarised):
    """The series resampled to ACPC space in a single step.

    `sources` lists the acquired volumes averaged into each volume of `dwi`; empty if none were averaged. `coverage` is
    the fraction of the acquired volumes whose field of view contains each voxel; None if it was not computed.
    `deviation` (9, i, j, k) is L, row by row in world RAS+ axes: where a gradient g is prescribed, (I + L) g acts; None
    if the fields of the gradients are not known.
    """

    dwi: DWI
    dwiref: Volume
    mask: Volume
    interpolation: str
    sources: tuple[tuple[int, ...], ...] = ()
    coverage: Volume | None = None
    deviation: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Quality(Summarised):
    """Quality metrics of a preprocessed series.

    Attributes
    ----------
    table : dict
        The row of image_qc.tsv, by column.
    confounds : dict of ndarray, (n,)
        Columns of the confounds table, one value per volume.
    slice_z : ndarray, (n, slices)
        Robust z-scores of the signal of slices over their prediction.
    cnr, tsnr : Volume or None
        Maps of the contrast-to-noise and temporal signal-to-noise ratios.
    notes : tuple of str
        Remarks for the report.
    qspace : QSpaceQuality or None
        None with too few diffusion-weighted volumes, and for joined series.
    """

    table: dict[str, float | str | None]
    confounds: dict[str, np.ndarray]
    slice_z: np.ndarray
    cnr: Volume | None
    tsnr: Volume | None
    notes: tuple[str, ...] = ()
    qspace: QSpaceQuality | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Joined(Summarised):
    """The series joined from several corrected units.

    `files` names the run of each acquired volume, `members` the units, and `merge` the way they were joined.
    """

    name: str
    members: tuple[str, ...]
    merge: str
    files: tuple[str, ...]
    preprocessed: Preprocessed
    quality: Quality
    model: str
    lattice: Lattice | None = None


@dataclass(frozen=True, eq=False, repr=False)
class UnitResults(Summarised):
    """All results of one unit, from which derivatives and reports are written.

    `motions` has one entry per blip with DWI volumes, in the order of `acquired.blips`; `seconds` is the wall time of
    each stage; `device` names the compute device. `distortion` is None if none was corrected, and
    `distortion_reason` gives the reason or the chosen method. `warnings` must not be overlooked. `gradients` and
    `lattice` are None if they were not asked for, as `nonlinearity` and `moving_field` are.
    """

    unit: Unit
    settings: Settings
    acquired: Acquired
    denoised: Denoised
    unringed: Unringed
    motions: tuple[Motion, ...]
    distortion: Distortion | None
    distortion_reason: str
    anatomy: Anatomy
    coregistration: Coregistration
    preprocessed: Preprocessed
    quality: Quality
    seconds: dict[str, float]
    device: str
    warnings: tuple[str, ...] = ()
    gradients: GradientCheck | None = None
    lattice: Lattice | None = None
    nonlinearity: GradientNonlinearity | None = None
    moving_field: MovingField | None = None


__all__ = [
    "Acquired",
    "Anatomy",
    "Blip",
    "Coregistration",
    "Denoised",
    "Distortion",
    "Drift",
    "Grid",
    "Joined",
    "Motion",
    "MovingField",
    "Preprocessed",
    "Quality",
    "UnitResults",
    "Unringed",
    "eddy_currents",
]
