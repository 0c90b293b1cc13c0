"""Errors, time and memory of SHORELine on phantoms: `python benchmarks/shoreline.py OUT [CASE ...] [--peers]`.

Builds each phantom (2.5 mm, without susceptibility distortion, as published simulations) if OUT/CASE is not there, and
prints one Markdown row per case: RMSE over b > 100 and three axes less one common rigid offset, mean displacement of
brain points, its mean by b-value, the error of eddy currents, lost slices found, CPU time and peak memory.
With --peers, the seconds that QSIPrep's recipe takes for one volume:
antsRegistration of antspyx with QSIPrep's settings and with 100x60 iterations, on the same volume and prediction.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CASES = {
    "dsi257 15 % moved": ["--moved", "0.15"],
    "dsi257 50 % moved": ["--moved", "0.5"],
    "hasc55 50 % moved": ["--scheme", "hasc55", "--moved", "0.5"],
    "multishell 30 % moved": ["--scheme", "multishell", "--moved", "0.3"],
    "dsi257 eddy currents 2 mm, 30 % moved": ["--moved", "0.3", "--eddy", "2"],
    "dsi257 no motion": ["--moved", "0", "--max-motion", "0"],
    "dsi257 15 % moved, jitter 0.1 mm": ["--moved", "0.15", "--jitter", "0.1"],
    "dsi257 15 % moved, SNR 10": ["--moved", "0.15", "--snr", "10"],
    "dsi257 15 % moved, 1 % of slices lost": ["--moved", "0.15", "--dropout", "0.01"],
    "dsi257 15 % moved, distortion 5 mm": ["--moved", "0.15", "--distortion", "5"],
}


def measure(folder: Path) -> None:
    """One row, in a process of its own so that memory is its own."""
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.settings import Settings
    from dsiprep.stages.acquisition import conform
    from dsiprep.stages.motion import estimate_motion

    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    truth = json.loads((folder / "truth" / "truth.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    found = estimate_motion(acquired.dwi, acquired.mask, settings.motion, acquired.blips[0].pe, acquired.multiband)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    poses = np.asarray(truth["head_to_scanner"])
    points = acquired.mask.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::200])
    row = errors(found.transforms, poses @ np.linalg.inv(poses[0]), acquired.dwi.bvals, points)
    row |= eddy_error(found.eddy, poses @ np.linalg.inv(poses[0]), truth, points)
    true = {(v, k) for v, k, _ in truth["lost_slices"]}
    lost = {(int(v), int(k)) for v, k in np.argwhere(found.lost)}
    row["lost slices"] = f"{len(lost & true)} of {len(true)}, {len(lost - true)} wrong"
    row["CPU s"] = f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f}"
    row["wall s"] = f"{wall:.0f}"
    series = acquired.dwi.data.numel() * 4 / 2**30
    row["memory, of the series"] = f"{(after.ru_maxrss / 2**20) / series:.1f}"
    print(json.dumps(row))


def errors(found: np.ndarray, true: np.ndarray, bvals: np.ndarray, points: np.ndarray) -> dict[str, str]:
    """Less the rigid offset that the diffusion-weighted volumes have in common."""
    from dsiprep.ops.affine import mean_rigid, point_displacement, rigid_parameters

    weighted = bvals > 100
    left = np.linalg.inv(true)[weighted] @ found[weighted]
    left = left @ np.linalg.inv(mean_rigid(left))
    parameters = rigid_parameters(left, points.mean(axis=0))
    away = point_displacement(left, np.tile(np.eye(4), (len(left), 1, 1)), points).mean(axis=1)
    thirds = np.ceil(3 * bvals[weighted] / bvals.max())
    return {
        "rotation deg": f"{np.rad2deg(np.sqrt((parameters[:, :3] ** 2).mean())):.3f}",
        "translation mm": f"{np.sqrt((parameters[:, 3:] ** 2).mean()):.3f}",
        "displacement mm": f"{away.mean():.3f}",
        "by thirds of b, mm": " / ".join(f"{away[thirds == t].mean():.3f}" for t in (1, 2, 3) if (thirds == t).any()),
    }


def eddy_error(eddy: object, poses: np.ndarray, truth: dict, points: np.ndarray) -> dict[str, str]:
    """Mean absolute difference from the true displacement, over brain and diffusion-weighted volumes."""
    from dsiprep.data.transform import EddyCurrents
    from dsiprep.phantom.scan import eddy_basis

    assert isinstance(eddy, EddyCurrents)
    weighted = np.flatnonzero(np.asarray(truth["bvals"]) > 100)
    wrong, size = [], []
    for volume in weighted:
        at = points @ poses[volume, :3, :3].T + poses[volume, :3, 3]
        true = eddy_basis(at) @ np.asarray(truth["eddy_mm"][volume])
        wrong.append(np.abs(eddy.displacement(volume, at) @ eddy.axes[:, eddy.along] - true).mean())
        size.append(np.abs(true).mean())
    return {"eddy currents mm": f"{np.mean(wrong):.3f} of {np.mean(size):.3f}"}


def peers(folder: Path) -> None:
    """Seconds for one volume by antsRegistration."""
    import ants
    from ants.internal import get_lib_fn

    image = ants.image_read(str(next((folder / "bids").rglob("*_dwi.nii.gz"))))
    moving, fixed = (ants.slice_image(image, axis=3, idx=v) for v in (5, 6))
    for name, steps in (("QSIPrep's settings", "[1000x1000,1e-8,20]"), ("100x60 iterations", "[100x60,1e-8,20]")):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            get_lib_fn("antsRegistration")(
                ["-d", "3", "-o", f"{out}/x", "-t", "Rigid[0.2]", "-c", steps, "-f", "2x1", "-s", "1x0vox", "-u", "0",
                 "-m", f"Mattes[{ants.get_pointer_string(fixed)},{ants.get_pointer_string(moving)},1,48,Random,0.5]"]
            )  # fmt: skip
            print(f"| antsRegistration, {name} | {time.perf_counter() - start:.1f} s a volume |", flush=True)


def main(out: Path, names: list[str], beside: bool) -> None:
    """All rows."""
    from dsiprep.tools import main as tools

    first = True
    for name in names or list(CASES):
        folder = out / name.replace(" ", "_").replace("%", "pc").replace(",", "")
        if not (folder / "truth" / "truth.json").is_file():
            tools(["phantom", str(folder), "--no-ideal", "--distortion", "0", *CASES[name]])
        found = subprocess.run([sys.executable, __file__, "--measure", str(folder)], capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(found.stderr)
        row = json.loads(found.stdout.strip().splitlines()[-1])
        if first:
            print("| phantom | " + " | ".join(row) + " |\n|" + "---|" * (len(row) + 1))
        print(f"| {name} | " + " | ".join(row.values()) + " |", flush=True)
        first = False
    if beside:
        peers(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]).resolve(), [a for a in sys.argv[2:] if a != "--peers"], "--peers" in sys.argv)
