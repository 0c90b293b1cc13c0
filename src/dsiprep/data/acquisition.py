"""Acquisition: phase encoding, runs, fieldmaps, the unit processed together, and its sampling scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.data.summary import Summarised

AXES = "ijk"
LEAST_ANGLE = 45.0  # degrees between displacements, from which on two images determine the field that causes them
SAME_TIME_S = 0.004  # slices with times closer than this are excited together


@dataclass(frozen=True)
class PhaseEncoding:
    """Phase-encoding direction and total readout time of one run.

    An off-resonance of `f` Hz shifts signal by `f * readout_time * polarity` voxels along `axis`: tissue at voxel x
    appears at x + shift.

    Attributes
    ----------
    axis : int
        0, 1 or 2: voxel axis i, j or k of the file.
    polarity : int
        +1 for `i`, `j`, `k` (blip-up), -1 for `i-`, `j-`, `k-` (blip-down).
    readout_time : float or None
        Total readout time in s; None where the sidecars do not give it.
    """

    axis: int
    polarity: int
    readout_time: float | None = None

    @classmethod
    def from_bids(cls, direction: str, readout_time: float | None = None) -> PhaseEncoding:
        """Build from BIDS `PhaseEncodingDirection` ("i", "j-", ...) and `TotalReadoutTime` (s)."""
        return cls(AXES.index(direction[0]), -1 if direction.endswith("-") else 1, readout_time)

    @property
    def direction(self) -> str:
        """BIDS notation: "j" or "j-"."""
        return AXES[self.axis] + ("-" if self.polarity < 0 else "")

    def vector(self, grid: Grid) -> np.ndarray:
        """World displacement (3,), mm RAS+, of a shift by one voxel along +axis; independent of polarity."""
        return grid.affine[:3, self.axis]

    def mm_per_hz(self, grid: Grid) -> float:
        """Displacement in mm per Hz, or the voxel size if the readout time is unknown."""
        return (1.0 if self.readout_time is None else self.readout_time) * float(grid.voxel_sizes[self.axis])


def simultaneous_slices(times: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    """Slices excited together, in temporal order, from the acquisition time of each slice in s."""
    groups: list[list[int]] = []
    last = -np.inf
    for index in np.argsort(times, kind="stable"):
        if times[index] - last > SAME_TIME_S:
            groups.append([])
        groups[-1].append(int(index))
        last = times[index]
    return tuple(tuple(sorted(group)) for group in groups)


def displacement_angle(first: tuple[PhaseEncoding, Grid], second: tuple[PhaseEncoding, Grid]) -> float:
    """Angle in degrees between the displacements by the same positive off-resonance: 180 for opposite encodings."""
    one, other = (pe.polarity * grid.directions[:, pe.axis] for pe, grid in (first, second))
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other)))


@dataclass(frozen=True)
class AxisCheck:
    """Misfit of two images at coarse resolution, if they were phase encoded along one voxel axis or another.

    `axes` begins with the axis that the sidecars give; `misfits` has one value for each.
    """

    axes: tuple[int, ...]
    misfits: tuple[float, ...]


@dataclass(frozen=True)
class KSpace:
    """How the k-space of a series was sampled, along the voxel axes of its file.

    Attributes
    ----------
    slice_axis : int
        Across slices; k-space has the other two.
    pe_axis : int or None
        Of phase encoding; None where unknown.
    partial_fourier : float or None
        Fraction sampled along `pe_axis`; 1 if all of it was, None where unknown.
    """

    slice_axis: int
    pe_axis: int | None
    partial_fourier: float | None


@dataclass(frozen=True)
class Run:
    """Files of one DWI run.

    Attributes
    ----------
    image, bval, bvec : Path
    pe : PhaseEncoding or None
    entities : dict
        BIDS entities by their short names, in file-name order.
    metadata : dict
    complex_part : Path or None
        The image that makes the series complex: the phase of a magnitude, or the imaginary part of a real part.
    use_phase : bool
        Whether the phase of a complex series is used.
    """

    image: Path
    bval: Path
    bvec: Path
    pe: PhaseEncoding | None
    entities: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    complex_part: Path | None = None
    use_phase: bool = True

    @property
    def axis(self) -> int | None:
        """Voxel axis of phase encoding; it may be known when the polarity is not."""
        axis = self.metadata.get("PhaseEncodingAxis")
        if self.pe is None:
            return AXES.index(axis) if isinstance(axis, str) and axis in tuple(AXES) else None
        return self.pe.axis

    @property
    def is_cartesian(self) -> bool:
        """Whether `image` is the real part of a complex series, not its magnitude."""
        return self.complex_part is not None and "_part-imag" in self.complex_part.name

    @property
    def k_space(self) -> KSpace:
        """Sampling of k-space."""
        return k_space(self.metadata, self.axis)


def k_space(metadata: Mapping[str, object], pe_axis: int | None) -> KSpace:
    """Sampling of k-space from sidecar fields; slices lie along k unless SliceEncodingDirection is another axis."""
    direction, fraction = metadata.get("SliceEncodingDirection"), metadata.get("PartialFourier")
    slice_axis = AXES.index(direction[0]) if isinstance(direction, str) and direction[:1] in tuple(AXES) else 2
    if str(metadata.get("PartialFourierDirection", "phase")).lower() != "phase":
        fraction = None
    elif fraction is None and str(metadata.get("PartialFourierEnabled")).lower() == "no":
        fraction = 1.0
    known = isinstance(fraction, int | float) and 0.5 < fraction <= 1
    return KSpace(slice_axis, pe_axis, float(cast(float, fraction)) if known else None)


@dataclass(frozen=True)
class EpiReference:
    """An EPI image with another phase encoding, mostly the reverse: one or several b=0 volumes.

    `bval` identifies the b=0 volumes of a diffusion series; None uses all volumes.
    """

    image: Path
    pe: PhaseEncoding
    bval: Path | None = None
    metadata: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class UnusedImage:
    """An image of anat, dwi or fmap that no unit takes, and why: a clause without a full stop."""

    path: Path
    reason: str


@dataclass(frozen=True)
class GreFieldmap:
    """A gradient-echo fieldmap of fmap/ intended for the runs.

    Attributes
    ----------
    kind : str
        "phasediff" (one image), "phases" (phase1 and phase2) or "fieldmap" (off-resonance in `units`).
    images : tuple of Path
    magnitude : Path
        Magnitude of the same scan, for brain masking and registration.
    echo_difference : float or None
        Second echo time minus first, s; None for "fieldmap".
    units : str
        Unit of a "fieldmap": "Hz", "rad/s" or "T".
    """

    kind: str
    images: tuple[Path, ...]
    magnitude: Path
    echo_difference: float | None = None
    units: str = "Hz"

    def files(self) -> tuple[Path, ...]:
        """All image files, the magnitude last."""
        return (*self.images, self.magnitude)


@dataclass(frozen=True, repr=False)
class Unit(Summarised):
    """Files processed together into one output: DWI runs of one subject and session, and the images they need.

    Attributes
    ----------
    subject, session : str, str or None
        BIDS labels without `sub-` and `ses-`.
    name : str
        Prefix of the outputs, such as `sub-01_ses-1_acq-dsi`: the entities shared by all runs.
    runs : tuple of Run
        At least one.
    epis : tuple of EpiReference
        Images that serve only to estimate the distortion, all of one phase encoding; none if the runs have two.
    t1w, t2w : tuple of Path
        Structural images, in file order.
    gre : GreFieldmap or None
        Used where there are no images of opposite phase encoding.
    notes : tuple of str
        Sentences on how files were grouped, what was inferred and what cannot be done.
    warnings : tuple of str
        Contradictions in the sidecars that may have spoilt the grouping.
    rejected_fieldmaps : tuple of str
        Images that could determine the distortion of the series, and why they do not; empty if others do.
    output : str
        Name of the joined output that includes this unit's corrected series; empty if the unit has its own output.
    left_out : tuple of UnusedImage
        Images of the subject that no unit takes.
    """

    subject: str
    session: str | None
    name: str
    runs: tuple[Run, ...]
    epis: tuple[EpiReference, ...] = ()
    t1w: tuple[Path, ...] = ()
    t2w: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    gre: GreFieldmap | None = None
    output: str = ""
    warnings: tuple[str, ...] = ()
    rejected_fieldmaps: tuple[str, ...] = ()
    left_out: tuple[UnusedImage, ...] = ()

    def files(self) -> tuple[Path, ...]:
        """Files of the DWI runs and EPI references."""
        series = [path for run in self.runs for path in (run.image, run.complex_part, run.bval, run.bvec) if path]
        references = [path for epi in self.epis for path in (epi.image, epi.bval) if path is not None]
        return (*series, *references)

    def reversed_pairs(self) -> list[str]:
        """Phase encodings, along the axes of each file, that determine the distortion together; empty without any."""
        directions = sorted({run.pe.direction for run in self.runs if run.pe})
        others = sorted({epi.pe.direction for epi in self.epis})
        return [*directions, *others] if len(directions) > 1 or (directions and others) else []

    def structural(self, modality: str) -> tuple[Path, ...]:
        """Structural images of modality "T1w" or "T2w"; empty for "none"."""
        return {"T1w": self.t1w, "T2w": self.t2w}.get(modality, ())

    def sidecar_fields(self) -> list[object]:
        """Phase encodings and acquisition metadata of `files`, from the sidecars."""
        series: list[object] = [[run.pe, run.metadata, run.use_phase] for run in self.runs]
        return series + [[epi.pe, epi.metadata] for epi in self.epis]


@dataclass(frozen=True)
class SamplingScheme:
    """Sampling scheme, recognised from the b-table alone.

    Attributes
    ----------
    kind : str
        "single-shell", "multi-shell", "DSI" (a full Cartesian lattice), "CS-DSI" (part of the lattice),
        "b0-only" or "other".
    half_sphere : bool
        For lattice schemes: whether only one half of q-space was sampled.
    bvalues : tuple of float
        b-values in s/mm²: of the shells, or else the distinct b-values of the lattice.
    n_directions, n_b0 : int
    max_b : float
        s/mm².
    description : str
        One line for log and report: "Cartesian DSI, 257 directions on a lattice of radius 5 (half sphere), b to 7000".
    """

    kind: str
    half_sphere: bool
    bvalues: tuple[float, ...]
    n_directions: int
    n_b0: int
    max_b: float
    description: str

    @property
    def shelled(self) -> bool:
        """Whether the scheme consists of shells."""
        return self.kind in ("single-shell", "multi-shell")
