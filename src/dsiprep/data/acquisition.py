"""How the data were acquired: phase encoding, blips, and the unit that is processed together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsiprep.data.grid import Grid

AXES = "ijk"


@dataclass(frozen=True)
class PhaseEncoding:
    """The direction and speed of phase encoding of one run.

    A field of `f` Hz moves signal by `f * readout_time * polarity` voxels along `axis`: where the head is at
    voxel x, its signal is found at x + shift.

    Attributes
    ----------
    axis : int
        0, 1 or 2: voxel axis i, j or k of the file.
    polarity : int
        +1 for `i`, `j`, `k` (blip-up), -1 for `i-`, `j-`, `k-` (blip-down).
    readout_time : float or None
        Total readout time in s; None where the sidecars do not tell.
    """

    axis: int
    polarity: int
    readout_time: float | None = None

    @classmethod
    def from_bids(cls, direction: str, readout_time: float | None = None) -> PhaseEncoding:
        """From BIDS' `PhaseEncodingDirection` ("i", "j-", ...) and `TotalReadoutTime` (s)."""
        return cls(AXES.index(direction[0]), -1 if direction.endswith("-") else 1, readout_time)

    @property
    def direction(self) -> str:
        """As BIDS writes it: "j" or "j-"."""
        return AXES[self.axis] + ("-" if self.polarity < 0 else "")

    def vector(self, grid: Grid) -> np.ndarray:
        """Displacement in world RAS+ mm for a shift of one voxel along +axis, (3,). Polarity is not in it."""
        return grid.affine[:3, self.axis]


@dataclass(frozen=True)
class Run:
    """One DWI run as files. `entities` are the BIDS entities by their short names, in file order."""

    image: Path
    bval: Path
    bvec: Path
    pe: PhaseEncoding | None
    entities: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)

    @property
    def axis(self) -> int | None:
        """Voxel axis of phase encoding; it may be known where the sign is not."""
        told = self.metadata.get("PhaseEncodingAxis")
        if self.pe is None:
            return AXES.index(told) if isinstance(told, str) and told in tuple(AXES) else None
        return self.pe.axis


@dataclass(frozen=True)
class EpiReference:
    """A reversed phase-encoding EPI of fmap/, one or several b=0 volumes.

    `bval` tells which volumes are b=0 where the image is a diffusion series; None takes all volumes.
    """

    image: Path
    pe: PhaseEncoding
    bval: Path | None = None


@dataclass(frozen=True)
class GreFieldmap:
    """A gradient-echo fieldmap of fmap/ that is to correct the runs.

    Attributes
    ----------
    kind : str
        "phasediff" (one image), "phases" (phase1 and phase2) or "fieldmap" (in `units`).
    images : tuple of Path
    magnitude : Path
        Of the same scan: it tells where the brain is, and what moved.
    echo_difference : float or None
        s, second echo less first; None for "fieldmap".
    units : str
        Of a "fieldmap": "Hz", "rad/s" or "T".
    """

    kind: str
    images: tuple[Path, ...]
    magnitude: Path
    echo_difference: float | None = None
    units: str = "Hz"

    def files(self) -> tuple[Path, ...]:
        """Every file of it."""
        return (*self.images, self.magnitude)


@dataclass(frozen=True)
class Unit:
    """What is processed together into one output: the DWI of one subject's session, and what belongs to it.

    Attributes
    ----------
    subject, session : str, str or None
        Labels without `sub-` and `ses-`.
    name : str
        Prefix of the outputs: `sub-01_ses-1_acq-dsi`, the entities that all runs share.
    runs : tuple of Run
        At least one.
    epis : tuple of EpiReference
        b=0 images of fmap/ that pair with the runs.
    t1w, t2w : tuple of Path
        Structural images, in order.
    gre : GreFieldmap or None
        Corrects the runs where no images of opposite phase encoding do.
    notes : tuple of str
        Why these files go together, what was derived, and what cannot be done, in sentences.
    output : str
        Name of the output that this unit's corrected series is joined into with others'; empty where it is an output
        of its own.
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

    def files(self) -> tuple[Path, ...]:
        """Every file that the diffusion series is made of."""
        series = [path for run in self.runs for path in (run.image, run.bval, run.bvec)]
        references = [path for epi in self.epis for path in (epi.image, epi.bval) if path is not None]
        return (*series, *references)

    def reversed_pairs(self) -> list[str]:
        """The opposite phase encodings among runs and EPI references, such as ["j", "j-"]; empty if there are none."""
        directions = {run.pe.direction for run in self.runs if run.pe} | {epi.pe.direction for epi in self.epis}
        return sorted(d for d in directions if (d.rstrip("-") in directions and d.rstrip("-") + "-" in directions))

    def structural(self, modality: str) -> tuple[Path, ...]:
        """The images of "T1w" or "T2w"; none for "none"."""
        return {"T1w": self.t1w, "T2w": self.t2w}.get(modality, ())

    def facts(self) -> list[object]:
        """What the sidecars say of those files: phase encodings and acquisition fields."""
        return [[run.pe, run.metadata] for run in self.runs] + [epi.pe for epi in self.epis]


@dataclass(frozen=True)
class SamplingScheme:
    """What the b-table is, recognised from the table alone.

    Attributes
    ----------
    kind : str
        "single-shell", "multi-shell", "DSI" (a full Cartesian lattice), "CS-DSI" (part of the lattice),
        "b0-only" or "other".
    half_sphere : bool
        Lattice schemes: whether one half of q-space was sampled.
    bvalues : tuple of float
        Shells in s/mm² (shelled schemes); the distinct rings of the lattice otherwise.
    n_directions, n_b0 : int
    max_b : float
        s/mm².
    description : str
        One line for people: "Cartesian DSI, 257 directions on a lattice of radius 5 (half sphere), b to 7000".
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
        """Whether "shell" may be said of it."""
        return self.kind in ("single-shell", "multi-shell")
