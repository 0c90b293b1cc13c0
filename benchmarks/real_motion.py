"""What motion correction does to real series: `python benchmarks/real_motion.py BIDS [PARTICIPANT ...]`.

For every series of one phase encoding, in the brain: neighbouring-DWI correlation as cs_dmri measures it, and
sharpness, the root mean square gradient of the mean diffusion-weighted volume over its mean intensity. Interpolation
alone smooths, which raises the first and lowers the second, so besides the raw series there is one that was only
interpolated, and as much as can be: all volumes moved by the same half voxel along each axis. Then, for each
person, how eddy currents found in one series go with those found in the first, less what volumes share, and for each
two series of the same directions how far poses repeat: a head does not move by the gradient, or by the clock beyond
a slow path, which is taken out of each (a cubic in volume number) for the second of the two correlations.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.results import Motion
from dsiprep.io.bids import find_units, read_unit
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.settings import Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.motion import estimate_motion


def measures(data: np.ndarray, dwi: DWI, bvecs: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Neighbouring-DWI correlation and sharpness (1/mm) of volumes (n, i, j, k) in the mask."""
    from cs_dmri import GradientTable, qc

    brain = np.ascontiguousarray(data[:, mask].T.astype(np.float32))[:, None, None]
    correlation = qc.neighboring_dwi_correlation(brain, GradientTable(dwi.bvals, bvecs))
    mean = torch.as_tensor(data[~dwi.is_b0].mean(0))
    slopes = gradient(mean[None])[0].numpy()
    steep = np.sqrt(sum((slopes[axis] / size) ** 2 for axis, size in enumerate(dwi.grid.voxel_sizes)))
    return float(correlation), float(np.sqrt((steep[mask] ** 2).mean()) / mean.numpy()[mask].mean())


def played(found: Motion, dwi: DWI, gradients: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Eddy currents (mm along their axis) that other gradients (n, 3) would bring about at world points, (n, m)."""
    assert found.eddy is not None
    strength = np.sqrt(dwi.bvals / dwi.bvals.max())[:, None]
    response = np.linalg.lstsq(strength * dwi.bvecs, found.eddy.coefficients, rcond=None)[0]
    eddy = replace(found.eddy, coefficients=gradients @ response)
    moved = np.stack([eddy.displacement(v, points) for v in range(len(gradients))]) @ eddy.axes[:, eddy.along]
    return moved - moved.mean(axis=0)


def compare(series: dict[str, tuple[Motion, DWI]]) -> None:
    """Eddy currents of each series beside those of the first, for the gradients and the brain of the first."""
    first, dwi = next(iter(series.values()))
    points = first.mask.grid.to_world(np.argwhere(first.mask.numpy() > 0.5)[::200])
    gradients = dwi.bvecs[~dwi.is_b0]
    there = {name: played(found, own, gradients, points) for name, (found, own) in series.items()}
    reference = next(iter(there.values()))
    for name, moved in there.items():
        alike = np.corrcoef(moved.ravel(), reference.ravel())[0, 1]
        print(f"{name}: eddy currents of {np.sqrt((moved**2).mean()):.2f} mm, correlation {alike:.2f}")


def parameters(found: Motion, dwi: DWI, axes: np.ndarray) -> np.ndarray:
    """Rotations (degrees) and translations (mm) along `axes` about the brain's centre, weighted volumes, (n, 6)."""
    centre = found.mask.grid.to_world(np.argwhere(found.mask.numpy() > 0.5)).mean(axis=0)
    poses = rigid_parameters(found.transforms[~dwi.is_b0], centre)
    return np.hstack([np.rad2deg(poses[:, :3] @ axes), poses[:, 3:] @ axes])


def without_path(poses: np.ndarray) -> np.ndarray:
    """Poses (n, 6) less a cubic in volume number."""
    powers = np.vander(np.linspace(-1, 1, len(poses)), 4)
    return poses - powers @ np.linalg.lstsq(powers, poses, rcond=None)[0]


def repeats(series: dict[str, tuple[Motion, DWI]]) -> None:
    """How far poses of two series of the same directions (up to sign) and phase-encoding axis go together."""
    for (name, (found, dwi)), (other, (again, twin)) in itertools.combinations(series.items(), 2):
        assert found.eddy is not None
        assert again.eddy is not None
        alike = len(dwi) == len(twin) and np.abs(np.abs((dwi.bvecs * twin.bvecs).sum(1)) - ~dwi.is_b0).max() < 0.01
        if not alike or abs(dwi.grid.directions[:, found.eddy.along] @ twin.grid.directions[:, again.eddy.along]) < 0.9:
            continue
        print(f"{name} and {other}, along i j k (phase encoding is {'ijk'[found.eddy.along]}):")
        first, second = parameters(found, dwi, dwi.grid.directions), parameters(again, twin, dwi.grid.directions)
        for kind, columns in (("rotation, degrees", slice(0, 3)), ("translation, mm", slice(3, 6))):
            a, b = first[:, columns], second[:, columns]
            rows = {"SD": a.std(0), "of the other": b.std(0), "half the difference": (a - b).std(0) / 2}
            rows |= {"r": correlations(a, b), "r less the path": correlations(without_path(a), without_path(b))}
            print(f"  {kind}: " + "; ".join(f"{n} " + " ".join(f"{x:.2f}" for x in row) for n, row in rows.items()))


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each column of two arrays (n, c), (c,)."""
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True)])


def main(bids: Path, participants: list[str]) -> None:
    """One row per series."""
    settings = Settings()
    print("| series | volumes | NDC raw | interpolated | corrected | sharpness raw | interpolated | corrected |")
    print("|---|---|---|---|---|---|---|---|")
    people: dict[str, dict[str, tuple[Motion, DWI]]] = {}
    for unit in find_units(bids, settings, participants=participants):
        acquired = conform(read_unit(unit, settings), settings.acquisition)
        for number, blip in enumerate(acquired.blips):
            chosen = acquired.dwi.blip == number
            if (chosen & ~acquired.dwi.is_b0).sum() < 6:
                continue
            dwi = acquired.dwi.select(chosen)
            moved = estimate_motion(dwi, acquired.mask, settings.motion, blip.pe, acquired.multiband)
            if moved.eddy is not None:
                people.setdefault(unit.name.split("_")[0], {})[f"{unit.name} {blip.name}"] = (moved, dwi)
            half = np.eye(4)
            half[:3, 3] = dwi.grid.affine[:3, :3] @ np.full(3, 0.5)
            still = np.tile(half, (len(dwi), 1, 1))
            mask = moved.mask.numpy() > 0.5
            rows = [measures(dwi.data.numpy(), dwi, dwi.bvecs, mask)]
            for poses, eddy in ((still, None), (moved.transforms, moved.eddy)):
                out = np.empty(dwi.data.shape, np.float32)
                for v, pose in enumerate(poses):
                    bent = None if eddy is None else eddy.take(np.array([v]))
                    out[v] = warp_volume(dwi.data[v], dwi.grid, dwi.grid, pose, eddy=bent).numpy()
                rows.append(measures(out, dwi, rotate_bvecs(dwi.bvecs, poses), mask))
            cells = [f"{row[kind]:.3f}" for kind in (0, 1) for row in rows]
            print(f"| {unit.name} {blip.name} | {len(dwi)} | " + " | ".join(cells) + " |", flush=True)
    for series in people.values():
        compare(series)
        repeats(series)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
