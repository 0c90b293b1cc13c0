"""Head motion in EPI of a simulator that is not ours: `python benchmarks/trxscan_motion.py OUT [options]`.

The k-space simulator TRXScan (`pip install trxscan`, 0.3.0 measured; optional) scans the phantom's head in a new pose
for each volume: per-line phase of the off-resonance field, which moves with the head, T2 and T2* decay, Gibbs ringing
and noise; the fibres turn with the head. OUT keeps what was scanned, so an interrupted call resumes. One Markdown table
is printed: mean displacement of brain points by the estimated from the true poses relative to the median of the b=0
volumes, with nothing removed and less its mean over volumes, over the diffusion-weighted volumes; what it would be
without correction; and CPU seconds.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from trxscan_pair import OUTSIDE, fine_grid, sampled

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.poses import median_pose
from dsiprep.phantom.head import Head, make_head
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import Session, make_field, plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import AMPLITUDE, fibres_at
from dsiprep.settings import MotionSettings
from dsiprep.stages.motion import estimate_motion

OVERSAMPLING = 2  # spins per voxel along each in-plane axis


def scan_volume(
    head: Head, field: tuple[np.ndarray, Grid], session: Session, volume: int, protocol: object, noise: float
) -> np.ndarray:
    """The magnitude image (i, j, k) of one volume."""
    import trxscan as ts

    pose, fine = session.poses[volume], fine_grid(session.grid.shape, session.grid.affine, OVERSAMPLING)
    at_head = Grid(fine.shape, np.linalg.inv(pose) @ fine.affine)
    maps = head.maps(at_head, ("wm", "gm", "csf", "fluid", *OUTSIDE[1:]))
    grey = maps["gm"] + sum(AMPLITUDE[name] * maps[name] for name in OUTSIDE[1:])
    white = np.flatnonzero((maps["wm"] > 0).ravel(order="F"))
    index = np.stack(np.unravel_index(white, fine.shape, order="F"), -1)
    directions, fractions = fibres_at(head, at_head.to_world(index))
    fibres = ts.Fibers(np.tile(white, 2), np.concatenate(list(np.moveaxis(directions @ pose[:3, :3].T, 1, 0))),
                       np.concatenate(list(fractions.T)))  # fmt: skip
    size = float(session.grid.voxel_sizes[0])
    scanned = ts.objects.from_arrays(
        maps["wm"], grey, maps["csf"] + maps["fluid"], oversample=OVERSAMPLING, voxel_mm=size,
        affine=session.grid.affine, fieldmap=sampled(*field, at_head), fibers=fibres,
    )  # fmt: skip
    table = session.bvals[volume : volume + 1], session.bvecs[volume : volume + 1]
    artifacts = ts.Artifacts(noise=noise, seed=volume)
    run = scanned.simulate(table, protocol, artifacts, clean_b0=False, chunk=8)
    return np.asarray(run.magnitude.dataobj, np.float32).reshape(session.grid.shape)


def simulate(out: Path, o: argparse.Namespace) -> tuple[DWI, np.ndarray, np.ndarray]:
    """The series, true poses (n, 4, 4), and points of the brain (m, 3) in the frame of the head."""
    import trxscan as ts

    streams = np.random.default_rng(o.seed).spawn(2)
    head = make_head(streams[0])
    settings = PhantomSettings(resolution=o.voxel, moved=o.moved, max_motion=o.largest_motion, distortion=o.largest)
    session = plan_session(head, load_scheme(o.scheme), settings, streams[1])
    session = replace(session, grid=Grid(tuple(n + n % 2 for n in session.grid.shape), session.grid.affine))
    assert session.pe.readout_time is not None
    field = make_field(head, o.largest, o.voxel * session.pe.readout_time) if o.largest else None
    field = field or (np.zeros((2, 2, 2), np.float32), Grid((2, 2, 2), np.diag([400.0, 400, 400, 1])))
    protocol = ts.Protocol(
        voxel_mm=o.voxel, oversample=OVERSAMPLING, te_ms=80.0, readout_ms=1000 * session.pe.readout_time, pe="j"
    )
    out.mkdir(parents=True, exist_ok=True)
    images = []
    for volume in range(len(session.bvals)):
        file = out / f"{volume:03}.npy"
        if not file.exists():
            np.save(file, scan_volume(head, field, session, volume, protocol, o.noise))
        images.append(np.load(file))
    none = np.zeros(len(images), int)
    data = torch.from_numpy(np.stack(images))
    return DWI(data, session.grid, session.bvals, session.bvecs, none, none), session.poses, head.brain_points(5)


def main() -> None:
    """Simulate, estimate, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="dsi101")
    parser.add_argument("--voxel", type=float, default=3.0)
    parser.add_argument("--moved", type=float, default=0.2, help="fraction of volumes")
    parser.add_argument("--largest-motion", type=float, default=4.0, help="mm")
    parser.add_argument("--largest", type=float, default=0.0, help="largest displacement by the field in the brain, mm")
    parser.add_argument("--noise", type=float, default=2e-4, help="the simulator's k-space noise variance")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    dwi, poses, points = simulate(o.out, o)
    b0 = dwi.data[torch.as_tensor(dwi.is_b0)].mean(0)
    mask = brain_mask_b0(Volume(b0, dwi.grid))
    before = sum(os.times()[:4])
    found = estimate_motion(dwi, mask, MotionSettings(eddy="none"))
    seconds = sum(os.times()[:4]) - before
    centre = points.mean(axis=0)
    reference = median_pose(poses[dwi.is_b0], centre)
    scanner = points @ reference[:3, :3].T + reference[:3, 3]
    true = poses @ np.linalg.inv(reference)
    there, own = (np.einsum("nab,mb->nma", p[:, :3, :3], scanner) + p[:, None, :3, 3] for p in (true, found.transforms))
    error = (own - there)[~dwi.is_b0]
    free = error - error.mean(axis=0)
    row = [np.linalg.norm(e, axis=-1).mean() for e in (error, free, (there - scanner)[~dwi.is_b0])]
    print("| scheme | error, mm | less its mean | not corrected | CPU s |\n|---|---|---|---|---|")
    print(f"| {o.scheme} | " + " | ".join(f"{value:.3f}" for value in row) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
