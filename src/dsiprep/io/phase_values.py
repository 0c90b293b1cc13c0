"""Phase images in radians, from the integers, degrees and thousandths in which scanners and converters store them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsiprep.errors import InputError

__all__ = ["to_radians"]


@dataclass(frozen=True)
class _PhaseRange:
    """Values in which phase is stored: from `low` to `high`, of which `cycle` are one turn; `zero` is phase 0."""

    low: float
    high: float
    cycle: float
    unit: str
    zero: float = 0


RADIANS = (_PhaseRange(-np.pi, np.pi, 2 * np.pi, "radians"), _PhaseRange(0, 2 * np.pi, 2 * np.pi, "radians"))
SCANNER_UNITS = (
    _PhaseRange(0, 4095, 4096, "integers of 12 bits", 2048),
    _PhaseRange(-4096, 4095, 8192, "integers of 12 bits, times 2 and centred"),
    _PhaseRange(-2048, 2047, 4096, "integers of 12 bits, centred"),
    _PhaseRange(-3142, 3142, 2000 * np.pi, "thousandths of radians"),
    _PhaseRange(0, 6283, 2000 * np.pi, "thousandths of radians"),
    _PhaseRange(-31416, 31416, 20000 * np.pi, "ten-thousandths of radians"),
    _PhaseRange(-180, 180, 360, "degrees"),
    _PhaseRange(0, 360, 360, "degrees"),
    _PhaseRange(0, 65535, 65536, "integers of 16 bits", 32768),
    _PhaseRange(-32768, 32767, 65536, "integers of 16 bits, centred"),
)
WHERE_MASKED = SCANNER_UNITS[:2]  # what a masked image, which does not reach the ends of its range, may be stored in
END = 0.02  # of a cycle; an unmasked image comes this close to both ends of its range, since noise has any phase
LEAST_MASKED = 0.15  # of a cycle that a masked image spans at least


def to_radians(images: list[torch.Tensor], paths: tuple[Path, ...], or_ignore: str) -> tuple[list[torch.Tensor], str]:
    """Phase images in radians, and a note unless they are stored so; their range is that of all of them together.

    Parameters
    ----------
    images : list of Tensor
        Values as stored.
    paths : tuple of Path
        Of the images, for messages.
    or_ignore : str
        The way out for the error message: "or run with --ignore ...".

    Raises
    ------
    InputError
        If an image is constant, or the values fit no known range.
    """
    found, note = _phase_range(images, paths, or_ignore)
    return [(image - found.zero) * (2 * np.pi / found.cycle) for image in images], note


def _phase_range(images: list[torch.Tensor], paths: tuple[Path, ...], or_ignore: str) -> tuple[_PhaseRange, str]:
    """The range in which phase images are stored, and a note unless they are in radians.

    An image is never stretched from its own extremes: masked, it may span only a part of a cycle.
    """
    for image, path in zip(images, paths, strict=True):
        if float(image.min()) == float(image.max()):
            raise InputError(f"{path}: the phase is constant; convert it again, {or_ignore}")
    low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
    integers = all(float(image.frac().abs().max()) == 0 for image in images)
    if not integers:
        for known in RADIANS:
            if known.low - 0.01 <= low and high <= known.high + 0.01:
                return known, ""
    text = f"{paths[0].name}: phase values from {low:g} to {high:g} were read as"
    for known in SCANNER_UNITS:
        if max(abs(low - known.low), abs(high - known.high)) <= END * known.cycle:
            return known, f"{text} {known.unit}, {known.cycle:.5g} to a cycle."
    for known in WHERE_MASKED if integers else ():
        inside = known.low <= low and high <= known.high + 1
        if inside and high - low >= LEAST_MASKED * known.cycle:
            return known, (
                f"{text} {known.unit}, {known.cycle:.5g} to a cycle, of which they span only a part; check the field, "
                "which is wrong by a factor if the image was stored in another range."
            )
    ranges = ", ".join(f"{known.low:.5g} to {known.high:.5g}" for known in (*RADIANS, *SCANNER_UNITS))
    raise InputError(
        f"{paths[0]}: phase values from {low:g} to {high:g} fit no known range ({ranges}), so their scale is unknown; "
        f"convert the image to radians, {or_ignore}"
    )
