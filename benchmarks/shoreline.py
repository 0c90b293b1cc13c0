"""Errors, time and memory of SHORELine on phantoms: `python benchmarks/shoreline.py OUT [CASE ...] [--floor]`.

Builds each phantom (2.5 mm, without susceptibility distortion, as published simulations) if OUT/CASE is not there, and
prints one Markdown row per case: RMSE over b > 100 and three axes less one common rigid offset, mean displacement of
brain points, the same against b=0 without removing an offset, its mean by b-value, the error of eddy currents, lost
slices found, CPU time and peak memory.

With --floor, a second row: the same volumes registered one by one to their noise-free images, as good as predictions
could ever be. With --scaling, the cases of `SCALING` in place of `CASES` (dsi257 at 2.5 mm is the
first of those). `shoreline_peers.py` times QSIPrep's recipe.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

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
SCALING = {
    "dsi101 2.5 mm": ["--scheme", "dsi101"],
    "dsi515 2.5 mm": ["--scheme", "dsi515"],
    "dsi101 2 mm": ["--scheme", "dsi101", "--resolution", "2"],
    "dsi101 1.5 mm": ["--scheme", "dsi101", "--resolution", "1.5"],
}


def measure(folder: Path) -> None:
    """One row, in a process of its own so that memory is its own."""
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.settings import Settings
    from dsiprep.stages.acquisition import conform
    from dsiprep.stages.motion import estimate_motion

    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = estimate_motion(acquired.dwi, acquired.mask, settings.motion, acquired.blips[0].pe, acquired.multiband)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    truth = json.loads((folder / "truth" / "truth.json").read_text())
    poses = np.asarray(truth["head_to_scanner"])
    poses = poses @ np.linalg.inv(poses[0])
    points = acquired.mask.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::200])
    row = errors(found.transforms, poses, acquired.dwi.bvals, points) | eddy_error(found.eddy, poses, truth, points)
    true = {(v, k) for v, k, _ in truth["lost_slices"]}
    lost = {(int(v), int(k)) for v, k in np.argwhere(found.outlier_slices)}
    row["lost slices"] = f"{len(lost & true)} of {len(true)}, {len(lost - true)} wrong"
    row["CPU s"] = f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f}"
    row["wall s"] = f"{wall:.0f}"
    peak, series = peak_memory(), acquired.dwi.data.numel() * 4
    row["brain voxels"] = f"{int((acquired.mask.data > 0.5).sum())}"
    row["peak GB"] = f"{peak / 1e9:.2f}"
    row["of the series"] = f"{peak / series:.1f}"
    print(json.dumps(row))


def peak_memory() -> int:
    """Bytes of the process at most, since `clear_refs` was written; Python and its libraries are in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def errors(found: np.ndarray, true: np.ndarray, bvals: np.ndarray, points: np.ndarray) -> dict[str, str]:
    """Less the rigid offset that the diffusion-weighted volumes have in common, and in the frame of the b=0 volumes."""
    from dsiprep.ops.image.affine import mean_rigid, point_displacement, rigid_parameters

    weighted = bvals > 100
    left = np.linalg.inv(true) @ found
    against_b0 = left[weighted] @ np.linalg.inv(mean_rigid(left[~weighted]))
    left = left[weighted] @ np.linalg.inv(mean_rigid(left[weighted]))
    parameters = rigid_parameters(left, points.mean(axis=0))
    identity = np.tile(np.eye(4), (len(left), 1, 1))
    away = point_displacement(left, identity, points).mean(axis=1)
    thirds = np.ceil(3 * bvals[weighted] / bvals.max())
    return {
        "rotation deg": f"{np.rad2deg(np.sqrt((parameters[:, :3] ** 2).mean())):.3f}",
        "translation mm": f"{np.sqrt((parameters[:, 3:] ** 2).mean()):.3f}",
        "displacement mm": f"{away.mean():.3f}",
        "against b=0, mm": f"{point_displacement(against_b0, identity, points).mean():.3f}",
        "by thirds of b, mm": " / ".join(f"{away[thirds == t].mean():.3f}" for t in (1, 2, 3) if (thirds == t).any()),
    }


