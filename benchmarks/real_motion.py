"""What motion correction does to real series: `python benchmarks/real_motion.py BIDS [PARTICIPANT ...]`.

For every series of one phase encoding, in the brain: neighbouring-DWI correlation as cs_dmri measures it, and
sharpness, the root mean square gradient of the mean diffusion-weighted volume over its mean intensity. Interpolation
alone smooths, which raises the first and lowers the second, so besides the raw series there is one that was only
interpolated, and as much as can be: all volumes moved by the same half voxel along each axis.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.io.bids import find_units, read_unit
from dsiprep.ops.affine import rotate_bvecs
from dsiprep.ops.filter import gradient
from dsiprep.ops.warp import warp_volume
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


def main(bids: Path, participants: list[str]) -> None:
    """One row per series."""
    settings = Settings()
    print("| series | volumes | NDC raw | interpolated | corrected | sharpness raw | interpolated | corrected |")
    print("|---|---|---|---|---|---|---|---|")
    for unit in find_units(bids, settings, participants=participants):
        acquired = conform(read_unit(unit, settings), settings.acquisition)
        for number, blip in enumerate(acquired.blips):
            chosen = acquired.dwi.blip == number
            if (chosen & ~acquired.dwi.is_b0).sum() < 6:
                continue
            dwi = acquired.dwi.select(chosen)
            moved = estimate_motion(dwi, acquired.mask, settings.motion, blip.pe, acquired.multiband)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
