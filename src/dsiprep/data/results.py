"""One result per stage. Frozen; what a report, a derivative or a later stage needs is in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme, Unit
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import Affine, Chain, DisplacementField, EddyCurrents
from dsiprep.settings import Settings


@dataclass(frozen=True, eq=False)
class Blip:
    """The volumes of one phase-encoding direction: DWI of the unit, b=0 images from fmap/, or both.

    Attributes
    ----------
    name : str
        "up" (polarity +1), "down" (-1) or "only".
    pe : PhaseEncoding or None
        None where the sidecars do not tell the direction.
    epis : Tensor, (m, i, j, k)
        b=0 volumes of fmap/ with this phase encoding, on the DWI's grid; m may be 0.
    """

    name: str
    pe: PhaseEncoding | None
    epis: torch.Tensor


@dataclass(frozen=True, eq=False)
class Acquired:
    """One conformed series, its voxels as in the file of the first run.

    Attributes
    ----------
    dwi : DWI
        All runs, one after the other. `dwi.blip` indexes `blips`.
    blips : tuple of Blip
        One or two.
    mask : Volume
        Rough brain mask of the mean b=0 (0 or 1), generous: for motion and noise.
    scales : ndarray, (runs,)
        The factor that each run was multiplied by so that b=0 intensities agree.
    multiband : tuple of tuple of int
        Slices excited together, from SliceTiming; empty where unknown.
    """

    dwi: DWI
    blips: tuple[Blip, ...]
    scheme: SamplingScheme
    mask: Volume
    scales: np.ndarray
    multiband: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Denoised:
    """The series after denoising; `noise` is sigma per voxel and `before` the b=0 mean that went in."""

    dwi: DWI
    noise: Volume | None
    rank: Volume | None
    method: str


@dataclass(frozen=True, eq=False)
class Motion:
    """Where the head was in every volume of one blip.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4), float64
        Points of the dwiref (world RAS+ mm) to points of volume v: x_v = transforms[v] @ x_dwiref. Bringing
        volume v onto the dwiref means reading it there.
    volumes : ndarray, (n,), int
        Which volumes of the conformed series these are.
    dwiref : Volume
        The b=0 reference that all volumes were aligned to, still distorted.
    mask : Volume
        Brain in the dwiref, 0 or 1.
    r2, xcorr : ndarray, (n,)
        Agreement of each aligned volume with its prediction in the mask, at the last round; NaN without a model.
    slice_z : ndarray, (n, slices)
        Robust z-score of each slice's residual against the prediction, along `slice_axis`; NaN as above.
    trace : list of dict
        One row per volume and round, in the columns of hmcOptimization.csv.
    model : str
        The signal model that was used: "3dSHORE", "tensor", "none" or "off".
    eddy : EddyCurrents or None
        Displacement of every volume by eddy currents, at the points that `transforms` lead to.
    outlier_slices : ndarray, (n, slices) bool, or None
        Slices of diffusion-weighted volumes that lost their signal.
    replacements : Tensor, (r, a, b), or None
        What takes their place, in the order of numpy.argwhere(outlier_slices); None where they stay as they are.
    """

    transforms: np.ndarray
    volumes: np.ndarray
    dwiref: Volume
    mask: Volume
    r2: np.ndarray
    xcorr: np.ndarray
    slice_z: np.ndarray
    slice_axis: int
    trace: list[dict[str, Any]]
    model: str
    eddy: EddyCurrents | None = None
    outlier_slices: np.ndarray | None = None
    replacements: torch.Tensor | None = None
    notes: tuple[str, ...] = ()

    def with_replaced_slices(self, row: int, volume: torch.Tensor) -> torch.Tensor:
        """The volume (i, j, k) of a row of `transforms` with its lost slices replaced, where they are to be."""
        if self.replacements is None or self.outlier_slices is None or not self.outlier_slices[row].any():
            return volume
        out = volume.clone()
        for number, (own, cut) in enumerate(np.argwhere(self.outlier_slices)):
            if own == row:
                out.select(self.slice_axis, int(cut)).copy_(self.replacements[number])
        return out


def eddy_currents(motions: tuple[Motion, ...], count: int) -> EddyCurrents | None:
    """Those of all blips together, for `count` volumes; None where none were looked for."""
    known = [(moved.volumes, moved.eddy) for moved in motions if moved.eddy is not None]
    if not known:
        return None
    coefficients = np.zeros((count, 10))
    for volumes, eddy in known:
        coefficients[volumes] = eddy.coefficients
    return replace(known[0][1], coefficients=coefficients)


@dataclass(frozen=True, eq=False)
class Reference:
    """The b=0 reference image (dwiref) with the least distortion that is available, and the brain in it (0 or 1)."""

    dwiref: Volume
    mask: Volume


@dataclass(frozen=True, eq=False)
class Distortion:
    """From the undistorted dwiref to each blip.

    A point x of the undistorted dwiref is found, in the dwiref of blip b, at poses[b] @ x + u_b(x), where u_b
    is `fields[b]`: the head's rigid pose and then the displacement along the phase-encoding axis, which is fixed
    in the scanner. With motion, x_v = transforms[v] @ poses[b] @ x + u_b(x): the field moves with the head.

    Attributes
    ----------
    poses : ndarray, (blips, 4, 4), float64
    fields : tuple of DisplacementField
        u_b in mm RAS+, on the grid of the dwiref, one per blip.
    fieldmap_hz : Volume or None
        Off-resonance on the dwiref's grid; None where no readout time is known.
    dwiref : Volume
        The corrected b=0 reference.
    before, after : tuple of Volume
        b=0 of each blip before and after, on the dwiref's grid.
    trace : list of dict
        One row per iteration: level, cost, step.
    diffusion : bool
        Whether diffusion-weighted images of both blips were compared beside those of b=0.
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


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The structural image in its own space, and the ways to ACPC and to the template.

    Everything on `grid` is in ACPC space. Where there is no structural image, `modality` is "none", the b=0
    reference stands in for it and tissue and template are None.

    Attributes
    ----------
    modality : str
        "T1w", "T2w" or "none".
    image, mask : Volume
        Bias-corrected structural image and its brain mask (0 or 1), ACPC space, LPS+.
    tissue : Tensor, (3, i, j, k) or None
        Probabilities of CSF, GM, WM on `image`'s grid.
    anat_to_acpc : Affine
        Rigid: points of ACPC to points of the native structural image.
    acpc_to_template, template_to_acpc : Chain or None
        acpc_to_template maps points of the template to ACPC; None where normalisation was skipped.
    template : str
        TemplateFlow's name of the template.
    template_image : Volume or None
        The template's brain, and `warped`, the structural brain brought onto it.
    orig_to_anat : tuple of Affine
        For each structural image as it was acquired: points of their average to points of it.
    enlarged : float
        How many times larger the head was made while it was worked on: 1 for people, more for animals.
    labels : Volume or None
        FreeSurfer's labels of structures on `image`'s grid, where SynthSeg found the tissues.
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
    enlarged: float = 1.0
    labels: Volume | None = None


