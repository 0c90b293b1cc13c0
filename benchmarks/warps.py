"""CPU time, memory and error of `dsiprep-tools convert-warp` on a large warp: `python benchmarks/warps.py OUT`.

The warp is random and smooth, up to 12 mm, with an affine in it, on an oblique grid of 1 mm as SynthMorph writes it
(256 x 256 x 256 voxels by default). Each conversion runs in a process of its own; errors are those of SimpleITK reading
what was written against the numbers that went in, at random points. One Markdown table is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.io import freesurfer
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_displacement, chain_points
from dsiprep.ops.image.filters import gaussian

LPS = np.array([-1.0, -1, 1])
TURN = rigid_matrix(np.array([0.1, -0.08, 0.06, 4, -6, 5]))
RUNS = (
    ("SynthMorph to ITK composite", ["warp.nii.gz", "out.h5"]),
    ("SynthMorph to ITK NIfTI", ["warp.nii.gz", "out.nii.gz"]),
    ("ITK composite to FreeSurfer", ["out.h5", "fs.nii.gz", "--to", "freesurfer", "--source", "warp.nii.gz"]),
    ("inverse as ITK composite", ["warp.nii.gz", "back.h5", "--invert"]),
)


def make(out: Path, size: int) -> Chain:
    """The warp as a file, and as a chain."""
    rng = np.random.default_rng(0)
    affine = rigid_matrix(np.array([0.1, 0.05, -0.1, 0, 0, 0])) @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = -affine[:3, :3] @ np.full(3, (size - 1) / 2)
    grid = Grid((size, size, size), affine)
    coarse = gaussian(torch.from_numpy(rng.normal(size=(3, *[size // 4] * 3)).astype(np.float32)), 4.0)
    fine = torch.nn.functional.interpolate(coarse[None], size=grid.shape, mode="trilinear")[0]
    bend = DisplacementField(fine * (12 / float(fine.norm(dim=0).max())), grid)
    data = chain_displacement(Chain((bend, Affine(TURN, "", "")), "", ""), grid)
    field = DisplacementField(data, grid)
    freesurfer.write_warp(out / "warp.nii.gz", field, grid)
    return Chain((field,), "", "")


def run(arguments: list[str], out: Path) -> tuple[float, float]:
    """CPU seconds and GB of one conversion."""
    process = subprocess.Popen([sys.executable, "-m", "dsiprep.cli.tools", "convert-warp", *arguments], cwd=out)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"convert-warp {' '.join(arguments)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def by_simpleitk(path: Path, points: np.ndarray) -> np.ndarray:
    """World points through a file."""
    if path.suffix == ".h5":
        transform = sitk.ReadTransform(str(path))
    else:
        transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint((p * LPS).tolist()) for p in points]) * LPS


def main() -> None:
    """Make the warp, convert it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chain = make(options.out, options.size)
    middle = np.random.default_rng(1).uniform(-0.3, 0.3, (2000, 3)) * options.size
    truth = chain_points(chain, middle)
    print("| conversion | CPU s | memory GB | largest error mm |\n|---|---|---|---|")
    for name, arguments in RUNS:
        seconds, memory = run(arguments, options.out)
        path = options.out / arguments[1]
        there = by_simpleitk(path, truth if "--invert" in arguments else middle)
        error = np.abs(there - (middle if "--invert" in arguments else truth)).max()
        print(f"| {name} | {seconds:.0f} | {memory:.1f} | {error:.1g} |", flush=True)


if __name__ == "__main__":
    main()
