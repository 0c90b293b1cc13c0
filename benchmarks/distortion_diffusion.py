"""What mean diffusion-weighted images add to b=0 images of a pair: `python benchmarks/distortion_diffusion.py`.

Two whole series of opposite phase encoding are simulated as in `distortion.py`: 30 volumes of b=1000 and 30 of b=2000,
or the low part of a Cartesian DSI table, and one or several b=0. Their field is estimated from b=0 alone and with the
volumes of low b. With `--apart 0.3` each weighted volume is displaced at random by that many mm, bent by as much along
the phase encoding, and moved by half as much with all others: what motion correction left. Errors in the brain are
printed in mm less their median, mean / 95th percentile, and CPU seconds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from distortion import SHAPES, moved_head

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.qspace.matching_gradients import low_b_pairs
from dsiprep.phantom.head import make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import READOUT_TIME, Source, add_noise, scan
from dsiprep.phantom.schemes import gradient_table
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import make_tissue
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion


def table(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One b=0, and the weighted volumes that the correction may choose from."""
    if kind == "shells":
        index = np.arange(30) + 0.5
        turn, z = np.pi * (1 + 5**0.5) * index, index / 30
        half = np.stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z], -1)
        return np.repeat([0.0, 1000.0, 2000.0], [1, 30, 30]), np.concatenate(
            [np.zeros((1, 3)), half, half[:, [1, 2, 0]]]
        )
    bvals, bvecs = gradient_table(kind)
    low = np.flatnonzero((bvals > 0) & (bvals <= 2000))
    return np.concatenate([[0.0], bvals[low]]), np.concatenate([np.zeros((1, 3)), bvecs[low]])


class Simulated:
    """Noise-free series of both blips, (2, n, i, j, k), their table, and the truth in the pose of the first."""

    def __init__(self, kind: str, voxel: float, largest: float, apart: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        head, shape = make_head(rng), SHAPES[voxel]
        affine = np.diag([-voxel, voxel, voxel, 1.0])
        affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        self.grid, (self.bvals, self.bvecs) = Grid(shape, affine), table(kind)
        tissue = make_tissue(head, head.box(voxel * np.array(shape) + 40, voxel / 2))
        field, field_grid = make_field(head, largest, voxel * READOUT_TIME)
        poses = np.eye(4), moved_head(head, 0.5, 1.0, rng)
        self.brain, self.field = np.zeros(shape, bool), np.zeros(shape, np.float32)
        for rows, points in slabs(self.grid):
            there = self.brain[rows].shape
            self.brain[rows] = (
                interpolate(head.atlas["brain"], head.atlas_grid, head.to_template(points)) > 0.5
            ).reshape(there)
            self.field[rows] = interpolate(field, field_grid, points).reshape(there) * voxel * READOUT_TIME
        self.data = np.empty((2, len(self.bvals), *shape), np.float32)
        for blip, (pose, polarity) in enumerate(zip(poses, (1, -1), strict=True)):
            pe = PhaseEncoding(1, polarity, READOUT_TIME)
            for v, (b, g) in enumerate(zip(self.bvals, self.bvecs, strict=True)):
                source = Source(tissue.signal(b, pose[:3, :3].T @ g), tissue.grid, field, field_grid)
                off = apart if b else 0.0
                bent = off * (0.4 * rng.normal(size=9) + 0.5 * (np.arange(9) == 0)) if off else None
                place = moved_head(head, off / 2, off, rng) @ pose if off else pose
                self.data[blip, v] = scan(source, self.grid, pe, place, bent)

    def noisy(self, snr: float, count: int, seed: int) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...], Volume]:
        """`count` b=0 images and the mean of low b of either blip, and the brain as it is found."""
        rng = np.random.default_rng(seed)
        sigma = float(self.data[0, 0][self.brain].mean() / snr)
        b0s = [torch.from_numpy(np.stack([add_noise(d[0], sigma, rng) for _ in range(count)])) for d in self.data]
        mask = brain_mask_b0(Volume(b0s[0].mean(0), self.grid))
        n, twice = len(self.bvals), (np.tile(self.bvals, 2), np.tile(self.bvecs, (2, 1)))
        pairs = low_b_pairs(*twice, np.repeat([0, 1], n), twice[0] == 0)
        chosen = [v for v, _ in pairs]
        seen = [np.stack([add_noise(d[v], sigma, rng) for v in chosen]) for d in self.data]
        weights = seen[0][:, mask.numpy() > 0.5].mean(1)
        means = (np.tensordot(weights / weights.sum(), s, 1).astype(np.float32) for s in seen)
        return b0s, tuple(torch.from_numpy(mean) for mean in means), mask


def errors(case: Simulated, snr: float, count: int, seed: int) -> list[tuple[float, float, float]]:
    """Mean, 95th percentile and CPU seconds without and with diffusion-weighted images."""
    b0s, means, mask = case.noisy(snr, count, seed)
    blips = tuple(
        Blip(name, PhaseEncoding(1, p, READOUT_TIME), torch.zeros(0, *case.grid.shape))
        for name, p in (("up", 1), ("down", -1))
    )
    rows = []
    for diffusion in ((), means):
        start = time.process_time()
        result = correct_distortion(blips, tuple(b0s), case.grid, mask, DistortionSettings(), diffusion=diffusion)
        seconds = time.process_time() - start
        found = result.fields[0].data[1].numpy()  # the grid's j axis is the world's y
        error = (found - case.field)[case.brain]
        free = np.abs(error - np.median(error))
        rows.append((float(free.mean()), float(np.percentile(free, 95)), seconds))
    return rows


def main() -> None:
    """Simulate, correct, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", default="shells", choices=("shells", "dsi257", "dsi101", "hasc55"))
    parser.add_argument("--voxel", type=float, default=3.0, choices=tuple(SHAPES))
    parser.add_argument("--largest", type=float, default=8.0, help="largest displacement in the brain, mm")
    parser.add_argument("--apart", type=float, default=0.0, help="what motion correction left, mm")
    parser.add_argument("--snr", type=float, nargs="+", default=[20.0, 10.0])
    parser.add_argument("--b0", type=int, nargs="+", default=[1, 6, 13], help="numbers of b=0 images in each blip")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    case = Simulated(o.table, o.voxel, o.largest, o.apart, o.seed)
    print("| SNR | b=0 | b=0 alone | with diffusion | mean less by | CPU s |\n|---|---|---|---|---|---|")
    for snr in o.snr:
        for count in o.b0:
            alone, helped = errors(case, snr, count, o.seed)
            numbers = " | ".join(f"{mean:.3f} / {most:.3f}" for mean, most, _ in (alone, helped))
            less = 100 * (1 - helped[0] / alone[0])
            print(f"| {snr:g} | {count} | {numbers} | {less:.0f} % | {alone[2]:.1f}, {helped[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