def eddy_error(eddy: object, poses: np.ndarray, truth: dict, points: np.ndarray) -> dict[str, str]:
    """Mean absolute difference from the true displacement, over brain and diffusion-weighted volumes."""
    from dsiprep.data.transform import EddyCurrents
    from dsiprep.phantom.scanner import eddy_basis

    assert isinstance(eddy, EddyCurrents)
    weighted = np.flatnonzero(np.asarray(truth["bvals"]) > 100)
    wrong, size = [], []
    for volume in weighted:
        at = points @ poses[volume, :3, :3].T + poses[volume, :3, 3]
        true = eddy_basis(at) @ np.asarray(truth["eddy_mm"][volume])
        wrong.append(np.abs(eddy.displacement(volume, at) @ eddy.axes[:, eddy.along] - true).mean())
        size.append(np.abs(true).mean())
    return {"eddy currents mm": f"{np.mean(wrong):.3f} of {np.mean(size):.3f}"}


def floor(folder: Path) -> None:
    """The row of volumes registered to what they would be without noise, in the pose of the first volume."""
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.ops.image.point_set import point_set
    from dsiprep.ops.motion.gauss_newton import MovingVolumes, align
    from dsiprep.settings import Settings
    from dsiprep.stages.acquisition import conform

    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    dwi, points = acquired.dwi, point_set(acquired.mask.data, acquired.dwi.grid)
    inside = acquired.mask.data > 0.5
    truth = json.loads((folder / "truth" / "truth.json").read_text())
    poses = np.asarray(truth["head_to_scanner"])
    poses = poses @ np.linalg.inv(poses[0])
    found = poses.copy()
    for volume, image in noise_free(truth, dwi.bvals):
        some = slice(volume, volume + 1)
        moving = MovingVolumes(dwi.data[some], dwi.grid)
        found[some] = align(moving, points, image[inside][None], poses[some], steps=12).transforms
    few = dwi.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::200])
    print(json.dumps(errors(found, poses, dwi.bvals, few)))


def noise_free(truth: dict, bvals: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    """Every diffusion-weighted volume's number and image, from the settings that the phantom was made with."""
    from dsiprep.phantom.head import make_head
    from dsiprep.phantom.scanner import FIELD_OF_VIEW
    from dsiprep.phantom.schemes import load_scheme
    from dsiprep.phantom.session import plan_session
    from dsiprep.phantom.settings import PhantomSettings
    from dsiprep.phantom.signal import make_tissue

    settings = PhantomSettings(**truth["settings"])
    streams = np.random.default_rng(settings.seed).spawn(4)
    head = make_head(streams[0])
    session = plan_session(head, load_scheme(settings.scheme), settings, streams[1])
    tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, settings.resolution / 2))
    gradients = session.head_bvecs @ session.poses[0, :3, :3].T
    for volume in np.flatnonzero(bvals > 100):
        yield int(volume), torch.as_tensor(session.ideal(tissue, bvals[volume], gradients[volume]))


def main(out: Path, names: list[str], flags: set[str]) -> None:
    """All rows."""
    from dsiprep.cli.tools import main as tools

    cases, header = (SCALING if "--scaling" in flags else CASES), ""
    for name in names or list(cases):
        folder = out / name.replace(" ", "_").replace("%", "pc").replace(",", "")
        if not (folder / "truth" / "truth.json").is_file():
            tools(["phantom", str(folder), "--no-ideal", "--distortion", "0", *cases[name]])
        for flag, row_name in (("--measure", name), ("--lowest", "its floor")):
            if flag == "--lowest" and "--floor" not in flags:
                continue
            found = subprocess.run([sys.executable, __file__, flag, str(folder)], capture_output=True, text=True)
            if found.returncode:
                raise SystemExit(found.stderr)
            row = json.loads(found.stdout.strip().splitlines()[-1])
            if not header:
                header = "| phantom | " + " | ".join(row) + " |\n|" + "---|" * (len(row) + 1)
                print(header)
            print(f"| {row_name} | " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] in ("--measure", "--lowest"):
        {"--measure": measure, "--lowest": floor}[sys.argv[1]](Path(sys.argv[2]))
    else:
        words = sys.argv[2:]
        main(Path(sys.argv[1]).resolve(), [w for w in words if w[:2] != "--"], {w for w in words if w[:2] == "--"})
