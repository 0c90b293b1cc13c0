"""Bias of the mean signal of magnitudes and of complex data: `python benchmarks/complex_series.py PHANTOM`.

PHANTOM is made by `dsiprep-tools phantom PHANTOM --complex --moved 0 --max-motion 0.01 --distortion 0 --snr 20`: the
series lies where its ideal does. It is denoised as complex numbers, the real part kept, and, with `--ignore phase`, as
magnitudes. The table has the mean over white matter (voxels with its b=0 signal, within 10 %, and their neighbours in
the plane) and over volumes of a range of b: truth, and bias in percent of the mean at b=0; RMS error per sample in the
same unit; and CPU seconds of denoising.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.results import Acquired, Denoised
from dsiprep.io.bids import find_units, read_unit
from dsiprep.phantom.signal import AMPLITUDE, SCALE
from dsiprep.settings import DenoiseSettings, Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.denoise import denoise, denoise_complex

RANGES = ((500, 2500), (2500, 5000), (5000, 7001))
ALIKE = 0.1


def denoised(acquired: Acquired, method: str) -> tuple[Denoised, float]:
    """The series denoised as it is, complex or not, and CPU seconds."""
    settings, start = DenoiseSettings(method=method), time.process_time()
    if acquired.phase is None:
        found = denoise(acquired.dwi, acquired.mask, settings)
    else:
        axes = [sampled.slice_axis if sampled else 2 for sampled in acquired.k_space]
        found = denoise_complex(acquired.dwi, acquired.phase, acquired.mask, settings, axes)
    return found, time.process_time() - start


def white_matter(b0: np.ndarray) -> np.ndarray:
    """Voxels whose b=0 signal, and that of their neighbours in the plane, is that of white matter."""
    alike = np.abs(b0 / (SCALE * AMPLITUDE["wm"]) - 1) < ALIKE
    return ndimage.binary_erosion(alike, np.ones((3, 3, 1)))


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phantom", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(1)
    ideal = np.moveaxis(np.asarray(nib.load(o.phantom / "truth/ideal_dwi.nii.gz").get_fdata(dtype=np.float32)), 3, 0)
    b0 = np.asarray(nib.load(o.phantom / "truth/ideal_b0.nii.gz").dataobj)
    white = white_matter(b0)
    print(f"{white.sum()} voxels of white matter\n")
    print(
        "| denoised | data | b | truth | bias, % of b=0 | RMS error, % of b=0 | CPU s |\n|---|---|---|---|---|---|---|"
    )
    for method in ("none", "dwidenoise"):
        for name, ignore in (("magnitude", frozenset({"phase"})), ("complex", frozenset())):
            (unit,) = find_units(o.phantom / "bids", Settings(), ignore=ignore)
            acquired = conform(read_unit(unit, Settings()), Settings().acquisition)
            found, seconds = denoised(acquired, method)
            for low, high in RANGES:
                chosen = (acquired.dwi.bvals >= low) & (acquired.dwi.bvals < high)
                if chosen.any():
                    truth = ideal[chosen][:, white]
                    error = found.dwi.data.numpy()[chosen][:, white] - truth
                    parts = [
                        100 * value / b0[white].mean()
                        for value in (truth.mean(), error.mean(), np.sqrt((error**2).mean()))
                    ]
                    shown = f"{parts[0]:.1f} | {parts[1]:+.2f} | {parts[2]:.2f}"
                    print(f"| {method} | {name} | {low} to {high - high % 10} | {shown} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
