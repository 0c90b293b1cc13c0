"""Lost signal found, and poses of the volumes that lost it: `python benchmarks/dropout.py OUT [WORD ...]`.

Builds each phantom (4 mm, SNR 25, a fifth of the volumes moved, no distortion) if OUT/SCHEME is not there, takes signal
out of slices of its diffusion-weighted volumes and prints one Markdown row per scheme, pattern, loss and fraction of
volumes: lost slices found, intact slices flagged, and the mean displacement (mm, over the brain) of the poses from the
true ones relative to the median pose of the b=0 volumes, of the volumes with lost slices and of the others, beside that
of the same volumes without loss. Slices count that hold at least 30 voxels of the brain mask in the pose of the volume;
slices are judged on their own, not in the groups that the phantom excites together. WORDs select rows whose name holds
them all.

At the noise floor a slice that lost its signal looks like one that had none. Lost slices whose mean magnitude in the
brain fell by less than 12 % are counted apart, in brackets: found of those.

Noise is that of the acquisition: the magnitude |S + n| times the remaining fraction f, plus complex noise of variance
(1 - f²), has the distribution of |f S + n|, as magnitudes do not depend on the phase.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsiprep.cli.tools import main as tools
from dsiprep.data.results import Acquired, Motion
from dsiprep.io.bids import find_units, read_unit
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.motion.poses import median_pose
from dsiprep.settings import Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.motion import estimate_motion

SCHEMES = ("dsi101", "multishell")
PATTERNS = ("interleave", "every third", "six neighbours", "whole volume")
LOSSES = (0.3, 0.6, 0.9)
FRACTIONS = (0.04, 0.08, 0.2)
SNR = 25.0
MIN_VOXELS = 30
MIN_LOSS = 0.12


def load(folder: Path) -> tuple[Acquired, np.ndarray]:
    """The phantom in `folder` as the motion stage receives it, and its true poses."""
    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    poses = np.asarray(json.loads((folder / "truth" / "truth.json").read_text())["head_to_scanner"])
    centre = acquired.mask.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)).mean(axis=0)
    return acquired, poses @ np.linalg.inv(median_pose(poses[acquired.dwi.is_b0], centre))


def lost_slices(dwi_b0: np.ndarray, slices: int, pattern: str, fraction: float, seed: int = 1) -> np.ndarray:
    """Slices that lose signal, (n, slices) bool: the pattern, at random offsets, in a fraction of the DW volumes."""
    rng = np.random.default_rng(seed)
    lost = np.zeros((len(dwi_b0), slices), bool)
    weighted = np.flatnonzero(~dwi_b0)
    for volume in rng.choice(weighted, round(fraction * len(weighted)), replace=False):
        if pattern == "six neighbours":
            first = int(rng.integers(slices // 4, 3 * slices // 4 - 6))
            lost[volume, first : first + 6] = True
        else:
            step = {"interleave": 2, "every third": 3, "whole volume": 1}[pattern]
            lost[volume, int(rng.integers(step)) :: step] = True
    return lost


def take_out(acquired: Acquired, lost: np.ndarray, loss: float, seed: int = 2) -> Acquired:
    """The series with a fraction `loss` of the signal of the lost slices, but not of their noise, gone."""
    rng, data = np.random.default_rng(seed), acquired.dwi.data.clone()
    b0 = data[torch.as_tensor(acquired.dwi.is_b0)].mean(0)
    sigma = float(b0[acquired.mask.data > 0.5].mean()) / SNR * np.sqrt(1 - (1 - loss) ** 2)
    for volume, number in np.argwhere(lost):
        kept = (1 - loss) * data[volume, :, :, number]
        real, imaginary = (torch.from_numpy(rng.normal(0, sigma, kept.shape)).float() for _ in range(2))
        data[volume, :, :, number] = torch.hypot(kept + real, imaginary)
    return replace(acquired, dwi=replace(acquired.dwi, data=data))


def visible_loss(before: Acquired, after: Acquired, lost: np.ndarray) -> np.ndarray:
    """Lost slices whose mean magnitude in the brain mask fell by at least `MIN_LOSS`, (n, slices) bool."""
    inside = before.mask.data > 0.5
    first, second = ((acquired.dwi.data * inside).sum((1, 2)).numpy() for acquired in (before, after))
    return lost & (second <= (1 - MIN_LOSS) * first)


def judged_slices(acquired: Acquired, poses: np.ndarray) -> np.ndarray:
    """Slices with enough brain in the true pose of each volume, (n, slices) bool."""
    grid = acquired.mask.grid
    points = grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5))
    rows = (np.linalg.inv(grid.affine) @ poses)[:, 2]
    slices = [np.rint(points @ row[:3] + row[3]).astype(int) for row in rows]
    return (
        np.array([np.bincount(s[(s >= 0) & (s < grid.shape[2])], minlength=grid.shape[2]) for s in slices])
        >= MIN_VOXELS
    )


def displacement(found: Motion, poses: np.ndarray, acquired: Acquired) -> np.ndarray:
    """Mean displacement of the brain (mm) by the error of each pose, (n,)."""
    points = acquired.mask.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::50])
    return point_displacement(found.transforms, poses, points).mean(axis=1)


def run(acquired: Acquired) -> tuple[Motion, float]:
    """Motion of a series and the seconds of CPU it took."""
    start = time.process_time()
    found = estimate_motion(acquired.dwi, acquired.mask, Settings().motion, acquired.blips[0].pe)
    return found, time.process_time() - start


def cells(
    found: Motion,
    seconds: float,
    acquired: Acquired,
    poses: np.ndarray,
    lost: np.ndarray,
    visible: np.ndarray,
    without: np.ndarray,
) -> str:
    """The cells of one row; `without` are the displacements (mm) of the series without loss."""
    judged = judged_slices(acquired, poses) & ~acquired.dwi.is_b0[:, None]
    assert found.outlier_slices is not None
    flagged, away = found.outlier_slices, displacement(found, poses, acquired)
    hit, affected, others = lost.any(axis=1), lost & judged, judged & ~lost
    intact = ~hit & ~acquired.dwi.is_b0
    clear, faint = affected & visible, affected & ~visible
    row = [
        f"{(flagged & clear).sum()} of {clear.sum()} ({(flagged & faint).sum()} of {faint.sum()})",
        f"{100 * (flagged & others).sum() / others.sum():.3f} %",
    ]
    if hit.any():
        before, after = without[hit], away[hit]
        row.append(f"{after.mean():.2f} / {after.max():.2f} ({before.mean():.2f} / {before.max():.2f})")
    else:
        row.append("-")
    return " | ".join([*row, f"{away[intact].mean():.2f} ({without[intact].mean():.2f})", f"{seconds:.0f}"])


def main(out: Path, words: list[str]) -> None:
    """All rows whose name holds every one of `words`."""
    print("| series | found (noise floor) | intact flagged | mm, mean / largest (without loss) | mm, others | CPU s |")
    print("|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        names = {
            f"{scheme} {pattern} {round(100 * loss)} % lost in {round(100 * fraction)} % of volumes": (
                pattern,
                loss,
                fraction,
            )
            for pattern in PATTERNS
            for loss in LOSSES
            for fraction in FRACTIONS
        }
        wanted = {name: case for name, case in names.items() if all(word in name for word in words)}
        if not wanted:
            continue
        folder = out / scheme
        if not (folder / "truth" / "truth.json").is_file():
            options = [
                "--no-ideal",
                "--distortion",
                "0",
                "--resolution",
                "4",
                "--t1w-resolution",
                "4",
                "--moved",
                "0.2",
            ]
            tools(["phantom", str(folder), "--scheme", scheme, "--snr", str(SNR), *options])
        acquired, poses = load(folder)
        none = np.zeros((len(poses), acquired.dwi.grid.shape[2]), bool)
        found, seconds = run(acquired)
        without = displacement(found, poses, acquired)
        print(f"| {scheme} without loss | {cells(found, seconds, acquired, poses, none, none, without)} |", flush=True)
        for name, (pattern, loss, fraction) in wanted.items():
            lost = lost_slices(acquired.dwi.is_b0, none.shape[1], pattern, fraction)
            reduced = take_out(acquired, lost, loss)
            found, seconds = run(reduced)
            visible = visible_loss(acquired, reduced, lost)
            print(f"| {name} | {cells(found, seconds, acquired, poses, lost, visible, without)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
