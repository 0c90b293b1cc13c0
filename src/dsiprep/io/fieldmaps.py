"""Gradient-echo fieldmaps: find and check their files, and read them in Hz or radians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from dsiprep.io.phase_values import to_radians
from dsiprep.io.sidecar_values import shown

__all__ = ["gre_fieldmap", "read_fieldmap", "with_linked_fieldmap"]

PLAUSIBLE_ECHO_DIFFERENCE = (1e-4, 0.03)  # s
HZ_PER_UNIT = {"Hz": 1.0, "rad/s": 1 / (2 * np.pi), "T": 42.577478518e6}  # the proton's gyromagnetic ratio, CODATA 2018
OR_IGNORE = "or run with --ignore fieldmaps"


def with_linked_fieldmap(planned: PreprocUnit) -> PreprocUnit:
    """The unit with a gradient-echo fieldmap that is linked to it, if qsiplan preferred a pair that it cannot use."""
    grouping = planned.grouping
    if planned.estimation is not None:
        return planned
    linked = {name for path in planned.dwi_files for name in grouping.application_candidates.get(path, ())}
    usable = sorted(name for name in linked if name in grouping.estimations and grouping.estimations[name].is_gre)
    return replace(planned, estimation=grouping.estimations[usable[0]]) if usable else planned


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
            raise MetadataError(f"{first}: Units is {shown(units)}; use one of {', '.join(HZ_PER_UNIT)}: {_remedy()}")
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
    except (KeyError, TypeError, ValueError, OverflowError):
        found = f"{field} is {shown(metadata[field])}" if field in metadata else f"no {field}"
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
        If a file cannot be read, an image is empty or constant, the grids differ, or phase is in no known range.
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
    radians, note = to_radians([volume.data for volume in volumes], gre.images, OR_IGNORE)
    phase = radians[0] if len(radians) == 1 else radians[1] - radians[0]
    wrapped = Volume(torch.atan2(phase.sin(), phase.cos()), grid)
    return RawFieldmap(name, wrapped, magnitude, gre.echo_difference, (note,) if note else ())
