"""Gradient-echo fieldmaps: find and check their files, and read them in Hz or radians."""

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

PLAUSIBLE_ECHO_DIFFERENCE = (1e-4, 0.03)  # s
HZ_PER_UNIT = {"Hz": 1.0, "rad/s": 1 / (2 * np.pi), "T": 42.577478518e6}  # the proton's gyromagnetic ratio, CODATA 2018
OR_IGNORE = "or run with --ignore fieldmaps"


def gre_fieldmap(planned: PreprocUnit) -> GreFieldmap | None:
    """The gradient-echo fieldmap that qsiplan chose for a unit, or None if it chose none.

    Raises
    ------
    MetadataError
        If its magnitude image, echo times or units are missing or invalid.
    """
    if not planned.is_gre:
        return None
    files = {suffix: Path(path) for suffix, path in planned.gre_files().items()}
    sidecars = {suffix: planned.metadata_for(str(path)) for suffix, path in files.items()}
    kind = planned.gre_suffix
    first = files[kind]
    magnitude = next((files[name] for name in ("magnitude1", "magnitude", "magnitude2") if name in files), None)
    if magnitude is None:
        raise MetadataError(f"{first}: no magnitude image; add {_expected_magnitude(kind)} next to it, {OR_IGNORE}")
    if kind == "fieldmap":
        units = str(sidecars[kind].get("Units", "Hz"))
        if units not in HZ_PER_UNIT:
            raise MetadataError(f"{first}: Units is {units!r}; use one of {', '.join(HZ_PER_UNIT)}: {_remedy()}")
        return GreFieldmap("fieldmap", (first,), magnitude, None, units)
    if kind == "phasediff":
        times = [_echo_time(sidecars[kind], field, first) for field in ("EchoTime1", "EchoTime2")]
        return GreFieldmap("phasediff", (first,), magnitude, _echo_difference(times, first))
    if "phase2" not in files:
        raise MetadataError(f"{first}: no matching phase2 image; add it, {OR_IGNORE}")
    pair = (first, files["phase2"])
    times = [
        _echo_time(sidecars[name], "EchoTime", path) for name, path in zip(("phase1", "phase2"), pair, strict=True)
    ]
    return GreFieldmap("phases", pair, magnitude, _echo_difference(times, pair[1]))


def _expected_magnitude(kind: str) -> str:
    return "*_magnitude.nii.gz" if kind == "fieldmap" else "*_magnitude1.nii.gz"


def _remedy() -> str:
    return f"correct the sidecar, {OR_IGNORE}"


def _echo_time(metadata: Mapping[str, Any], field: str, path: Path) -> float:
    try:
        return float(metadata[field])
    except (KeyError, TypeError, ValueError):
        found = f"{field} is {metadata[field]!r}" if field in metadata else f"no {field}"
        raise MetadataError(f"{path}: {found} in its sidecar; expected the echo time in s; {_remedy()}") from None


def _echo_difference(times: list[float], path: Path) -> float:
    seconds = times[1] - times[0]
    shortest, longest = PLAUSIBLE_ECHO_DIFFERENCE
    if not shortest <= abs(seconds) <= longest:
        raise MetadataError(
            f"{path}: the echoes are {seconds:g} s apart; a plausible difference is {shortest:g} to {longest:g} s; "
            f"check that the echo times are in s: {_remedy()}"
        )
    return seconds


def read_fieldmap(gre: GreFieldmap) -> RawFieldmap:
    """Read a gradient-echo fieldmap: the field in Hz, or the phase (difference) in radians within [-pi, pi].

    Parameters
    ----------
    gre : GreFieldmap

    Returns
    -------
    RawFieldmap

    Raises
    ------
    InputError
        If a file cannot be read, an image is empty or constant, or the grids differ.
    """
    volumes = [read_volume(path) for path in gre.images]
    magnitude = read_volume(gre.magnitude)
    for path, volume in zip((*gre.images[1:], gre.magnitude), (*volumes[1:], magnitude), strict=True):
        if not volume.grid.matches(volumes[0].grid, 0.01):
            raise InputError(
                f"{path}: its grid differs from that of {gre.images[0].name}; convert both again, {OR_IGNORE}"
            )
    if not float(magnitude.data.max()) > 0:
        raise InputError(f"{gre.magnitude}: the image is empty; convert it again, {OR_IGNORE}")
    grid, name = volumes[0].grid, gre.images[0].name
    if gre.kind == "fieldmap":
        return RawFieldmap(name, Volume(volumes[0].data * HZ_PER_UNIT[gre.units], grid), magnitude, None)
    radians = [_radians(volume.data, path) for volume, path in zip(volumes, gre.images, strict=True)]
    phase = radians[0] if len(radians) == 1 else radians[1] - radians[0]
    return RawFieldmap(name, Volume(torch.atan2(phase.sin(), phase.cos()), grid), magnitude, gre.echo_difference)


def _radians(phase: torch.Tensor, path: Path) -> torch.Tensor:
    """Phase in radians.

    Scanner units (integers, or values that span more than one cycle) are scaled so that their range is one cycle.
    """
    low, high = float(phase.min()), float(phase.max())
    if high == low:
        raise InputError(f"{path}: the phase is constant; convert it again, {OR_IGNORE}")
    only_integers = float(phase.frac().abs().max()) == 0
    if not only_integers and high - low <= 2 * np.pi + 0.01:
        return phase
    return (phase - low) * (2 * np.pi / (high - low)) - np.pi
