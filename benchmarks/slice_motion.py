"""Motion within volumes on phantoms: `python benchmarks/slice_motion.py OUT [CASE ...] [--on]`.

Builds each phantom (2.5 mm, interleaved, two slices at a time, without susceptibility distortion) if OUT/CASE is not
there, and prints one Markdown row per case: volumes that move within themselves and how many were given poses by shot,
mean error over the slices of volumes that move and of those that rest, with one pose and with poses by shot, the
correlation of the corrected volumes that move with the ideal image over that of volumes at rest of similar b, and the
CPU time of both stages. With --on, every volume is given poses by shot.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

QUIET = ["--moved", "0", "--distortion", "0", "--resolution", "2.5", "--snr", "22"]
CASES = {
    "dsi101 one in seven moves": ["--scheme", "dsi101", "--moved-within", "0.143", *QUIET],
    "dsi257 one in seven moves": ["--scheme", "dsi257", "--moved-within", "0.143", *QUIET],
    "multishell one in seven moves": ["--scheme", "multishell", "--moved-within", "0.143", *QUIET],
    "dsi101 at rest": ["--scheme", "dsi101", *QUIET],
    "dsi257 at rest": ["--scheme", "dsi257", *QUIET],
    "dsi101 steady 1 mm a volume": ["--scheme", "dsi101", "--steady", "1", *QUIET],
}
SIMILAR = 15  # volumes at rest of the most similar b-values, with which the correlation is compared


def measure(folder: Path, mode: str) -> None:
    """One row, in a process of its own."""
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.ops.image.affine import mean_rigid
    from dsiprep.score.read import read_truth
    from dsiprep.score.slices import slice_errors
    from dsiprep.settings import MotionSettings, Settings
    from dsiprep.stages.acquisition import conform
    from dsiprep.stages.motion import estimate_motion
    from dsiprep.stages.slice_motion import follow_slices

    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    dwi, start = acquired.dwi, time.process_time()
    pe, axis = acquired.blips[0].pe, acquired.slice_axis
    one = estimate_motion(dwi, acquired.mask, settings.motion, pe, acquired.multiband, axis)
    between, start = time.process_time() - start, time.process_time()
    found = follow_slices(dwi, acquired.mask, one, acquired.multiband, MotionSettings(slices=mode))
    within = time.process_time() - start
    assert found.slices is not None
    truth = read_truth(folder / "truth")
    moved, points = truth.moved_within, truth.brain_points()
    rest = ~moved if (~moved).any() else np.ones(len(moved), bool)
    errors = []
    for motion, poses in ((one, one.transforms[:, None]), (found, found.slices.slice_poses)):
        common = mean_rigid((np.linalg.inv(motion.transforms) @ truth.poses)[rest])
        shape = (len(dwi), truth.slice_poses.shape[1], 4, 4)
        errors.append(slice_errors(truth, np.broadcast_to(poses, shape), common, points))
    row = {
        "move within": f"{moved.sum()}",
        "by shot": f"{found.slices.moving.sum()}, {(found.slices.moving & moved).sum()} of them move",
        "slices of moving volumes, mm": _pair([np.nanmean(e[moved]) if moved.any() else np.nan for e in errors]),
        "slices at rest, mm": _pair([np.nanmean(e[~moved]) if (~moved).any() else np.nan for e in errors]),
        "correlation, of that at rest": _correlation(dwi, found, truth, moved),
        "CPU s, one pose + by shot": f"{between:.0f} + {within:.0f}",
    }
    print(json.dumps(row))


def _pair(values: list[float]) -> str:
    return " -> ".join("" if np.isnan(value) else f"{value:.2f}" for value in values)


def _correlation(dwi, motion, truth, moved: np.ndarray) -> str:
    """Mean ratio of the correlation of moving volumes with the ideal image to that of resting ones of similar b."""
    from dsiprep.ops.image.affine import mean_rigid
    from dsiprep.ops.image.epi_resampling import warp_volume
    from dsiprep.ops.motion.slice_samples import volume_in_mean_pose

    if not moved.any() or moved.all() or not (truth.folder / "ideal_dwi.nii.gz").is_file():
        return ""
    ideal, brain = truth.image("ideal_dwi").data, truth.image("ideal_brain_mask").data > 0.5
    common = mean_rigid((np.linalg.inv(motion.transforms) @ truth.poses)[~moved]) @ np.linalg.inv(truth.poses[0])
    correlations = np.full(len(dwi), np.nan)
    for volume in range(len(dwi)):
        image = dwi.data[volume]
        if motion.slices.moving[volume]:
            image = volume_in_mean_pose(dwi.data[volume], dwi.grid, motion, volume, np.eye(4), None)
        warped = warp_volume(image, dwi.grid, dwi.grid, motion.transforms[volume] @ common).numpy()
        correlations[volume] = np.corrcoef(warped[brain], ideal[..., volume][brain])[0, 1]
    resting = np.flatnonzero(~moved)
    ratios = []
    for volume in np.flatnonzero(moved):
        nearest = resting[np.argsort(np.abs(dwi.bvals[resting] - dwi.bvals[volume]), kind="stable")[:SIMILAR]]
        ratios.append(correlations[volume] / correlations[nearest].mean())
    return f"{np.mean(ratios):.3f}"


def main(out: Path, names: list[str], mode: str) -> None:
    """All rows."""
    from dsiprep.cli.tools import main as tools

    header = ""
    for name in names or list(CASES):
        folder = out / name.replace(" ", "_")
        if not (folder / "truth" / "truth.json").is_file():
            tools(["phantom", str(folder), *CASES[name]])
        call = [sys.executable, __file__, "--measure", str(folder), mode]
        found = subprocess.run(call, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(found.stderr)
        row = json.loads(found.stdout.strip().splitlines()[-1])
        if not header:
            header = "| phantom | " + " | ".join(row) + " |\n|" + "---|" * (len(row) + 1)
            print(header)
        print(f"| {name} | " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]), sys.argv[3])
    else:
        words = sys.argv[2:]
        main(Path(sys.argv[1]).resolve(), [w for w in words if w[:2] != "--"], "on" if "--on" in words else "auto")
