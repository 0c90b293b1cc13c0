"""Choose the structural images of a subject: localisers and second versions of a scan are left out, the best leads.

All images that are chosen are averaged, so an image helps only if it covers the head at about the resolution of the
others and is a scan of its own. Headers and sidecars decide; no voxels are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsiprep.errors import InputError
from dsiprep.io.bids_filters import entities
from dsiprep.io.nifti_header import read_grid

MIN_COVERAGE = 0.6  # of the field of view of the best image along any axis; localisers and slabs have less
MAX_COARSER = 2.0  # times the longest voxel edge of the finest image
BETTER = 0.8  # voxel volume relative to that of the first image by which another one leads
SAME_SCAN = ("SeriesInstanceUID", "AcquisitionDateTime")  # fields that are equal in versions of one scan only
NORMALISED = ("norm", "prenorm", "biascorr", "corrected")  # `rec-` of scanner-corrected intensities
DEFACED = ("deface", "skullstrip", "brain", "crop")


@dataclass(frozen=True)
class StructuralChoice:
    """Images to average, the leading one first; why others are left out, by path; notes on the choice."""

    images: tuple[Path, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    path: str
    entities: dict[str, str]
    metadata: Mapping[str, Any]
    extent: np.ndarray | None  # mm along R, A, S; None if the header cannot be read
    sizes: np.ndarray | None  # voxel sizes, mm

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def volume(self) -> float:
        return float(np.prod(self.sizes)) if self.sizes is not None else np.inf

    @property
    def normalised(self) -> bool:
        image_type = self.metadata.get("ImageType")
        tokens = [str(token).lower() for token in image_type] if isinstance(image_type, list) else []
        return self.entities.get("rec", "").lower() in NORMALISED or "norm" in tokens

    @property
    def cut(self) -> bool:
        labels = " ".join(self.entities.values()).lower()
        return any(word in labels for word in DEFACED)


def choose_structural_images(images: Sequence[tuple[str, Mapping[str, Any]]]) -> StructuralChoice:
    """Choose among the images of one contrast of a subject.

    Parameters
    ----------
    images : sequence of (str, mapping)
        Path and sidecar fields of each image.

    Returns
    -------
    StructuralChoice
        Images of the same quality stay in the order of their names. An image that cannot be read is kept, so that its
        error is raised on reading.
    """
    candidates = [_candidate(path, metadata) for path, metadata in sorted(images, key=lambda image: image[0])]
    if len(candidates) < 2:
        return StructuralChoice(tuple(Path(one.path) for one in candidates), {})
    left_out: dict[str, str] = {}
    for exclude in (_same_scan, _too_small, _too_coarse, _with_contrast_agent):
        kept = [one for one in candidates if one.path not in left_out]
        left_out |= exclude(kept)
    kept = [one for one in candidates if one.path not in left_out]
    finest = min(kept, key=lambda one: one.volume)
    lead = finest if finest.volume < BETTER * kept[0].volume else kept[0]
    ordered = [lead, *(one for one in kept if one is not lead)]
    notes = [f"{Path(path).name}: not used as structural image: {reason}." for path, reason in left_out.items()]
    if left_out or lead is not candidates[0]:
        notes.insert(0, f"{lead.name} is the structural image" + (" that leads." if len(ordered) > 1 else "."))
    return StructuralChoice(tuple(Path(one.path) for one in ordered), left_out, tuple(notes))


def _candidate(path: str, metadata: Mapping[str, Any]) -> _Candidate:
    try:
        grid = read_grid(Path(path))
    except InputError:
        return _Candidate(path, entities(path), metadata, None, None)
    extent = np.abs(grid.affine[:3, :3]) @ np.asarray(grid.shape, float)
    return _Candidate(path, entities(path), metadata, extent, grid.voxel_sizes)


def _same_scan(candidates: list[_Candidate]) -> dict[str, str]:
    """Second versions of one scan: reconstructed without normalisation, defaced or cropped."""
    left_out: dict[str, str] = {}
    by_scan: dict[tuple[object, ...], list[_Candidate]] = {}
    for one in candidates:
        names = {key: value for key, value in one.entities.items() if key not in ("rec", "desc")}
        by_scan.setdefault(tuple(sorted(names.items())), []).append(one)
        for field in SAME_SCAN:
            if isinstance(value := one.metadata.get(field), str):
                by_scan.setdefault((field, one.entities.get("ses"), value), []).append(one)
    for versions in by_scan.values():
        best = min(versions, key=lambda one: (one.sizes is None, one.cut, not one.normalised, one.path))
        for one in versions:
            if one is not best and best.path not in left_out and one.sizes is not None:
                left_out[one.path] = f"another version of the scan {best.name}, which is {_preference(best, one)}"
    return left_out


def _preference(best: _Candidate, other: _Candidate) -> str:
    if other.cut and not best.cut:
        return "not cut or defaced"
    return "normalised by the scanner" if best.normalised and not other.normalised else "first by name"


def _too_small(candidates: list[_Candidate]) -> dict[str, str]:
    """Slabs and localisers, whose field of view is much smaller than that of the largest image."""
    known = {one.path: one.extent for one in candidates if one.extent is not None}
    largest = max(known.values(), key=lambda extent: float(np.prod(extent)), default=None)
    if largest is None:
        return {}
    return {
        path: f"it covers only {extent.min():.0f} mm along one axis, a slab or localiser"
        for path, extent in known.items()
        if (extent < MIN_COVERAGE * np.minimum(largest, 200)).any()
    }


def _too_coarse(candidates: list[_Candidate]) -> dict[str, str]:
    edges = {one.path: float(one.sizes.max()) for one in candidates if one.sizes is not None}
    finest = min(edges.values(), default=0.0)
    return {
        path: f"its voxels are up to {edge:.3g} mm long; those of another image {finest:.3g} mm"
        for path, edge in edges.items()
        if edge > MAX_COARSER * finest
    }


def _with_contrast_agent(candidates: list[_Candidate]) -> dict[str, str]:
    if all("ce" in one.entities for one in candidates):
        return {}
    return {
        one.path: "it was taken with a contrast agent, others without" for one in candidates if "ce" in one.entities
    }
