"""Join the finished units of a session into one series."""

from __future__ import annotations

from dsiprep.data.results import Joined, UnitResults
from dsiprep.errors import InputError
from dsiprep.io.q_grid_table import read_q_grid
from dsiprep.stages import joined_series, quality
from dsiprep.stages.lattice import evaluate_lattice

__all__ = ["join_units"]


def join_units(name: str, parts: list[UnitResults]) -> Joined:
    """Join finished units of one session into one series in ACPC space.

    Parameters
    ----------
    name : str
        Prefix of the output.
    parts : list of UnitResults
        Units that share a structural image and settings.

    Raises
    ------
    InputError
        If the distortion of some of them only was corrected.
    """
    uncorrected = [part for part in parts if part.distortion is None]
    if 0 < len(uncorrected) < len(parts):
        raise InputError(
            f"{name}: not joined, because the distortion of {', '.join(part.unit.name for part in uncorrected)} was "
            f"not corrected ({uncorrected[0].distortion_reason}); use --distortion-group-merge none"
        )
    settings, anatomical = parts[0].settings, parts[0].anatomy
    series = tuple(part.preprocessed for part in parts)
    asked = tuple(part.acquired.dwi for part in parts)
    merge = settings.resample.merge
    together = joined_series.join(series, asked, anatomical, merge, settings.acquisition.harmonize_b0)
    model = parts[0].motions[0].model
    found, runs = tuple(part.quality for part in parts), tuple(dwi.run for dwi in asked)
    measured = quality.measure_joined(name, found, runs, anatomical, together, model)
    files = tuple(part.unit.runs[run].image.name for part in parts for run in part.acquired.dwi.run)
    members = tuple(part.unit.name for part in parts)
    grid = settings.lattice.grid
    wanted = grid != "none"
    on_lattice = evaluate_lattice(together, parts[0].acquired, grid, read_q_grid(grid)) if wanted else None
    return Joined(name, members, merge, files, together, measured, model, on_lattice)
