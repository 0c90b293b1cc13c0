"""Gibbs ringing left, and CPU time, beside MRtrix3's mrdegibbs: `python benchmarks/unringing.py [LABELS]`.

A head is sampled in k-space: all of it, and partial Fourier 7/8, 6/8 and 5/8 along j with the rest left at zero. The
head is the phantom's or, with LABELS, a label image of a person (1 mm, FreeSurfer's and more labels), with sharp edges.
Errors are RMS to the ring-free truth, the mean within each voxel, in percent of white matter at b=0: in flat
places, where the object is constant over the voxel and its eight neighbours in the plane and any error is ringing, and
at edges, where resolution counts as well. `noise` is the RMS of the noise that is left, from two draws. CPU seconds are
of one thread each on the same slices, without reading and compiling.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.acquisition import KSpace, PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.raw import RawEpi
from dsiprep.phantom.head import make_head
from dsiprep.phantom.k_space import PHASE_TERMS, draw_phase, sample
from dsiprep.phantom.signal import AMPLITUDE, SCALE, make_tissue
from dsiprep.settings import UnringingSettings
from dsiprep.stages.unringing import unring_references

VOXEL, FINE, SHAPE = 2.5, 5, (80, 96)
WHITE = SCALE * AMPLITUDE["wm"]
FLAT = 0.02  # of white matter; largest range of the object over 3 x 3 voxels
OUTSIDE = (0.35, 0.12, 0.08, 0.02, 2.0)  # intensities of labels outside the brain, as the phantom's tissues there


def phantom_slices(count: int) -> np.ndarray:
    """b=0 signal of the phantom's head on a fine grid, (i, j, k)."""
    head = make_head(np.random.default_rng(1))
    affine = np.diag([-VOXEL / FINE, VOXEL / FINE, 4.0, 1.0])
    shape = (SHAPE[0] * FINE, SHAPE[1] * FINE, count)
    affine[:3, 3] = head.centre + np.array([0, 0, 5]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return make_tissue(head, Grid(shape, affine)).signal(0.0, np.zeros(3))


def label_slices(path: Path, count: int) -> np.ndarray:
    """A piecewise constant head from a label image of 1 mm, (i, j, k): each label has one intensity."""
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(int)
    amplitude = np.array([OUTSIDE[label % len(OUTSIDE)] for label in range(int(labels.max()) + 1)])
    amplitude[:500] = AMPLITUDE["gm"]
    amplitude[[0, *range(258, 260)]] = 0
    amplitude[[2, 7, 16, 41, 46, 85]] = AMPLITUDE["wm"]
    amplitude[[4, 5, 14, 15, 24, 43, 44]] = AMPLITUDE["csf"]
    middle = np.argwhere(labels > 0).mean(0).round().astype(int)
    index = [
        np.clip(np.rint(middle[a] + (np.arange(n * FINE) - n * FINE / 2) * VOXEL / FINE).astype(int), 0, limit - 1)
        for a, (n, limit) in enumerate(zip(SHAPE, labels.shape, strict=False))
    ]
    rows = np.clip(middle[2] + 4 * (np.arange(count) - count // 2), 0, labels.shape[2] - 1)
    return (SCALE * amplitude[labels[np.ix_(index[0], index[1], rows)]]).astype(np.float32)


def measured_places(fine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ring-free truth, flat places in the head, and places at edges, (i, j, k)."""
    i, j, k = fine.shape
    blocks = fine.reshape(i // FINE, FINE, j // FINE, FINE, k)
    truth, high, low = blocks.mean((1, 3)), blocks.max((1, 3)), blocks.min((1, 3))
    ring = (3, 3, 1)
    spread = ndimage.maximum_filter(high, ring) - ndimage.minimum_filter(low, ring)
    return truth, (spread < FLAT * WHITE) & (truth > 0.05 * WHITE), spread > 0.5 * WHITE


def with_mrdegibbs(image: np.ndarray) -> tuple[np.ndarray, float]:
    """An image (i, j, k) unringed by MRtrix3, and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = f"{folder}/before.nii", f"{folder}/after.nii"
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([VOXEL, VOXEL, VOXEL, 1])), before)
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(["mrdegibbs", "-quiet", "-nthreads", "0", before, after], check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
        return np.asarray(nib.load(after).dataobj), seconds


def with_dsiprep(image: np.ndarray, fraction: float) -> tuple[np.ndarray, float, str]:
    """An image (i, j, k) unringed by dsiprep, CPU seconds, and what it did."""
    grid = Grid(image.shape, np.diag([VOXEL, VOXEL, VOXEL, 1.0]))
    data = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
    epi = RawEpi("slices", data, grid, PhaseEncoding(1, 1), KSpace(2, 1, fraction))
    start = time.process_time()
    (done,), text = unring_references((epi,), UnringingSettings())
    return done.data[0].numpy(), time.process_time() - start, text


def main() -> None:
    """Two tables: error and CPU time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--snr", type=float, default=0.0, help="white matter at b=0; 0 adds no noise")
    parser.add_argument("--phase", type=float, default=1.0, help="coefficients of the object's smooth phase, rad")
    o = parser.parse_args()
    torch.set_num_threads(1)
    fine = label_slices(o.labels, o.slices) if o.labels else phantom_slices(o.slices)
    truth, flat, edges = measured_places(fine)
    fine_grid = Grid(fine.shape, np.eye(4))
    static = o.phase * np.random.default_rng(5).standard_normal(PHASE_TERMS)
    phase = draw_phase(fine_grid, False, static, np.random.default_rng(6))
    sigma = WHITE / o.snr if o.snr else 0.0
    with_dsiprep(truth, 1.0)  # compiles
    print(f"{flat.sum()} voxels in flat places, {edges.sum()} at edges\n")
    print("| sampled | method | flat places | at edges | noise | CPU s |\n|---|---|---|---|---|---|")
    for name, fraction in (("all", 1.0), ("7/8", 7 / 8), ("6/8", 6 / 8), ("5/8", 5 / 8)):
        rows: dict[str, list[tuple[np.ndarray, float]]] = {}
        for draw in (1, 2):
            rng = np.random.default_rng(draw)
            image = np.abs(sample(fine, phase, 1, fraction, sigma, rng, FINE))
            ours, seconds, text = with_dsiprep(image, fraction)
            for method, result in (
                ("none", (image, 0.0)),
                ("mrdegibbs", with_mrdegibbs(image)),
                ("dsiprep", (ours, seconds)),
            ):
                rows.setdefault(method, []).append(result)
        for method, draws in rows.items():
            error, other = (result - truth for result, _ in draws)
            scores = [100 * np.sqrt((error[place] ** 2).mean()) / WHITE for place in (flat, edges)]
            noise = 100 * np.sqrt(((error - other)[flat] ** 2).mean() / 2) / WHITE
            print(
                f"| {name} | {method} | {scores[0]:.2f} | {scores[1]:.2f} | {noise:.2f} | {draws[0][1]:.2f} |",
                flush=True,
            )
        print(f"<!-- {text} -->")


if __name__ == "__main__":
    main()
