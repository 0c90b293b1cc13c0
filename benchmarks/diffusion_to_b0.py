"""Alignment of diffusion with b=0: `python benchmarks/diffusion_to_b0.py OUT [--case CASE ...] [--resolution MM]`.

Series with a single leading b=0, as many clinical protocols have, simulated without susceptibility distortion (SNR 25
at b=0): a step of the head after the b=0, shells acquired in blocks during a slow drift, or a still head. Prints, per
case, the mean displacement of brain points by the estimated transforms from the true ones, over all diffusion-weighted
volumes, relative to the b=0 and with nothing removed; the size of the rigid offset that they share; and CPU time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.image.affine import mean_rigid, point_displacement, rigid_matrix
from dsiprep.phantom.head import make_head
from dsiprep.phantom.scanner import FIELD_OF_VIEW, add_noise
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import Session, plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import make_tissue
from dsiprep.settings import MotionSettings
from dsiprep.stages.motion import estimate_motion

STEP = np.r_[np.deg2rad([0.9, 0.0, -0.6]), 0.5, 1.5, -1.0]  # rotation vector (rad) and translation (mm)
DRIFT = np.r_[np.deg2rad([1.2, -0.6, 0.8]), 0.8, -1.2, 2.0]  # over the whole series
PER_SHELL = 30


def shells(in_blocks: bool) -> tuple[np.ndarray, np.ndarray]:
    """One b=0, then 30 directions at each of b 1000, 2000 and 3000, shuffled or in blocks."""
    rng = np.random.default_rng(5)
    bvals = np.repeat([1000.0, 2000.0, 3000.0], PER_SHELL)
    k = np.arange(PER_SHELL) + 0.5
    polar, azimuth = np.arccos(1 - k / PER_SHELL), np.pi * (1 + 5**0.5) * k
    sphere = np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], axis=1)
    turns = [rigid_matrix(rng.uniform(-1, 1, 6) * [1, 1, 1, 0, 0, 0])[:3, :3] for _ in range(3)]
    bvecs = np.concatenate([sphere[rng.permutation(PER_SHELL)] @ turn.T for turn in turns])
    order = np.arange(len(bvals)) if in_blocks else rng.permutation(len(bvals))
    return np.append(0, bvals[order]), np.vstack([np.zeros(3), bvecs[order]])


def lattice(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """A named scheme with its first b=0 only."""
    bvals, bvecs = load_scheme(scheme)
    kept = (bvals > 0) | (np.arange(len(bvals)) == 0)
    return bvals[kept], bvecs[kept]


def single_shell() -> tuple[np.ndarray, np.ndarray]:
    """One b=0 and the 30 directions at b 1000."""
    bvals, bvecs = shells(in_blocks=True)
    return bvals[: PER_SHELL + 1], bvecs[: PER_SHELL + 1]


def _still(n: int) -> np.ndarray:
    return np.zeros((n, 6))


def _step(n: int) -> np.ndarray:
    return np.where(np.arange(n)[:, None] > 0, STEP, 0)


def _drift(n: int) -> np.ndarray:
    return np.linspace(0, 1, n)[:, None] * DRIFT


CASES = {
    "single shell, step": (single_shell, _step),
    "single shell, still": (single_shell, _still),
    "three shells, step": (lambda: shells(in_blocks=False), _step),
    "three shells, still": (lambda: shells(in_blocks=False), _still),
    "shells in blocks, drift": (lambda: shells(in_blocks=True), _drift),
    "dsi101, step": (lambda: lattice("dsi101"), _step),
    "dsi101, still": (lambda: lattice("dsi101"), _still),
}


def simulate(case: str, resolution: float, seed: int = 3) -> tuple[DWI, Volume, np.ndarray, np.ndarray]:
    """The series, a rough brain mask, the true transforms (n, 4, 4) and brain points (m, 3) at the b=0."""
    make_table, move = CASES[case]
    table = make_table()
    settings = PhantomSettings(resolution=resolution, moved=0.0, max_motion=0.0, distortion=0.0, seed=seed)
    streams = np.random.default_rng(seed).spawn(3)
    head = make_head(streams[0])
    session: Session = plan_session(head, table, settings, streams[1])
    motion = rigid_matrix(move(len(table[0])), head.centre)
    session = replace(session, poses=motion @ session.poses[0])
    tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, resolution / 2))
    images = [session.acquire(tissue, v) for v in range(len(session.bvals))]
    points = head.brain_points(4)
    points = points @ session.poses[0, :3, :3].T + session.poses[0, :3, 3]
    mask = _mask(session.grid, points)
    sigma = float(images[0][mask.numpy() > 0.5].mean() / settings.snr)
    data = torch.from_numpy(np.stack([add_noise(image, sigma, streams[2]) for image in images]).astype(np.float32))
    none = np.zeros(len(images), int)
    dwi = DWI(data, session.grid, session.bvals, session.bvecs, none, none)
    return dwi, mask, session.poses @ np.linalg.inv(session.poses[0]), points


def _mask(grid: Grid, points: np.ndarray) -> Volume:
    """Voxels within 6 mm of brain points, as rough as the pipeline's own mask."""
    from scipy.ndimage import distance_transform_edt

    brain = np.zeros(grid.shape, bool)
    index = np.rint(grid.to_voxels(points)).astype(int)
    index = index[((index >= 0) & (index < grid.shape)).all(1)]
    brain[tuple(index.T)] = True
    near = distance_transform_edt(~brain, sampling=grid.voxel_sizes) <= 6
    return Volume(torch.from_numpy(near.astype(np.float32)), grid)


def errors(found: np.ndarray, true: np.ndarray, is_b0: np.ndarray, points: np.ndarray) -> tuple[float, float]:
    """Mean displacement (mm) of diffusion-weighted volumes relative to the b=0, and by the offset that they share."""
    left = np.linalg.inv(true) @ (found @ np.linalg.inv(found[0]))
    left = left[~is_b0]
    sample, identity = points[::50], np.eye(4)[None]
    shared = mean_rigid(left)[None]
    return (
        float(point_displacement(left, np.tile(identity, (len(left), 1, 1)), sample).mean()),
        float(point_displacement(shared, identity, sample).mean()),
    )


def main() -> None:
    """One Markdown row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the simulated series")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all by default")
    parser.add_argument("--resolution", type=float, default=3.0, metavar="MM")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print("| case | diffusion against b=0, mm | shared offset, mm | CPU s |\n|---|---|---|---|")
    for case in options.case or CASES:
        path = options.out / f"{case.replace(' ', '_').replace(',', '')}_{options.resolution:g}.pt"
        if not path.exists():
            torch.save(simulate(case, options.resolution), path)
        dwi, mask, true, points = torch.load(path, weights_only=False)
        start = time.process_time()
        found = estimate_motion(dwi, mask, MotionSettings())
        seconds = time.process_time() - start
        error, shared = errors(found.transforms, true, dwi.is_b0, points)
        print(f"| {case} | {error:.3f} | {shared:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
