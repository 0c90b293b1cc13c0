"""What a structural image adds to a pair whose two fields differ: `python benchmarks/distortion_shared.py OUT`.

A pair is simulated as in `distortion.py` at 3 mm, once with exactly opposite fields and once with fields that differ by
`--differ` mm at the most, and corrected alone, with a T2w (the b=0 contrast) and with a T1w of the same head. Errors of
both displacements in the brain are printed in mm, each less its median: mean and 95th percentile.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from distortion import SHAPES, moved_head

from dsiprep.api.blip_pair import correct_pair
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.results import Distortion
from dsiprep.phantom.dataset import T1_WEIGHT
from dsiprep.phantom.head import make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import READOUT_TIME, Source, add_noise, scan
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import make_tissue

VOXEL = 3.0


def simulate(out: Path, differ: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images in `out`; displacement of either blip in mm along +j, and the brain."""
    rng = np.random.default_rng(seed)
    head, shape = make_head(rng), SHAPES[VOXEL]
    affine = np.diag([-VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    tissue = make_tissue(head, head.box(VOXEL * np.array(shape) + 40, VOXEL / 2))
    field, field_grid = make_field(head, 8.0, VOXEL * READOUT_TIME)
    points = field_grid.to_world(np.stack(np.meshgrid(*map(np.arange, field_grid.shape), indexing="ij"), -1))
    spots = [
        np.exp(-((points - head.centre - c) ** 2).sum(-1) / (2 * r**2))
        for c, r in (([10, 45, 0], 25), ([-30, -20, -25], 22))
    ]
    other = (field + differ * (spots[0] - 0.7 * spots[1]) / (VOXEL * READOUT_TIME)).astype(np.float32)
    signal = tissue.signal(0.0, np.zeros(3))
    up, down = PhaseEncoding(1, 1, READOUT_TIME), PhaseEncoding(1, -1, READOUT_TIME)
    still, pose = replace(up, readout_time=0.0), moved_head(head, 0.5, 1.0, rng)
    images = {
        "up": scan(Source(signal, tissue.grid, field, field_grid), grid, up, np.eye(4)),
        "down": scan(Source(signal, tissue.grid, other, field_grid), grid, down, pose),
        "t2w": scan(Source(signal, tissue.grid, field, field_grid), grid, still, np.eye(4)),
        "t1w": scan(Source(t1w_of(head, tissue.grid), tissue.grid, field, field_grid), grid, still, np.eye(4)),
    }
    brain, moved = np.zeros(shape, bool), np.zeros((2, *shape))
    for rows, places in slabs(grid):
        brain[rows] = (interpolate(head.atlas["brain"], head.atlas_grid, head.to_template(places)) > 0.5).reshape(
            brain[rows].shape
        )
        for blip, (hertz, sign) in enumerate(((field, 1), (other, -1))):
            moved[blip][rows] = (
                sign * interpolate(hertz, field_grid, places).reshape(brain[rows].shape) * VOXEL * READOUT_TIME
            )
    out.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        noisy = add_noise(image, float(image[brain].mean() / (40 if name == "t1w" else 20)), rng)
        nib.save(nib.Nifti1Image(noisy, affine), out / f"{name}.nii.gz")
    return moved[0], moved[1], brain


def t1w_of(head: object, grid: Grid) -> np.ndarray:
    """T1w intensities of the phantom's head."""
    maps = head.maps(grid)  # type: ignore[attr-defined]
    outside = sum(np.float32(weight) * maps[name] for name, weight in T1_WEIGHT.items())
    return np.asarray(maps["t1"] * maps["brain"] + outside * (1 - maps["brain"]), np.float32)


def errors(result: Distortion, truth: tuple[np.ndarray, np.ndarray], brain: np.ndarray) -> list[float]:
    """Mean and 95th percentile for up, then for down. The grid's j axis is the world's y."""
    numbers = []
    for field, known in zip(result.fields, truth, strict=True):
        error = (field.data[1].numpy() - known)[brain]
        free = np.abs(error - np.median(error))
        numbers += [free.mean(), np.percentile(free, 95)]
    return numbers


def main() -> None:
    """Simulate, correct, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--differ", type=float, default=1.5, help="largest difference of the two fields, mm")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| fields differ by | structural | up mean | up p95 | down mean | down p95 |\n|---|---|---|---|---|---|")
    for differ in (0.0, options.differ):
        folder = options.out / f"{differ:g}"
        up, down, brain = simulate(folder, differ, options.seed)
        for structural in (None, "t2w", "t1w"):
            file = folder / f"{structural}.nii.gz" if structural else None
            files = folder / "up.nii.gz", folder / "down.nii.gz"
            result = correct_pair(*files, pe_dir="j", readout_time=READOUT_TIME, structural=file)
            numbers = " | ".join(f"{v:.3f}" for v in errors(result, (up, down), brain))
            print(f"| {differ:g} mm | {structural or 'none'} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
