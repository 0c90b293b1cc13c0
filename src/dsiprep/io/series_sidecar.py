"""Acquisition parameters in the sidecar of a preprocessed series, for the volumes and axes of the output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.results import UnitResults

__all__ = ["acquisition_fields"]

SAME = 1e-6  # s; times closer than this agree


def acquisition_fields(members: Sequence[UnitResults], grid: Grid) -> dict[str, float | str]:
    """RepetitionTime, EchoTime, TotalReadoutTime (s) and PhaseEncodingDirection, each where all volumes share it.

    Parameters
    ----------
    members : sequence of UnitResults
        Units that make up the series.
    grid : Grid
        Of the series, in ACPC space.

    Returns
    -------
    dict
        `PhaseEncodingDirection` refers to the axes of `grid`: of its six directions the one closest to that in which
        the readout shifted the head.
    """
    runs = [run for member in members for run in member.unit.runs]
    times = {name: _shared([run.metadata.get(name) for run in runs]) for name in ("RepetitionTime", "EchoTime")}
    times["TotalReadoutTime"] = _shared([run.pe.readout_time if run.pe else None for run in runs])
    fields: dict[str, float | str] = {name: value for name, value in times.items() if value is not None}
    directions = {direction for member in members for direction in _directions(member, grid)}
    direction = directions.pop() if len(directions) == 1 else None
    return fields if direction is None else fields | {"PhaseEncodingDirection": direction}


def _shared(values: Sequence[object]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers[0] if len(numbers) == len(values) and max(numbers) - min(numbers) < SAME else None


def _directions(member: UnitResults, grid: Grid) -> set[str | None]:
    """Phase-encoding directions of a unit's volumes along the axes of the output; None for an unknown one."""
    dwi, to_acpc = member.acquired.dwi, np.linalg.inv(member.coregistration.dwiref_to_acpc.matrix[:3, :3])
    found: set[str | None] = set()
    for blip in np.unique(dwi.blip):
        pe = member.acquired.blips[int(blip)].pe
        if pe is None:
            found.add(None)
            continue
        along = np.linalg.solve(grid.affine[:3, :3], to_acpc @ (pe.polarity * pe.vector(dwi.grid)))
        axis = int(np.argmax(np.abs(along)))
        found.add(PhaseEncoding(axis, 1 if along[axis] > 0 else -1).direction)
    return found
