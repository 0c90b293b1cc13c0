"""Choice of the images that determine the distortion of a series together with it.

The displacements of two images by the same field have to differ in direction. Which images those are is decided in
scanner coordinates, from the headers: planes may be tilted, voxels and readout times may differ, and the axes of the
file may run either way. `ops.pepolar.second_blip` models all of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsiprep.data.acquisition import LEAST_ANGLE, EpiReference, PhaseEncoding, displacement_angle
from dsiprep.data.grid import Grid
from dsiprep.io.bids_filters import entities

__all__ = ["Choice", "EpiImage", "choose_counterpart", "contradicted_labels"]

OPPOSITE = 135.0  # degrees between displacements from which on encodings are opposite rather than orthogonal
SAME_ANGLE = 1.0  # degrees up to which images are of one phase encoding
SAME_LENGTH = 0.01  # relative difference of displacements up to which they are
LARGEST_RATIO = 3.0  # of readout times; beyond it one of the sidecars is wrong
LEAST_OVERLAP = 0.4  # of the series' field of view that the image covers
OPPOSITE_LABELS = {"AP": "PA", "PA": "AP", "LR": "RL", "RL": "LR", "HF": "FH", "FH": "HF", "IS": "SI", "SI": "IS"}


@dataclass(frozen=True)
class EpiImage:
    """An EPI image of a subject.

    Attributes
    ----------
    path : Path
    pe : PhaseEncoding
    grid : Grid
    kind : str
        "dwi", "fmap" or "sbref".
    session : str or None
    shim : tuple or None
        ShimSetting.
    bval : Path or None
        b-values that tell which volumes are b=0; None if all are.
    metadata : dict
        Sidecar fields.
    """

    path: Path
    pe: PhaseEncoding
    grid: Grid
    kind: str
    session: str | None = None
    shim: tuple[float, ...] | None = None
    bval: Path | None = None
    metadata: dict[str, object] = field(default_factory=dict)

    @property
    def per_hz(self) -> float:
        """Displacement in mm per Hz."""
        return self.pe.mm_per_hz(self.grid)


@dataclass(frozen=True)
class Choice:
    """Counterparts of a series: the chosen ones, how they differ from it, and why others were not chosen."""

    epis: tuple[EpiReference, ...] = ()
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    is_orthogonal: bool = False


def _angle(first: EpiImage, second: EpiImage) -> float:
    return displacement_angle((first.pe, first.grid), (second.pe, second.grid))


def choose_counterpart(
    series: EpiImage, others: Iterable[EpiImage], linked: Set[Path], ignore_shims: bool, guess: bool
) -> Choice:
    """Choose the images that determine the distortion of a series.

    Parameters
    ----------
    series : EpiImage
    others : iterable of EpiImage
        Of the session, without the runs that `series` stands for.
    linked : set of Path
        Images linked to the series by IntendedFor or B0FieldSource, or paired with it by qsiplan. If there are any, no
        other is considered.
    ignore_shims : bool
        Use images with another ShimSetting too; linked ones always are.
    guess : bool
        Whether images of dwi/ may be paired without a link.

    Returns
    -------
    Choice
        Opposite phase encodings before orthogonal ones, then series before single-band references, then the closest
        in readout time, tilt and name.
    """
    usable, unused = [], []
    for image in sorted(others, key=lambda image: image.path.name):
        angle = _angle(series, image)
        if angle < LEAST_ANGLE and not (image.path in linked and image.kind == "fmap"):
            continue  # of the same phase encoding
        reason = _obstacle(series, image, angle, linked, ignore_shims, guess)
        if reason:
            unused.append(f"{image.path.name}: {reason}")
        else:
            usable.append(image)
    if not usable:
        return Choice(unused=tuple(unused))
    usable.sort(key=lambda image: _preference(series, image))
    chosen = [image for image in usable if _is_same_encoding(usable[0], image)]
    left_out = ", ".join(image.path.name for image in usable if image not in chosen)
    notes = [_difference(series, chosen)] if _difference(series, chosen) else []
    if left_out:
        notes.append(
            f"{left_out}: not used for the distortion, because {chosen[0].path.name} determines it better and only two "
            "phase encodings are combined."
        )
    epis = tuple(EpiReference(image.path, image.pe, image.bval, image.metadata) for image in chosen)
    return Choice(epis, tuple(notes), is_orthogonal=_angle(series, chosen[0]) < OPPOSITE)


def _obstacle(
    series: EpiImage, image: EpiImage, angle: float, linked: Set[Path], ignore_shims: bool, guess: bool
) -> str:
    """Why an image cannot be used and what to do about it; empty if it can."""
    times = series.pe.readout_time, image.pe.readout_time
    if angle < LEAST_ANGLE:
        return (
            f"it is linked to {series.path.name}, but has the same phase encoding ({image.pe.direction}); check "
            "PhaseEncodingDirection of both"
        )
    if linked and image.path not in linked:
        return f"it is not linked to {series.path.name}, but other images are; link it by IntendedFor to use it"
    if not linked and image.kind == "fmap":
        return "it is not linked to a series; add IntendedFor or B0FieldIdentifier and B0FieldSource to use it"
    if not linked and not guess:
        return (
            "other series are linked to fieldmaps, so this one is not paired; add B0FieldIdentifier and B0FieldSource"
        )
    if (times[0] is None) != (times[1] is None):
        name = (series if times[0] is None else image).path.name
        return f"no TotalReadoutTime for {name}, but for its counterpart; add it to the sidecar"
    if times[0] and times[1] and max(times) > LARGEST_RATIO * min(times):  # type: ignore[type-var, operator]
        return (
            f"its TotalReadoutTime is {times[1]:g} s, that of {series.path.name} {times[0]:g} s; correct the wrong one"
        )
    if image.path not in linked and not ignore_shims and image.shim and series.shim and image.shim != series.shim:
        return f"its ShimSetting differs from that of {series.path.name}; use --ignore shims to pair them nevertheless"
    if (covered := _overlap(series.grid, image.grid)) < LEAST_OVERLAP:
        return f"it covers {covered:.0%} of the field of view of {series.path.name}; {LEAST_OVERLAP:.0%} is needed"
    return ""


def _overlap(grid: Grid, other: Grid) -> float:
    """Fraction of the field of view of `grid` that is within `other`."""
    ticks = [np.linspace(-0.5, n - 0.5, 23) for n in grid.shape]
    return float(other.contains(grid.to_world(np.stack(np.meshgrid(*ticks, indexing="ij"), -1))).mean())


def _preference(series: EpiImage, image: EpiImage) -> tuple[object, ...]:
    """Sort key, best first."""
    angle = _angle(series, image)
    ratio = abs(float(np.log(image.per_hz / series.per_hz)))
    return (angle < OPPOSITE, image.kind == "sbref", round(ratio / SAME_LENGTH), round(180 - angle), image.path.name)


def _is_same_encoding(first: EpiImage, second: EpiImage) -> bool:
    return (
        _angle(first, second) <= SAME_ANGLE
        and abs(np.log(second.per_hz / first.per_hz)) <= SAME_LENGTH
        and (first.kind == "sbref") == (second.kind == "sbref")
    )


def _difference(series: EpiImage, chosen: Sequence[EpiImage]) -> str:
    """How the chosen images differ from an equal pair; empty if they do not."""
    first, angle = chosen[0], _angle(series, chosen[0])
    times = series.pe.readout_time, first.pe.readout_time
    modelled, ignored = [], []
    if angle < OPPOSITE:
        modelled.append("another phase-encoding axis (the field is determined less well than by opposite ones)")
    elif angle < 179.9:
        modelled.append(f"a phase-encoding axis tilted by {180 - angle:.1f}°")
    if times[0] and times[1] and abs(times[0] - times[1]) > 1e-4:
        modelled.append(f"a readout time of {1000 * times[1]:.1f} ms instead of {1000 * times[0]:.1f} ms")
    if not series.grid.matches(first.grid, 0.05):
        modelled.append("another voxel grid or position")
    if first.shim and series.shim and first.shim != series.shim:
        ignored.append("another ShimSetting, so its field differs by what the shims changed")
    if first.kind == "sbref":
        ignored.append("the contrast of a single-band reference")
    if times[0] is None:
        ignored.append("like the series no known readout time: the same is assumed, and no field in Hz is written")
    names = ", ".join(image.path.name for image in chosen)
    parts = [f"It has {text}." for text in ignored]
    if modelled:
        parts.insert(0, f"The model takes into account that it has {', and '.join(modelled)}.")
    return " ".join([f"Distortion is estimated with {names}.", *parts]) if parts else ""


def contradicted_labels(images: Sequence[EpiImage]) -> tuple[str, ...]:
    """Sentences on files whose names say opposite phase encodings and whose sidecars say the same one."""
    found = []
    for number, first in enumerate(images):
        label = entities(first.path).get("dir", "").upper()
        for second in images[number + 1 :]:
            opposite = entities(second.path).get("dir", "").upper() == OPPOSITE_LABELS.get(label)
            same_session = first.session == second.session or None in (first.session, second.session)
            if opposite and same_session and _angle(first, second) < LEAST_ANGLE:
                found.append(
                    f"{first.path.name} and {second.path.name} are named as opposite phase encodings, but both "
                    f"sidecars say {second.pe.direction}, so neither corrects the other; correct "
                    "PhaseEncodingDirection."
                )
    return tuple(found)
