"""Check the files of a unit without reading voxels, for the plan: headers, b-tables, links and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dsiprep.data.acquisition import EpiReference, Run, Unit, simultaneous_slices
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.b_tables import read_b_table, read_bvals
from dsiprep.io.fieldmaps import OR_IGNORE
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.io.gradients import require_b0
from dsiprep.io.nifti_header import Header, check_extent, check_kind, oriented, read_header
from dsiprep.io.q_grid_table import read_q_grid
from dsiprep.io.scanner_corrections import corrections_of
from dsiprep.io.sidecars import slice_times
from dsiprep.io.unit_reader import require_files
from dsiprep.settings import Settings

MIN_SLICES = 4  # voxels along each axis, for registration in three dimensions


def check_unit(unit: Unit, settings: Settings) -> None:
    """Check every file of a unit as `read_unit` does, but read no voxels.

    Raises
    ------
    InputError
        If a file is missing or not an image of its kind, its header is damaged, or the series has too few slices.
    GradientError
        If a b-table or the table of --q-grid is invalid, or the runs of a phase-encoding direction have no b=0 volume.
    """
    modality, threshold = settings.anatomy.modality, settings.acquisition.b0_threshold
    read_q_grid(settings.lattice.grid)
    if settings.nonlinearity.coefficients:
        read_coil_fields(Path(settings.nonlinearity.coefficients))
        corrections_of(unit, modality, settings.nonlinearity.scanner)
    require_files(unit, modality)
    by_direction: dict[str, list[tuple[Run, np.ndarray]]] = {}
    for run in unit.runs:
        bvals = _check_run(run, threshold)
        if settings.motion.slices == "on":
            _check_slice_times(run)
        by_direction.setdefault(run.pe.direction if run.pe else "", []).append((run, bvals))
    for same in by_direction.values():
        bvals = np.concatenate([values for _, values in same])
        require_b0(bvals, threshold, ", ".join(run.image.name for run, _ in same))
    for epi in unit.epis:
        _check_epi(epi, threshold)
    for path in unit.structural(modality):
        check_header(path, "volume")
    if unit.gre:
        grids = [oriented(check_header(path, "volume"), path) for path in unit.gre.files()]
        for path, grid in zip(unit.gre.files(), grids, strict=True):
            if not grid.matches(grids[0], 0.01):
                raise InputError(
                    f"{path}: its grid differs from that of {unit.gre.images[0].name}; convert both again, {OR_IGNORE}"
                )


def check_header(path: Path, kind: str) -> Header:
    """Header of an image of a kind (`nifti_header.check_kind`), with an orientation and, uncompressed, all voxels."""
    header = read_header(path)
    check_kind(header, path, kind)
    oriented(header, path)
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    check_extent(header, header.data_end if compressed else path.stat().st_size, path)
    return header


def _check_run(run: Run, b0_threshold: float) -> np.ndarray:
    """b-values of a run, after checking its header and b-table."""
    header = check_header(run.image, "series")
    if run.complex_part is not None and check_header(run.complex_part, "series").shape != header.shape:
        raise InputError(
            f"{run.complex_part}: its shape differs from that of {run.image.name}; convert both again, or run with "
            "--ignore phase"
        )
    if min(header.shape[:3]) < MIN_SLICES:
        raise InputError(
            f"{run.image}: {min(header.shape[:3])} slices; head motion is estimated in three dimensions, "
            f"which needs at least {MIN_SLICES}; exclude this file with --bids-filter-file"
        )
    return read_b_table(run.bval, run.bvec, header.shape[3], b0_threshold).bvals


def _check_slice_times(run: Run) -> None:
    """Refuse a run whose order of acquisition is unknown, for --slice-motion on."""
    i, j, k = read_header(run.image).shape[:3]
    if not slice_times(run.metadata, (i, j, k)):
        raise MetadataError(
            f"{run.image.name}: --slice-motion on needs SliceTiming with a time for each slice along "
            "SliceEncodingDirection; add it to the sidecar, or choose --slice-motion auto, which then keeps one pose "
            "for each volume"
        )


def _check_epi(epi: EpiReference, b0_threshold: float) -> None:
    header = check_header(epi.image, "image")
    if epi.bval is not None:
        bvals = read_bvals(epi.bval, header.shape[3] if len(header.shape) > 3 else 1)
        require_b0(bvals, b0_threshold, str(epi.bval))


def with_file_notes(unit: Unit, b0_threshold: float) -> Unit:
    """The unit with notes on what was unusual in headers and b-tables; unreadable files are left to the check."""
    notes = list(unit.notes)
    images = [run.image for run in unit.runs] + [epi.image for epi in unit.epis]
    for path in (*images, *unit.t1w, *unit.t2w, *(unit.gre.files() if unit.gre else ())):
        try:
            notes += [read_header(path).note]
        except InputError:
            continue
    for run in unit.runs:
        try:
            count = (*read_header(run.image).shape, 1)[3]
            notes += read_b_table(run.bval, run.bvec, count, b0_threshold).notes
            notes += [_multiband_note(run)]
        except InputError:
            continue
    return replace(unit, notes=tuple(dict.fromkeys(note for note in notes if note)))


def _multiband_note(run: Run) -> str:
    """What differs if MultibandAccelerationFactor is not the number of slices that SliceTiming has at each time."""
    i, j, k = read_header(run.image).shape[:3]
    times, factor = slice_times(run.metadata, (i, j, k)), run.metadata.get("MultibandAccelerationFactor")
    if not times or not isinstance(factor, int | float):
        return ""
    together = len(times) / len(simultaneous_slices(times))
    if together == factor:
        return ""
    return (
        f"{run.image.name}: MultibandAccelerationFactor is {factor:g}, but SliceTiming has {together:.3g} slices at "
        "each time; which slices were excited together is taken from SliceTiming"
    )
