"""Acquisition parameters from BIDS sidecars: phase encoding, readout time and slice times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsiprep.data.acquisition import AXES, PhaseEncoding
from dsiprep.errors import MetadataError
from dsiprep.io.sidecar_values import shown

DIRECTION = re.compile(r"[ijk]-?")
PLAUSIBLE_READOUT = (0.0005, 0.5)  # s
RELEVANT_FIELDS = (
    "PhaseEncodingDirection",
    "PhaseEncodingAxis",
    "TotalReadoutTime",
    "SliceTiming",
    "SliceEncodingDirection",
    "MultibandAccelerationFactor",
    "ParallelReductionFactorInPlane",
    "PartialFourier",
    "PartialFourierDirection",
    "PartialFourierEnabled",
    "EchoTime",
    "RepetitionTime",
    "FlipAngle",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturersModelName",
)


def phase_encoding(
    metadata: Mapping[str, Any], name: str, fallback: str
) -> tuple[PhaseEncoding | None, tuple[str, ...]]:
    """Phase encoding of one file, and notes on missing or derived metadata.

    Parameters
    ----------
    metadata : mapping
        Sidecar fields of the file, including inherited ones.
    name : str
        File name, for notes and errors.
    fallback : str
        Option that makes this metadata unnecessary, for error messages.

    Returns
    -------
    pe : PhaseEncoding or None
        None if the direction is unknown or has no sign.
    notes : tuple of str

    Raises
    ------
    MetadataError
        If a field is present but invalid.
    """
    direction = metadata.get("PhaseEncodingDirection")
    if direction is None:
        axis = metadata.get("PhaseEncodingAxis")
        found = f"PhaseEncodingAxis {axis} without a sign" if axis else "no PhaseEncodingDirection"
        return None, (
            f"{name}: {found}, so no fieldmap can correct its distortion; add PhaseEncodingDirection to the sidecar "
            "(to find the sign, compare which side of the brain is stretched with another scan of the same protocol)"
            + ("; --sdc-anat-reference auto needs only the axis." if axis else "."),
        )
    if not isinstance(direction, str) or not DIRECTION.fullmatch(direction):
        raise MetadataError(
            f"{name}: PhaseEncodingDirection is {shown(direction)}; expected one of i, i-, j, j-, k, k-; "
            f"correct the sidecar, or run with {fallback}"
        )
    readout, note = readout_time(metadata, name, fallback)
    return PhaseEncoding.from_bids(direction, readout), note


def readout_time(metadata: Mapping[str, Any], name: str, fallback: str) -> tuple[float | None, tuple[str, ...]]:
    """Total readout time in s, stored or derived, or None, and notes. Parameters are as for `phase_encoding`.

    Raises
    ------
    MetadataError
        If it is not a number or not plausible for an EPI readout.
    """
    for field, value, derivation in _readout_candidates(metadata):
        try:
            seconds = float(value)
        except (TypeError, ValueError, OverflowError):
            seconds = float("nan")
        if not PLAUSIBLE_READOUT[0] <= seconds <= PLAUSIBLE_READOUT[1]:
            raise MetadataError(
                f"{name}: {field} gives a total readout time of {shown(value)} s; expected {PLAUSIBLE_READOUT[0]:g} to "
                f"{PLAUSIBLE_READOUT[1]:g} s for EPI (the BIDS unit is seconds); correct the sidecar, or run with "
                f"{fallback}"
            )
        note = f"{name}: total readout time {seconds:.5f} s {derivation}."
        return seconds, ((note,) if derivation else ())
    return None, ()


def _readout_candidates(metadata: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Total readout times in order of preference: field, value and derivation."""
    candidates: list[tuple[str, Any, str]] = []
    for field, derivation in (
        ("TotalReadoutTime", ""),
        ("EstimatedTotalReadoutTime", "from EstimatedTotalReadoutTime"),
    ):
        if metadata.get(field) is not None:
            candidates.append((field, metadata[field], derivation))
    lines = metadata.get("ReconMatrixPE")
    for field in ("EffectiveEchoSpacing", "EstimatedEffectiveEchoSpacing"):
        spacing = metadata.get(field)
        if isinstance(spacing, int | float) and isinstance(lines, int | float):
            candidates.append((field, spacing * (lines - 1), f"from {field} x (ReconMatrixPE - 1)"))
    return candidates


def check_readout_times(sources: Mapping[str, PhaseEncoding], fallback: str) -> str | None:
    """Check that the readout times of images with opposite phase encoding are consistent.

    Parameters
    ----------
    sources : mapping of file name to PhaseEncoding
    fallback : str
        Option that makes the readout times unnecessary, for error messages.

    Returns
    -------
    str or None
        A note if no file has a readout time.

    Raises
    ------
    MetadataError
        If only some files have one, or they differ by more than a factor of three.
    """
    known = {name: pe.readout_time for name, pe in sources.items() if pe.readout_time is not None}
    missing = sorted(name for name in sources if name not in known)
    if not known:
        return (
            "No sidecar gives the readout time. Both phase encodings are assumed to have the same, so distortion is "
            "corrected, but no fieldmap in Hz is written."
        )
    if missing:
        partner = next(iter(sorted(known)))
        raise MetadataError(
            f"{', '.join(missing)}: no TotalReadoutTime (nor EffectiveEchoSpacing and ReconMatrixPE), but "
            f"its counterpart {partner} has {known[partner]:g} s; add it to the sidecar, or run with {fallback}"
        )
    low, high = min(known, key=lambda n: known[n] or 0), max(known, key=lambda n: known[n] or 0)
    if (known[high] or 0) > 3 * (known[low] or 0):
        raise MetadataError(
            f"{low}: TotalReadoutTime is {known[low]:g} s, but {known[high]:g} s in its counterpart {high}; "
            f"correct the wrong sidecar, or run with {fallback}"
        )
    return None


def relevant_fields(metadata: Mapping[str, Any]) -> dict[str, object]:
    """The fields that are used for processing and for the methods text."""
    return {key: metadata[key] for key in RELEVANT_FIELDS if key in metadata}


def slice_axis(metadata: Mapping[str, Any], shape: tuple[int, int, int]) -> int | None:
    """Voxel axis across slices; None if the sidecar does not give it.

    Without SliceEncodingDirection it is k if there is one slice time for each slice along k, as BIDS defines.
    """
    direction = metadata.get("SliceEncodingDirection")
    if isinstance(direction, str) and DIRECTION.fullmatch(direction):
        return AXES.index(direction[0])
    times = metadata.get("SliceTiming")
    return 2 if direction is None and isinstance(times, list) and len(times) == shape[2] else None


def slice_times(metadata: Mapping[str, Any], shape: tuple[int, int, int]) -> tuple[float, ...]:
    """Excitation time of each slice along `slice_axis` in s, by voxel index; empty if unknown or the count differs.

    With SliceEncodingDirection "k-" the first time is that of the last slice, as BIDS defines.
    """
    times, axis = metadata.get("SliceTiming"), slice_axis(metadata, shape)
    if axis is None or not isinstance(times, list) or len(times) != shape[axis]:
        return ()
    if not all(isinstance(t, int | float) for t in times):
        return ()
    ordered = times[::-1] if str(metadata.get("SliceEncodingDirection")).endswith("-") else times
    return tuple(float(t) for t in ordered)
