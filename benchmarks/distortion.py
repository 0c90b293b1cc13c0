"""Errors, time and memory of blip-up/blip-down correction beside its peers: `python benchmarks/distortion.py OUT`.

Simulates a pair of b=0 images with `dsiprep.phantom`, which shares nothing with the correction, and gives both files to
`dsiprep-tools drbuddi` and, where `--peers` names a folder with their programs, to `pyhysco` and `unpile`. Each runs in
a process of its own; one Markdown table is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.phantom.head import Head, make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import READOUT_TIME, Source, add_noise, scan
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import make_tissue

SHAPES = {2.0: (96, 112, 80), 1.5: (140, 140, 96), 3.0: (64, 75, 54)}


def simulate(out: Path, voxel: float, largest: float, degrees: float, mm: float, snr: float, seed: int) -> None:
    """A pair (up.nii.gz, down.nii.gz) and its truth: field in mm, image and brain as blip-up has them."""
    rng = np.random.default_rng(seed)
    head = make_head(rng)
    affine = np.diag([-voxel, voxel, voxel, 1.0])
    shape = SHAPES[voxel]
    affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    tissue = make_tissue(head, head.box(voxel * np.array(shape) + 40, voxel / 2))
    field, field_grid = make_field(head, largest, voxel * READOUT_TIME)
    source = Source(tissue.signal(0.0, np.zeros(3)), tissue.grid, field, field_grid)
    pose = moved_head(head, degrees, mm, rng)
    up, down = PhaseEncoding(1, 1, READOUT_TIME), PhaseEncoding(1, -1, READOUT_TIME)
    truth = scan(source, grid, replace(up, readout_time=0.0), np.eye(4))
    brain, mm_field = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    for rows, points in slabs(grid):
        inside = interpolate(head.atlas["brain"], head.atlas_grid, head.to_template(points)) > 0.5
        brain[rows] = inside.reshape(brain[rows].shape)
        mm_field[rows] = interpolate(field, field_grid, points).reshape(brain[rows].shape) * voxel * READOUT_TIME
    sigma = float(truth[brain > 0].mean() / snr)
    out.mkdir(parents=True, exist_ok=True)
    pair = {"up": scan(source, grid, up, np.eye(4)), "down": scan(source, grid, down, pose)}
    noisy = {name: add_noise(image, sigma, rng) for name, image in pair.items()}
    for name, image in {**noisy, "truth": truth, "brain": brain, "field_mm": mm_field}.items():
        nib.save(nib.Nifti1Image(image, affine), out / f"{name}.nii.gz")


def moved_head(head: Head, degrees: float, mm: float, rng: np.random.Generator) -> np.ndarray:
    """A turn and a shift of these sizes in random directions, about the middle of the brain."""
    axis, shift = rng.normal(size=3), rng.normal(size=3)
    x, y, z = np.deg2rad(degrees) * axis / np.linalg.norm(axis)
    pose = np.eye(4)
    pose[:3, :3] = np.linalg.qr(np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))[0]
    pose[:3, :3] *= np.sign(np.diag(pose[:3, :3]))
    pose[:3, 3] = head.centre + mm * shift / np.linalg.norm(shift) - pose[:3, :3] @ head.centre
    return pose


def dsiprep_command(out: Path, peers: Path | None) -> list[str]:
    """The tool as a user runs it; like the others it finds the brain by itself or is told."""
    return [sys.executable, "-m", "dsiprep.cli.tools", "drbuddi", "--up", str(out / "up.nii.gz"), "--down",
            str(out / "down.nii.gz"), "--pe-dir", "j", "--readout-time", str(READOUT_TIME),
            "-o", str(out / "dsiprep")]  # fmt: skip


def unpile_command(out: Path, peers: Path | None) -> list[str]:
    """With pose and gain, the settings that were best here."""
    return [str((peers or Path()) / "unpile"), "--threads", "2", "fit", "--epi", str(out / "up.nii.gz"),
            "--reverse-epi", str(out / "down.nii.gz"), "--mask", str(out / "brain.nii.gz"), "--blip-pose",
            "--blip-gain", "--lam-mm", "1", "--pe-dir", "j", "--total-readout-time", str(READOUT_TIME),
            "--out", str(out / "unpile")]  # fmt: skip


def pyhysco_command(out: Path, peers: Path | None) -> list[str]:
    """Its defaults."""
    return [str((peers or Path()) / "pyhysco"), str(out / "up.nii.gz"), str(out / "down.nii.gz"), "2",
            "--output_dir", str(out / "pyhysco") + "/"]  # fmt: skip


ENGINES: dict[str, Callable[[Path, Path | None], list[str]]] = {
    "dsiprep": dsiprep_command,
    "pyhysco": pyhysco_command,
    "unpile": unpile_command,
}
FIELDS = {"dsiprep": "fieldmap_hz", "unpile": "field_hz", "pyhysco": "EstFieldMap"}
CORRECTED = {"dsiprep": "dwiref", "unpile": "corrected", "pyhysco": "Corrected"}


def run(engine: str, out: Path, peers: Path | None) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak memory in GB of one program."""
    shutil.rmtree(out / engine, ignore_errors=True)
    (out / engine).mkdir()
    start = time.perf_counter()
    with (out / f"{engine}.log").open("w") as log:
        process = subprocess.Popen(ENGINES[engine](out, peers), stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{engine} failed; see {out / engine}.log")
    return used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss / 2**20


def scores(engine: str, out: Path) -> list[float]:
    """Mean and 95th percentile of the error in the brain in mm, the same less a constant, correlation, least slope."""
    truth, image, brain = (np.asarray(nib.load(out / f"{n}.nii.gz").dataobj) for n in ("field_mm", "truth", "brain"))
    voxel = float(nib.load(out / "up.nii.gz").header.get_zooms()[1])
    found = field_in_mm(engine, out, voxel)
    corrected = _mean(out / engine, CORRECTED[engine])
    error = (found - truth)[brain > 0]
    free = np.abs(error - np.median(error))
    slope = 1 - np.abs(np.diff(found, axis=1)).max() / voxel
    match = np.corrcoef(corrected[brain > 0], image[brain > 0])[0, 1]
    return [np.abs(error).mean(), np.percentile(np.abs(error), 95), free.mean(), np.percentile(free, 95), match, slope]


def field_in_mm(engine: str, out: Path, voxel: float) -> np.ndarray:
    """Displacement in blip-up along +j in mm. PyHySCO gives it in mm at the faces of voxels, the others in Hz."""
    found = _mean(out / engine, FIELDS[engine])
    return (found[:, 1:] + found[:, :-1]) / 2 if engine == "pyhysco" else found * voxel * READOUT_TIME


def _mean(folder: Path, name: str) -> np.ndarray:
    """Of all images with this in their name: each blip may have one."""
    images = [np.asarray(nib.load(path).dataobj, np.float32) for path in folder.glob(f"*{name}*.nii*")]
    return np.mean(images, axis=0)


def main() -> None:
    """Simulate, run, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--voxel", type=float, default=2.0, choices=tuple(SHAPES))
    parser.add_argument("--largest", type=float, default=8.0, help="largest displacement in the brain, mm")
    parser.add_argument("--degrees", type=float, default=0.5)
    parser.add_argument("--mm", type=float, default=1.0)
    parser.add_argument("--snr", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", type=Path, help="folder with the programs pyhysco and unpile")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=tuple(ENGINES))
    o = parser.parse_args()
    if not (o.out / "up.nii.gz").exists():  # apart: a child's peak memory counts what its parent held when it was born
        case = (o.out, o.voxel, o.largest, o.degrees, o.mm, o.snr, o.seed)
        child = multiprocessing.get_context("spawn").Process(target=simulate, args=case)
        child.start()
        child.join()
    print("| program | CPU s | wall s | GB | mean mm | p95 mm | mean, free | p95, free | r to truth | least slope |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for engine in o.engines:
        if engine == "dsiprep" or o.peers:
            cost = run(engine, o.out, o.peers)
            print(f"| {engine} | " + " | ".join(f"{v:.3g}" for v in (*cost, *scores(engine, o.out))) + " |", flush=True)


if __name__ == "__main__":
    main()
