"""Distortion field from EPI of a simulator that is not ours: `python benchmarks/trxscan_pair.py OUT`.

The k-space simulator TRXScan (`pip install trxscan`, 0.3.0 measured; optional) scans the phantom's head with both
polarities: per-line phase of the off-resonance field, T2 and T2* decay, Gibbs ringing, and noise. `correct_pair`
estimates the field from both b=0 images. One Markdown table is printed: slope and correlation of the estimated to the
true displacement in the brain, mean and 95th percentile of the error in mm less its median, the same mean where the
displacement exceeds 3 mm, least slope of the point map, and CPU seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.api.blip_pair import correct_pair
from dsiprep.data.grid import Grid
from dsiprep.phantom.head import make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import FIELD_OF_VIEW, READOUT_TIME
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import AMPLITUDE

OVERSAMPLING = 4  # spins per voxel along each in-plane axis
OUTSIDE = ("fluid", "muscle", "fat", "marrow", "bone")


def simulate(out: Path, voxel: float, largest: float, noise: float, seed: int, whole_head: bool) -> None:
    """A pair (up.nii.gz, down.nii.gz) and its truth, field_mm.nii.gz and brain.nii.gz."""
    import trxscan as ts

    head = make_head(np.random.default_rng(seed))
    shape = tuple(int(2 * np.ceil(extent / (2 * voxel))) for extent in FIELD_OF_VIEW)
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    fine = fine_grid(shape, affine)
    field, field_grid = make_field(head, largest, voxel * READOUT_TIME)
    hertz = sampled(field, field_grid, fine)
    maps = head.maps(fine, ("wm", "gm", "csf", "brain", *OUTSIDE))
    if whole_head:
        maps["csf"] = maps["csf"] + maps["fluid"]
        maps["gm"] = maps["gm"] + sum(AMPLITUDE[name] * maps[name] for name in OUTSIDE[1:])
    scanned = ts.objects.from_arrays(
        maps["wm"], maps["gm"], maps["csf"], oversample=OVERSAMPLING, voxel_mm=voxel, affine=affine, fieldmap=hertz,
        fibers=(((1.0, 0.0, 0.0), 1.0),),
    )  # fmt: skip
    protocol = ts.Protocol(voxel_mm=voxel, oversample=OVERSAMPLING, te_ms=80.0, readout_ms=1000 * READOUT_TIME)
    out.mkdir(parents=True, exist_ok=True)
    table = (np.zeros(1), np.zeros((1, 3)))
    for name, direction, draw in (("up", "j", 2 * seed), ("down", "j-", 2 * seed + 1)):
        artifacts = ts.Artifacts(noise=noise, seed=draw)
        run = scanned.simulate(table, protocol.replace(pe=direction), artifacts, clean_b0=False, chunk=8)
        image = np.asarray(run.magnitude.dataobj, np.float32).reshape(shape)
        nib.save(nib.Nifti1Image(image, affine), out / f"{name}.nii.gz")
        told = run.sidecar["TotalReadoutTime"], run.sidecar["PhaseEncodingDirection"]
        print(f"{name}: TotalReadoutTime {told[0]} s, PhaseEncodingDirection {told[1]}", flush=True)
    truth = {"field_mm": hertz * voxel * told[0], "brain": (maps["brain"] > 0.5).astype(np.float32)}
    for name, data in truth.items():
        mean = data.reshape(shape[0], OVERSAMPLING, shape[1], OVERSAMPLING, shape[2]).mean((1, 3))
        nib.save(nib.Nifti1Image(mean.astype(np.float32), affine), out / f"{name}.nii.gz")


def fine_grid(shape: tuple[int, ...], affine: np.ndarray, times: int = OVERSAMPLING) -> Grid:
    """The simulator's grid of spins: `times` as fine in plane, between the same outer faces."""
    matrix = affine @ np.diag([1 / times, 1 / times, 1, 1])
    matrix[:3, 3] = (affine @ [*[(1 / times - 1) / 2] * 2, 0, 1])[:3]
    return Grid((shape[0] * times, shape[1] * times, shape[2]), matrix)


def sampled(values: np.ndarray, grid: Grid, onto: Grid) -> np.ndarray:
    """Values on one grid interpolated onto another."""
    out = np.zeros(onto.shape, np.float32)
    for rows, points in slabs(onto):
        out[rows] = interpolate(values, grid, points).reshape(out[rows].shape)
    return out


def scores(found: np.ndarray, truth: np.ndarray, brain: np.ndarray, voxel: float) -> list[float]:
    """Columns of the table, but for the time."""
    f, t = found[brain], truth[brain]
    free = np.abs(f - t - np.median(f - t))
    slope = float(np.polyfit(t, f, 1)[0])
    far = free[np.abs(t) > 3].mean() if (np.abs(t) > 3).any() else 0.0
    least = 1 - np.abs(np.diff(found, axis=1)).max() / voxel
    return [
        slope,
        np.corrcoef(f, t)[0, 1],
        free.mean(),
        np.percentile(free, 95),
        far.mean() if far.size else 0.0,
        least,
    ]


def main() -> None:
    """Simulate, correct, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--voxel", type=float, default=3.0)
    parser.add_argument("--largest", type=float, default=8.0, help="largest displacement in the brain, mm")
    parser.add_argument("--noise", type=float, default=2e-4, help="the simulator's k-space noise variance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--brain-only", action="store_true", help="without eyes, skull, scalp and neck")
    o = parser.parse_args()
    if not (o.out / "field_mm.nii.gz").exists():
        simulate(o.out, o.voxel, o.largest, o.noise, o.seed, not o.brain_only)
    truth, brain = (np.asarray(nib.load(o.out / f"{n}.nii.gz").dataobj) for n in ("field_mm", "brain"))
    before = sum(os.times()[:4])
    pair = correct_pair(o.out / "up.nii.gz", o.out / "down.nii.gz", pe_dir="j", readout_time=READOUT_TIME)
    seconds = sum(os.times()[:4]) - before
    assert pair.fieldmap_hz is not None
    found = pair.fieldmap_hz.numpy() * o.voxel * READOUT_TIME
    row = [*scores(found, truth, brain > 0.5, o.voxel), seconds]
    print(
        "| slope | r | mean, free | p95, free | mean beyond 3 mm | least slope | CPU s |\n|---|---|---|---|---|---|---|"
    )
    print("| " + " | ".join(f"{v:.3f}" for v in row) + " |")


if __name__ == "__main__":
    main()
