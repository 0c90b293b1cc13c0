"""Keep series of different protocols apart: they are never concatenated, whatever their names and phase encoding.

Concatenated series share one scale, so their contrast at b=0 has to agree up to a factor. The signal of a spin echo is
(1 - exp(-TR / T1)) exp(-TE / T2): the contrast of grey and white matter agrees within 3 % for echo times within
`SAME_ECHO_S`, and for repetition times within `MAX_CONTRAST`. Series reconstructed in different ways differ from voxel
to voxel.

References
----------
T1 and T2 at 3 T: Wansapura et al. 1999, J Magn Reson Imaging 9:531-538.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsiplan import FileRecord
from qsiplan.models import derive_output_name

from dsiprep.io.bids_filters import entities
from dsiprep.io.nifti_header import count_volumes

T1_GREY, T1_WHITE = 1.33, 0.83  # s
MAX_CONTRAST = 0.03
SAME_ECHO_S = 0.003  # with T2 of 0.11 and 0.08 s, 3 ms change the contrast by 1 %
LISTED = 1e-4  # s; smaller differences of joined series are rounding
MIN_SERIES = 16  # volumes; shorter ones with reversed phase encoding serve the others as b=0 references
# words of ImageType by which reconstructions differ: geometry, intensity profile, noise
RECONSTRUCTION = {"DIS2D": "geometry", "DIS3D": "geometry", "NORM": "intensity profile", "DENOISED": "noise"}


def separate_protocols(records: list[FileRecord]) -> tuple[list[FileRecord], dict[str, str]]:
    """Mark series of different protocols so that they are not concatenated.

    Parameters
    ----------
    records : list of FileRecord
        Of one subject.

    Returns
    -------
    records : list of FileRecord
        If a session has several protocols, all series have a MultipartID, the BIDS field for what belongs together.
        Records are unchanged otherwise, and if a sidecar has this field.
    notes : dict
        By path of a series.
    """
    series = [record for record in records if record.is_dwi]
    if any(record.multipart_id for record in series):
        return records, {}
    labels: dict[str, str] = {}
    notes: dict[str, str] = {}
    several = False
    for session in dict.fromkeys(record.session for record in series):
        groups = _groups([record for record in series if record.session == session])
        several |= len(groups) > 1
        names = _labels(groups)
        for group, name in zip(groups, names, strict=True):
            note = _separation_note(group, groups) if len(groups) > 1 else _difference_note(group)
            for record in group:
                labels[record.path] = name
                notes |= {record.path: note} if note else {}
    if not several:
        return records, notes
    return [
        replace(record, multipart_id=(labels[record.path],)) if record.is_dwi else record for record in records
    ], notes


def _groups(series: list[FileRecord]) -> list[list[FileRecord]]:
    """Series by protocol, the longest series first; what a sidecar does not say is taken as equal."""
    lengths = {record.path: count_volumes(Path(record.path), MIN_SERIES) for record in series}
    groups: list[list[FileRecord]] = []
    for record in sorted(series, key=lambda record: (lengths[record.path] < MIN_SERIES, record.path)):
        fitting = [group for group in groups if not any(_differences(record, other) for other in group)]
        if not fitting and lengths[record.path] < MIN_SERIES:
            fitting = [group for group in groups if any(_is_reversed(record, other) for other in group)]
        if fitting:
            fitting[0].append(record)
        else:
            groups.append([record])
    return groups


def _labels(groups: list[list[FileRecord]]) -> list[str]:
    """A MultipartID for each group; it names the output, as `acq-`, where names would be equal otherwise."""
    names = [derive_output_name([record.path for record in group]) for group in groups]
    if len(set(names)) == len(names):
        return [f"protocol {index + 1}" for index in range(len(groups))]
    labels = []
    for index, group in enumerate(groups):
        echoes = {entities(record.path).get("echo", "") for record in group}
        echo = echoes.pop() if len(echoes) == 1 else ""
        acquisition = entities(group[0].path).get("acq", "")
        labels.append(f"acq-{acquisition}{f'echo{echo}' if echo else f'protocol{index + 1}'}")
    return labels


def _is_reversed(one: FileRecord, other: FileRecord) -> bool:
    a, b = one.signature, other.signature
    return a.pe_axis is not None and a.pe_axis == b.pe_axis and a.pe_polarity != b.pe_polarity


def _differences(one: FileRecord, other: FileRecord) -> dict[str, tuple[str, str]]:
    """Fields by which two series are of different protocols, and their values."""
    found: dict[str, tuple[str, str]] = {}
    echoes, times = _times(one, other, "EchoTime"), _times(one, other, "RepetitionTime")
    if echoes and abs(echoes[0] - echoes[1]) > SAME_ECHO_S:
        found["EchoTime"] = (f"{echoes[0]:g} s", f"{echoes[1]:g} s")
    if times and abs(_contrast(times[0]) / _contrast(times[1]) - 1) > MAX_CONTRAST:
        found["RepetitionTime"] = (f"{times[0]:g} s", f"{times[1]:g} s")
    numbers = [entities(record.path).get("echo", "1") for record in (one, other)]
    if not echoes and numbers[0] != numbers[1]:
        found["echo number"] = (numbers[0], numbers[1])
    words = [record.metadata.get("ImageType") for record in (one, other)]
    if all(isinstance(word, list) for word in words):
        by_series = [{str(w).upper() for w in word} & set(RECONSTRUCTION) for word in words if word is not None]
        if by_series[0] != by_series[1]:
            first, second = (" ".join(sorted(word)) or "neither" for word in by_series)
            found["reconstruction (ImageType)"] = (first, second)
    return found


def _times(one: FileRecord, other: FileRecord, field: str) -> tuple[float, float] | None:
    """A positive time in s of both series, or None if a sidecar does not give it."""
    values: list[Any] = [record.metadata.get(field) for record in (one, other)]
    if all(isinstance(value, float) and value > 0 for value in values):
        return values[0], values[1]
    return None


def _contrast(repetition_time: float) -> float:
    """Saturation of grey matter relative to white matter."""
    return math.expm1(-repetition_time / T1_GREY) / math.expm1(-repetition_time / T1_WHITE)


def _separation_note(group: list[FileRecord], groups: list[list[FileRecord]]) -> str:
    """Why a group of series is processed separately from the others of its session."""
    parts = []
    for other in groups:
        if other is not group and (found := _differences(group[0], other[0])):
            values = ", ".join(f"{field} ({a} and {b})" for field, (a, b) in found.items())
            parts.append(f"from {other[0].filename} in {values}")
    differs = f"{group[0].filename} differs {' and '.join(parts)}" if parts else "The series of this session differ"
    return f"{differs}: another protocol, processed separately."


def _difference_note(group: list[FileRecord]) -> str:
    """Note on times that differ a little between the series of one group; empty without any."""
    parts = []
    for field in ("EchoTime", "RepetitionTime"):
        values = sorted({v for record in group if isinstance(v := record.metadata.get(field), float)})
        if values and values[-1] - values[0] > LISTED:
            parts.append(f"{field} from {values[0]:g} to {values[-1]:g} s")
    return f"The runs differ in {' and '.join(parts)}; they are scaled to the same b=0 and joined." if parts else ""
