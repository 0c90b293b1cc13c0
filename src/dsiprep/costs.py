"""What a unit is expected to cost: seconds of each step, and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dsiprep.data.acquisition import Unit
from dsiprep.errors import InputError
from dsiprep.io.nifti_header import read_shape
from dsiprep.plan import plan_distortion, plan_slices
from dsiprep.settings import Settings

__all__ = ["BASE_MB", "BESIDE_MB", "BESIDE_THREADS", "COSTS", "expected_memory", "expected_minutes", "expected_seconds"]

# CPU seconds of each step: constant, and per million voxels of the series, from runs of a DSI-101 phantom of 5 mm and a
# DSI-257 phantom of 2.5 mm (7 and 131 million voxels), compiling included.
COSTS = {
    "acquisition": (2.0, 0.08),
    "gradients": (0.5, 0.025),
    "denoise": (1.0, 0.4),
    "unringing": (0.5, 0.06),
    "motion": (6.0, 0.9),
    "distortion": (2.0, 0.05),
    "slices": (2.0, 0.15),
    "anatomy": (45.0, 0.0),
    "coregister": (3.0, 0.0),
    "resample": (5.0, 0.24),
    "lattice": (1.0, 0.3),
    "quality": (2.0, 0.12),
    "derivatives": (20.0, 0.07),
    "report": (12.0, 0.03),
}
MOVING_FIELD = (10.0, 1.0)  # more for distortion, if a third of the volumes are turned
# part that runs on several cores
PARALLEL = {"denoise": 0.9, "motion": 0.9, "slices": 0.8, "anatomy": 0.6, "resample": 0.8}
PARALLEL_OTHERS = 0.2
BASE_MB, COPIES = 2000, 5  # memory beside the series, and copies of the series in float32
BESIDE_THREADS, BESIDE_MB = 8, 3000  # threads from which anatomy has a process of its own beside motion, and its memory
COMPLEX_COPIES, LATTICE_COPIES = 2, 1  # more for complex data, and for a series on a lattice


def expected_seconds(unit: Unit, settings: Settings, threads: int = 1) -> dict[str, float]:
    """Expected wall time of each step of a unit on `threads` cores, without a GPU."""
    times, millions = {}, _millions_of_voxels(unit)
    for step, (constant, per_million) in COSTS.items():
        share = PARALLEL.get(step, PARALLEL_OTHERS)
        times[step] = (constant + per_million * millions) * (1 - share + share / max(threads, 1))
    if unit.runs and plan_distortion(unit, settings)[0] == "none":
        times["distortion"] *= 0.1
    if not unit.structural(settings.anatomy.modality):
        times["anatomy"] *= 0.3
    if settings.motion.method == "none":
        times["motion"] *= 0.05
    if not plan_slices(unit, settings):  # what it takes where the head moved much is not known before
        del times["slices"]
    if _is_complex(unit):
        times["denoise"] *= 2
    if settings.moving_field.method != "off":
        times["distortion"] += MOVING_FIELD[0] + MOVING_FIELD[1] * millions
    if settings.lattice.grid == "none":
        del times["lattice"]
    if threads >= BESIDE_THREADS:
        times["anatomy"] = max(times["anatomy"] - times["denoise"] - times["motion"] - times["distortion"], 0.0)
    return times


def expected_minutes(units: Sequence[Unit], settings: Settings) -> float:
    """Expected CPU time (minutes) of all units."""
    return sum(sum(expected_seconds(unit, settings).values()) for unit in units) / 60


def expected_memory(units: Sequence[Unit], settings: Settings, threads: int = 1) -> int:
    """Approximate peak memory (MB) of the largest unit on `threads` cores."""
    copies = COPIES + LATTICE_COPIES * (settings.lattice.grid != "none")
    largest = max((_millions_of_voxels(u) * (copies + COMPLEX_COPIES * _is_complex(u)) for u in units), default=0.0)
    return BASE_MB + round(4 * largest * 1e6 / 2**20) + BESIDE_MB * (threads >= BESIDE_THREADS)


def _is_complex(unit: Unit) -> bool:
    return any(run.complex_part is not None and run.use_phase for run in unit.runs)


def _millions_of_voxels(unit: Unit) -> float:
    return sum(math.prod(_shape(run.image)) for run in unit.runs) / 1e6


def _shape(path: Path) -> tuple[int, ...]:
    """Shape of an image; of none that can be read, whose error is raised on reading."""
    try:
        return read_shape(path)
    except InputError:
        return (0,)
