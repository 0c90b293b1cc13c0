"""What BIDS sidecars tell of the acquisition: phase encoding, readout time, slice times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.errors import MetadataError

DIRECTION = re.compile(r"[ijk]-?")
PLAUSIBLE_S = (0.0005, 0.5)
KEPT = (
    "PhaseEncodingDirection",
    "PhaseEncodingAxis",
    "TotalReadoutTime",
    "SliceTiming",
    "SliceEncodingDirection",
    "MultibandAccelerationFactor",
    "ParallelReductionFactorInPlane",
    "PartialFourier",
    "EchoTime",
    "RepetitionTime",
    "FlipAngle",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturersModelName",
)


def phase_encoding(
    metadata: Mapping[str, Any], name: str, way_out: str
) -> tuple[PhaseEncoding | None, tuple[str, ...]]:
    """Direction and readout time of one file, and notes on what was derived.

    Parameters
    ----------
    metadata : mapping
        The file's sidecar fields, inherited ones included.
    name : str
        File name, for notes and errors.
    way_out : str
        The option that goes on without this, for errors.

    Returns
    -------
    pe : PhaseEncoding or None
        None where the direction is not known with its sign.
    notes : tuple of str

    Raises
    ------
    MetadataError
        If a field is there, but impossible.
    """
    direction = metadata.get("PhaseEncodingDirection")
    if direction is None:
        axis = metadata.get("PhaseEncodingAxis")
        found = f"PhaseEncodingAxis {axis} without a sign" if axis else "no PhaseEncodingDirection"
        return None, (
            f"{name}: {found}, so no fieldmap can correct its distortion; add PhaseEncodingDirection "
            "to the sidecar (compare the stretched side of the brain with another scan of the protocol to find the "
            "sign)" + ("; --sdc-anat-reference auto does without the sign." if axis else "."),
        )
    if not isinstance(direction, str) or not DIRECTION.fullmatch(direction):
        raise MetadataError(
            f"{name}: PhaseEncodingDirection is {direction!r}, but one of i, i-, j, j-, k, k- is wanted; "
            f"correct the sidecar, or run with {way_out}"
        )
    readout, note = readout_time(metadata, name, way_out)
    return PhaseEncoding.from_bids(direction, readout), note


def readout_time(metadata: Mapping[str, Any], name: str, way_out: str) -> tuple[float | None, tuple[str, ...]]:
    """Total readout time in s, as it stands or derived, or None. Arguments as `phase_encoding`.

    Raises
    ------
    MetadataError
        If it is no number, or no time that an EPI readout can take.
    """
    for field, value, how in _readouts(metadata):
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = float("nan")
        if not PLAUSIBLE_S[0] <= seconds <= PLAUSIBLE_S[1]:
            raise MetadataError(
                f"{name}: {field} gives a total readout time of {value!r} s, but an EPI takes "
                f"{PLAUSIBLE_S[0]:g} to {PLAUSIBLE_S[1]:g} s (BIDS wants seconds); correct the sidecar, or "
                f"run with {way_out}"
            )
        note = f"{name}: total readout time {seconds:.5f} s {how}."
        return seconds, ((note,) if how else ())
    return None, ()


def _readouts(metadata: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """The ways to a total readout time, the best first: field, value, how it was derived."""
    found: list[tuple[str, Any, str]] = []
    for field, how in (
        ("TotalReadoutTime", ""),
        ("EstimatedTotalReadoutTime", "from EstimatedTotalReadoutTime"),
    ):
        if metadata.get(field) is not None:
            found.append((field, metadata[field], how))
    lines = metadata.get("ReconMatrixPE")
    for field in ("EffectiveEchoSpacing", "EstimatedEffectiveEchoSpacing"):
        spacing = metadata.get(field)
        if isinstance(spacing, int | float) and isinstance(lines, int | float):
            found.append((field, spacing * (lines - 1), f"from {field} x (ReconMatrixPE - 1)"))
    return found


def check_pair(sources: Mapping[str, PhaseEncoding], way_out: str) -> str | None:
    """Whether the readout times of files that show the field together agree.

    Parameters
    ----------
    sources : mapping of file name to PhaseEncoding
    way_out : str

    Returns
    -------
    str or None
        A note, where no file has a readout time.

    Raises
    ------
    MetadataError
        If some have one and others not, or they cannot belong to one field.
    """
    known = {name: pe.readout_time for name, pe in sources.items() if pe.readout_time is not None}
    missing = sorted(name for name in sources if name not in known)
    if not known:
        return (
            "No sidecar tells the readout time. Both phase encodings are taken to have the same, so "
            "distortion is corrected, but no fieldmap in Hz can be given."
        )
    if missing:
        one = next(iter(sorted(known)))
        raise MetadataError(
            f"{', '.join(missing)}: no TotalReadoutTime (nor EffectiveEchoSpacing and ReconMatrixPE), but "
            f"{one}, which it pairs with, has {known[one]:g} s; add it to the sidecar, or run with {way_out}"
        )
    low, high = min(known, key=lambda n: known[n] or 0), max(known, key=lambda n: known[n] or 0)
    if (known[high] or 0) > 3 * (known[low] or 0):
        raise MetadataError(
            f"{low}: TotalReadoutTime is {known[low]:g} s, but {known[high]:g} s in {high}, which it pairs "
            f"with; correct the sidecar that is wrong, or run with {way_out}"
        )
    return None


def kept_fields(metadata: Mapping[str, Any]) -> dict[str, object]:
    """The fields that matter to processing and methods text."""
    return {key: metadata[key] for key in KEPT if key in metadata}


def slice_times(metadata: Mapping[str, Any], n_slices: int) -> tuple[float, ...]:
    """When each slice along k was excited, in s; empty if unknown, along another axis or of another count."""
    times = metadata.get("SliceTiming")
    direction = str(metadata.get("SliceEncodingDirection", "k"))
    if not isinstance(times, list) or len(times) != n_slices or not direction.startswith("k"):
        return ()
    if not all(isinstance(t, int | float) for t in times):
        return ()
    ordered = times[::-1] if direction.endswith("-") else times
    return tuple(float(t) for t in ordered)