@dataclass(frozen=True, eq=False)
class Coregistration:
    """dwiref to ACPC.

    Attributes
    ----------
    dwiref_to_acpc : Affine
        Points of ACPC to points of the undistorted dwiref.
    score_before, score_after : float
        Agreement where the scanner's coordinates put the images, and after; larger is better.
    metric : str
        "mi" (normalised mutual information), "cc" (correlation) or "none" (there was nothing to register to).
    led_by : str
        The unit whose b=0 reference it was registered to; empty where that is a structural image, or its own.
    """

    dwiref_to_acpc: Affine
    score_before: float
    score_after: float
    metric: str
    led_by: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """The series in ACPC space, resampled once.

    `sources` tells which volumes went into each volume of `dwi`, where some were made one; empty where none was.
    """

    dwi: DWI
    dwiref: Volume
    mask: Volume
    interpolation: str
    sources: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Quality:
    """Numbers about the result.

    Attributes
    ----------
    table : dict
        One row: the columns of image_qc.tsv.
    confounds : dict of ndarray, (n,)
        The columns of the confounds table, one value per volume.
    slice_z : ndarray, (n, slices)
        Robust z-scores of slices against the prediction.
    cnr, tsnr : Volume or None
    """

    table: dict[str, float | str | None]
    confounds: dict[str, np.ndarray]
    slice_z: np.ndarray
    cnr: Volume | None
    tsnr: Volume | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Joined:
    """The series that several corrected units were joined into.

    `files` names the run that each volume acquired came from; `members` the units; `merge` how they were joined.
    """

    name: str
    members: tuple[str, ...]
    merge: str
    files: tuple[str, ...]
    preprocessed: Preprocessed
    quality: Quality
    model: str


@dataclass(frozen=True, eq=False)
class UnitResults:
    """Everything that was found out about one unit: what reports and derivatives are drawn from.

    `motions` has one entry per blip that has DWI volumes, in the order of `acquired.blips`; `seconds` is the wall
    time of each stage; `device` names where it ran. `distortion` is None where none could be corrected, and
    `distortion_reason` says why, or which method was chosen.
    """

    unit: Unit
    settings: Settings
    acquired: Acquired
    denoised: Denoised
    motions: tuple[Motion, ...]
    distortion: Distortion | None
    distortion_reason: str
    anatomy: Anatomy
    coregistration: Coregistration
    preprocessed: Preprocessed
    quality: Quality
    seconds: dict[str, float]
    device: str


__all__ = [
    "Acquired",
    "Anatomy",
    "Blip",
    "Coregistration",
    "Denoised",
    "Distortion",
    "Grid",
    "Joined",
    "Motion",
    "Preprocessed",
    "Quality",
    "UnitResults",
    "eddy_currents",
]
