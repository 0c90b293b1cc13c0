"""Gradient-echo fieldmaps: which files make one, what their sidecars must tell, and their voxels in Hz or radians."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qsiplan import PreprocUnit

from dsiprep.data.acquisition import GreFieldmap
from dsiprep.data.grid import Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.nifti import read_volume

__all__ = ["gre_fieldmap", "read_fieldmap"]

PLAUSIBLE_S = (1e-4, 0.03)  # between the echoes
HZ_OF = {"Hz": 1.0, "rad/s": 1 / (2 * np.pi), "T": 42.577478518e6}  # the proton's gyromagnetic ratio, CODATA 2018
WAY_OUT = "or run with --ignore fieldmaps"


def gre_fieldmap(planned: PreprocUnit) -> GreFieldmap | None:
    """The fieldmap that qsiplan chose for a unit, or None if it chose another way.

    Raises
    ------
    MetadataError
        If its magnitude image, its echo times or its units are missing or impossible.
    """
    if not planned.is_gre:
        return None
    files = {suffix: Path(path) for suffix, path in planned.gre_files().items()}
    told = {suffix: planned.metadata_for(str(path)) for suffix, path in files.items()}
    kind = planned.gre_suffix
    first = files[kind]
    magnitude = next((files[name] for name in ("magnitude1", "magnitude", "magnitude2") if name in files), None)
    if magnitude is None:
        raise MetadataError(f"{first}: no magnitude image goes with it; add {_expected(kind)} beside it, {WAY_OUT}")
    if kind == "fieldmap":
        units = str(told[kind].get("Units", "Hz"))
        if units not in HZ_OF:
            raise MetadataError(f"{first}: Units is {units!r}, but one of {', '.join(HZ_OF)} is wanted; {_correct()}")
        return GreFieldmap("fieldmap", (first,), magnitude, None, units)
    if kind == "phasediff":
        times = [_seconds(told[kind], field, first) for field in ("EchoTime1", "EchoTime2")]
        return GreFieldmap("phasediff", (first,), magnitude, _difference(times, first))
    if "phase2" not in files:
        raise MetadataError(f"{first}: there is no phase2 image to go with it; add it, {WAY_OUT}")
    pair = (first, files["phase2"])
    times = [_seconds(told[name], "EchoTime", path) for name, path in zip(("phase1", "phase2"), pair, strict=True)]
    return GreFieldmap("phases", pair, magnitude, _difference(times, pair[1]))


def _expected(kind: str) -> str:
    return "*_magnitude.nii.gz" if kind == "fieldmap" else "*_magnitude1.nii.gz"


def _correct() -> str:
    return f"correct the sidecar, {WAY_OUT}"


def _seconds(metadata: Mapping[str, Any], field: str, path: Path) -> float:
    try:
        return float(metadata[field])
    except (KeyError, TypeError, ValueError):
        found = f"{field} is {metadata[field]!r}" if field in metadata else f"no {field}"
        raise MetadataError(f"{path}: {found} in its sidecar; the echo time in s is wanted: {_correct()}") from None


def _difference(times: list[float], path: Path) -> float:
    seconds = times[1] - times[0]
    if not PLAUSIBLE_S[0] <= abs(seconds) <= PLAUSIBLE_S[1]:
        raise MetadataError(
            f"{path}: the echoes are {seconds:g} s apart, but {PLAUSIBLE_S[0]:g} to {PLAUSIBLE_S[1]:g} s is possible; "
            f"are the echo times in s? {_correct().capitalize()}"
        )
    return seconds


def read_fieldmap(gre: GreFieldmap) -> RawFieldmap:
    """Read a fieldmap.

    Parameters
    ----------
    gre : GreFieldmap

    Returns
    -------
    RawFieldmap

    Raises
    ------
    InputError
        If a file cannot be read, is empty, or the images are not on one grid.
    """
    volumes = [read_volume(path) for path in gre.images]
    magnitude = read_volume(gre.magnitude)
    for path, volume in zip((*gre.images[1:], gre.magnitude), (*volumes[1:], magnitude), strict=True):
        if not volume.grid.matches(volumes[0].grid, 0.01):
            raise InputError(f"{path}: not on the grid of {gre.images[0].name}; convert both again, {WAY_OUT}")
    if not float(magnitude.data.max()) > 0:
        raise InputError(f"{gre.magnitude}: the image is empty; convert it again, {WAY_OUT}")
    grid, name = volumes[0].grid, gre.images[0].name
    if gre.kind == "fieldmap":
        return RawFieldmap(name, Volume(volumes[0].data * HZ_OF[gre.units], grid), magnitude, None)
    radians = [_radians(volume.data, path) for volume, path in zip(volumes, gre.images, strict=True)]
    phase = radians[0] if len(radians) == 1 else radians[1] - radians[0]
    return RawFieldmap(name, Volume(torch.atan2(phase.sin(), phase.cos()), grid), magnitude, gre.echo_difference)


def _radians(phase: torch.Tensor, path: Path) -> torch.Tensor:
    """Scanners write phase in radians or in steps of their own; the range of steps is one turn."""
    low, high = float(phase.min()), float(phase.max())
    if high == low:
        raise InputError(f"{path}: the phase is the same everywhere; convert it again, {WAY_OUT}")
    whole = float(phase.frac().abs().max()) == 0
    return phase if not whole and high - low <= 2 * np.pi + 0.01 else (phase - low) * (2 * np.pi / (high - low)) - np.pi
