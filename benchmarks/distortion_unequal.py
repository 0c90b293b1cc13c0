"""Distortion fields from images not scanned alike: `PYTHONPATH=tests python benchmarks/distortion_unequal.py`.

The simulated pair of the tests, its second image scanned in other ways, against the truth. With `--subject`, a subject
with series of both polarities, the second given in other ways, against the field of the pair as it is. Two Markdown
tables are printed: mean and 95th percentile of the error in mm in the brain, less its median.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi, RawUnit
from dsiprep.io.bids import find_units, read_unit
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.settings import AcquisitionSettings, DistortionSettings, Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.distortion import correct_distortion
from helpers.epi_pair import Case, make_grid, rigid

POSE = rigid((1.0, -1.5, 0.8), np.array([0.8, 0.0, -0.6]))
SECOND_IMAGES = {
    "scanned alike": None,
    "planes tilted by 0.5°": (make_grid("RAS", 0.5), PhaseEncoding(1, -1)),
    "planes tilted by 20°": (make_grid("RAS", 20), PhaseEncoding(1, -1)),
    "sagittal file": (make_grid("ASR"), PhaseEncoding(0, -1)),
    "phase encoding L-R": (make_grid("RAS"), PhaseEncoding(0, 1)),
    "phase encoding H-F": (make_grid("ASR"), PhaseEncoding(1, -1)),
}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", type=Path, help="folder sub-X of a BIDS dataset with two series, AP and PA")
    options = parser.parse_args()
    print("| second image | mean | p95 |\n|---|---|---|")
    for name, second in SECOND_IMAGES.items():
        case = Case(make_grid("RAS"), 1, pose=POSE, noise=0.5, second=second)
        row(name, case.errors(case.correct()))
    if options.subject:
        print("\n| second image | mean | p95 |\n|---|---|---|")
        compare_forms(options.subject)


def compare_forms(subject: Path) -> None:
    """Fields of a subject with the second image in several forms."""
    (unit,) = find_units(subject.parent, Settings(), participants=[subject.name])
    series, other = read_unit(unit, Settings()).runs
    assert other.pe is not None
    pe, grid, b0 = other.pe, other.grid, other.data[torch.as_tensor(other.bvals <= 100)][:1]

    def field(image: torch.Tensor, on: Grid, along: PhaseEncoding) -> tuple[np.ndarray, np.ndarray]:
        acquired = conform(RawUnit("", (series,), (RawEpi("", image, on, along),)), AcquisitionSettings())
        first = acquired.dwi.data[torch.as_tensor(acquired.dwi.is_b0)][:1]
        brain = brain_mask_b0(Volume(first[0], acquired.dwi.grid))
        images, settings = (first, acquired.blips[1].epis), DistortionSettings()
        result = correct_distortion(acquired.blips, images, acquired.dwi.grid, brain, settings)
        direction = acquired.dwi.grid.directions[:, (acquired.blips[0].pe or pe).axis]
        return np.einsum("a,aijk->ijk", direction, result.fields[0].data.numpy()), brain.numpy() > 0.5

    alike, brain = field(b0, grid, pe)
    axis = grid.directions[:, pe.axis]
    for name, (image, on, along) in {
        "sagittal file": reordered(b0, grid, pe, [1, 2, 0]),
        "coronal file": reordered(b0, grid, pe, [0, 2, 1]),
        "planes turned by 0.3° about the phase-encoding axis": (*turned(b0, grid, 0.3 * axis), pe),
        "planes turned by 20° about it": (*turned(b0, grid, 20 * axis), pe),
        "the same and turned back: interpolated as often, scanned alike": (
            back_and_forth(b0, grid, 20 * axis),
            grid,
            pe,
        ),
        "one slice off": (*turned(b0, grid, 0 * axis, 1), pe),
        "four voxels and a slice fewer": (*cropped(b0, grid), pe),
    }.items():
        error = (field(image, on, along)[0] - alike)[brain]
        row(name, np.abs(error - np.median(error)))


def reordered(
    b0: torch.Tensor, grid: Grid, pe: PhaseEncoding, order: list[int]
) -> tuple[torch.Tensor, Grid, PhaseEncoding]:
    """The same image with its voxel axes in another order."""
    along = PhaseEncoding(order.index(pe.axis), pe.polarity, pe.readout_time)
    return b0.permute(0, *(axis + 1 for axis in order)).contiguous(), grid.permuted(order), along


def turned(b0: torch.Tensor, grid: Grid, degrees: np.ndarray, slices: int = 0) -> tuple[torch.Tensor, Grid]:
    """The image on a grid turned about its centre by a rotation vector, and moved along its last axis."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(degrees, degrees=True).as_matrix()
    turn[:3, 3] = grid.centre - turn[:3, :3] @ grid.centre
    affine = turn @ grid.affine
    affine[:3, 3] += slices * affine[:3, 2]
    other = Grid(grid.shape, affine)
    return resample_onto(b0, grid, other, cubic=True).clamp(min=0), other


def back_and_forth(b0: torch.Tensor, grid: Grid, degrees: np.ndarray) -> torch.Tensor:
    """The image after `turned`, on its own grid again."""
    image, other = turned(b0, grid, degrees)
    return resample_onto(image, other, grid, cubic=True).clamp(min=0)


def cropped(b0: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
    """The image without two voxels on each side of i and j, and without the first slice."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_world([2, 2, 1])
    i, j, k = grid.shape
    return b0[:, 2:-2, 2:-2, 1:].contiguous(), Grid((i - 4, j - 4, k - 1), affine)


def row(name: str, error: np.ndarray) -> None:
    """One row of a table."""
    print(f"| {name} | {error.mean():.3f} | {np.percentile(error, 95):.3f} |", flush=True)


if __name__ == "__main__":
    main()
