"""Read and check the files of a processing unit, and describe the unit for `--dry-run`."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.acquisition import EpiReference, PhaseEncoding, Run, SamplingScheme, Unit, k_space
from dsiprep.data.grid import Grid
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.errors import GradientError, InputError
from dsiprep.io.b_tables import read_b_table, read_bvals
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.files import check_file
from dsiprep.io.gradients import read_gradients, require_b0
from dsiprep.io.nifti import read_image, read_series, read_volume
from dsiprep.io.number_tables import read_numbers
from dsiprep.io.phase_values import to_radians
from dsiprep.io.sidecars import slice_axis, slice_times
from dsiprep.settings import Settings


def read_unit(unit: Unit, settings: Settings) -> RawUnit:
    """Read and check every file of a unit.

    Parameters
    ----------
    unit : Unit
    settings : Settings
        Only `acquisition.b0_threshold` and `anatomy.modality` are used.

    Returns
    -------
    RawUnit
        Without structural images and gradient-echo fieldmaps, which are only checked.

    Raises
    ------
    InputError
        If a file is missing, damaged or of the wrong shape, or contains NaN or infinite values.
    GradientError
        If a b-table is invalid, or the runs of a phase-encoding direction have no b=0 volume.
    """
    require_files(unit, settings.anatomy.modality)
    threshold = settings.acquisition.b0_threshold
    runs = tuple(_read_run(run, threshold) for run in unit.runs)
    for direction in {_direction(run) for run in runs}:
        same = [run for run in runs if _direction(run) == direction]
        bvals = np.concatenate([run.bvals for run in same])
        require_b0(bvals, threshold, ", ".join(run.name for run in same))
    epis = tuple(_read_epi(epi, threshold) for epi in unit.epis)
    for path in unit.structural(settings.anatomy.modality):
        read_volume(path)
    if unit.gre:
        read_fieldmap(unit.gre)
    return RawUnit(unit.name, runs, epis)


def require_files(unit: Unit, modality: str = "T1w") -> None:
    """Raise an InputError for the first missing file of the unit, structural images of `modality` included.

    A missing b-table raises a GradientError.
    """
    for run in unit.runs:
        for table, content in ((run.bval, "b-values"), (run.bvec, "b-vectors")):
            if not table.exists() and not table.is_symlink():
                raise GradientError(
                    f"{run.image}: no {content}: {table.name} is neither next to it nor inherited; add it, or "
                    "exclude the run with --bids-filter-file"
                )
    for path in (*unit.files(), *unit.structural(modality), *(unit.gre.files() if unit.gre else ())):
        check_file(path)


def _direction(run: RawRun) -> str:
    return run.pe.direction if run.pe else ""


def _read_run(run: Run, b0_threshold: float) -> RawRun:
    data, grid, phase = _read_complex(run)
    bvals, bvecs = read_gradients(run.bval, run.bvec, grid, len(data), b0_threshold, need_b0=False)
    times, axis = slice_times(run.metadata, grid.shape), slice_axis(run.metadata, grid.shape)
    return RawRun(run.image.name, data, grid, bvals, bvecs, run.pe, times, axis, run.k_space, phase)


def _read_complex(run: Run) -> tuple[torch.Tensor, Grid, torch.Tensor | None]:
    """Magnitudes of a series, its grid, and its phase in radians if it is complex and the phase is wanted."""
    data, grid = read_series(run.image)
    first = torch.from_numpy(data)
    if run.complex_part is None:
        return first, grid, None
    data, other = read_series(run.complex_part)
    if len(data) != len(first) or not other.matches(grid, 0.01):
        raise InputError(
            f"{run.complex_part}: its grid or number of volumes differs from that of {run.image.name}; convert both "
            "again, or run with --ignore phase"
        )
    second = torch.from_numpy(data)
    if run.is_cartesian:
        return torch.hypot(first, second), grid, torch.atan2(second, first) if run.use_phase else None
    (radians,), _ = to_radians([second], (run.complex_part,), "or run with --ignore phase")
    return first, grid, radians


def _read_epi(epi: EpiReference, b0_threshold: float) -> RawEpi:
    data, grid = read_image(epi.image)
    volumes = data.reshape(-1, *grid.shape)
    if epi.bval is not None:
        bvals = read_bvals(epi.bval, len(volumes))
        require_b0(bvals, b0_threshold, str(epi.bval))
        volumes = volumes[bvals <= b0_threshold]
    return RawEpi(
        epi.image.name,
        torch.from_numpy(np.ascontiguousarray(volumes)),
        grid,
        epi.pe,
        k_space(epi.metadata, epi.pe.axis),
    )


def scheme_of(unit: Unit, b0_threshold: float) -> SamplingScheme | None:
    """Sampling scheme of a unit from its b-tables alone, without the images; None if they cannot be read.

    b-vectors are used in the frame of the files, because recognising a lattice does not depend on the frame.
    """
    from dsiprep.ops.qspace.sampling_scheme import recognise

    try:
        tables = [
            read_b_table(run.bval, run.bvec, len(read_numbers(run.bval).ravel()), b0_threshold) for run in unit.runs
        ]
    except GradientError:
        return None
    bvals, vectors = (np.concatenate(columns) for columns in zip(*((t.bvals, t.vectors) for t in tables), strict=True))
    return recognise(bvals, vectors, b0_threshold)


def explain(unit: Unit, scheme: SamplingScheme | None) -> str:
    """Describe one unit for `--dry-run`: its files, its sampling scheme and the notes on its grouping."""
    lines = [unit.name]
    for run in unit.runs:
        lines.append(f"  DWI    {run.image.name}  ({_describe_encoding(run.pe)})")
        lines += [f"         {run.complex_part.name}"] if run.complex_part else []
    lines += [f"  b=0    {epi.image.name}  ({_describe_encoding(epi.pe)})" for epi in unit.epis]
    lines += [f"  field  {path.name}" for path in (unit.gre.files() if unit.gre else ())]
    lines += [f"  T1w    {path.name}" for path in unit.t1w]
    lines += [f"  T2w    {path.name}" for path in unit.t2w]
    if not unit.t1w:
        lines.append("  T1w    none")
    lines.append(f"  scheme {scheme.description if scheme else 'unknown: b-values or b-vectors cannot be read'}")
    lines += [f"  note   {note}" for note in unit.notes]
    return "\n".join(lines)


def _describe_encoding(pe: PhaseEncoding | None) -> str:
    if pe is None:
        return "phase encoding unknown"
    readout = "unknown" if pe.readout_time is None else f"{pe.readout_time:.5f} s"
    return f"phase encoding {pe.direction}, readout time {readout}"
