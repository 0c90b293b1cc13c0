"""Read the values of sidecar fields as they are meant: converters and editors write numbers as text or in lists.

"n/a", null and empty values count as absent, as in BIDS tables; a number as text is a number; a list of equal values
where one is meant is that value. What cannot be read is refused where the field links files, left to the check where it
is used, or ignored with a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsiprep.errors import MetadataError, printable

NUMBERS = (
    "TotalReadoutTime",
    "EstimatedTotalReadoutTime",
    "EffectiveEchoSpacing",
    "EstimatedEffectiveEchoSpacing",
    "ReconMatrixPE",
    "EchoTime",
    "EchoTime1",
    "EchoTime2",
    "RepetitionTime",
    "FlipAngle",
    "MagneticFieldStrength",
    "MultibandAccelerationFactor",
    "ParallelReductionFactorInPlane",
    "PartialFourier",
)
TEXTS = (
    "PhaseEncodingDirection",
    "PhaseEncodingAxis",
    "SliceEncodingDirection",
    "PartialFourierDirection",
    "PartialFourierEnabled",
    "Units",
    "Manufacturer",
    "ManufacturersModelName",
)
NAMES = ("B0FieldIdentifier", "B0FieldSource", "MultipartID", "IntendedFor")  # one or several
NUMBER_LISTS = ("ShimSetting", "SliceTiming")
CHECKED_WHERE_USED = (
    "TotalReadoutTime",
    "EstimatedTotalReadoutTime",
    "EchoTime",
    "EchoTime1",
    "EchoTime2",
    "PhaseEncodingDirection",
    "Units",
)
ABSENT = ("", "n/a", "na", "nan", "none", "null")


def clean_metadata(metadata: Mapping[str, Any], name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Sidecar fields with the values that are meant.

    Parameters
    ----------
    metadata : mapping
        Fields as read from JSON. Those that are not used by dsiprep are passed on unchanged.
    name : str
        File name, for notes and errors.

    Returns
    -------
    fields : dict
        Numbers as float, texts as str, `NAMES` as list of str, `NUMBER_LISTS` as list of float; of the fields that
        are `CHECKED_WHERE_USED`, what cannot be read is unchanged.
    notes : tuple of str
        On fields that are ignored.

    Raises
    ------
    MetadataError
        If a link between files (`NAMES`) cannot be read.
    """
    fields, notes = dict(metadata), []
    readers = {
        **dict.fromkeys(NUMBERS, ("a number", _number)),
        **dict.fromkeys(TEXTS, ("text", _text)),
        **dict.fromkeys(NAMES, ("a name or a list of names", _names)),
        **dict.fromkeys(NUMBER_LISTS, ("a list of numbers", _numbers)),
    }
    for field, (wanted, read) in readers.items():
        if field not in metadata:
            continue
        try:
            value = read(_without_absent(metadata[field]))
        except (ValueError, TypeError, OverflowError):
            if field in CHECKED_WHERE_USED:
                continue
            problem = f"{name}: {field} is {shown(metadata[field])}; expected {wanted}"
            if field in NAMES:
                raise MetadataError(f"{problem}; correct the sidecar, or remove the field") from None
            notes.append(f"{problem}; it is ignored.")
            value = None
        if value is None:
            del fields[field]
        else:
            fields[field] = value
    return fields, tuple(notes)


def _without_absent(value: Any) -> Any:
    """None for a value that means nothing; lists without such values."""
    if isinstance(value, str) and value.strip().lower() in ABSENT:
        return None
    if isinstance(value, list):
        kept = [item for item in value if item is not None and _without_absent(item) is not None]
        return kept if kept else None
    return value


def _one(value: Any) -> Any:
    """The value of a list of equal values."""
    if isinstance(value, list):
        if any(isinstance(item, list | dict) for item in value) or any(item != value[0] for item in value):
            raise ValueError
        return value[0]
    return value


def _number(value: Any) -> float | None:
    value = _one(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: Any) -> str | None:
    value = _one(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError
    return value.strip()


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        raise TypeError
    return [str(item).strip() for item in items]


def _numbers(value: Any) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError
    return [number for item in value if (number := _number(item)) is not None]


def shown(value: Any) -> str:
    """A value of a sidecar for messages: printable and short."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        text = "a number with thousands of digits"
    except RecursionError:
        text = "a deeply nested list"
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
