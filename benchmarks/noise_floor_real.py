"""Noise floor of a person's signal: `python benchmarks/noise_floor_real.py IMAGE MASK`.

IMAGE is a multi-shell series to b 6000 with `.bval` and `.bvec` beside it (any world frame: directions are averaged).
The mean over directions of each shell, relative to b=0, is averaged over two thirds of MASK, by its signal at b 2000 to
3000: the lowest, at the noise floor at high b, and the highest, white matter. A sum of two exponentials is fitted to
the shells up to b 3000 of each way of processing, and extrapolated to the highest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.optimize import least_squares

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.settings import DenoiseSettings
from dsiprep.stages.denoise import denoise

FITTED = 3000.0  # s/mm², highest b-value that is fitted
WAYS = {
    "as acquired": DenoiseSettings(method="none"),
    "MP-PCA, floor left": DenoiseSettings(method="dwidenoise", noise_floor="none"),
    "MP-PCA, koay": DenoiseSettings(method="dwidenoise", noise_floor="koay"),
    "MP-PCA, vst": DenoiseSettings(method="dwidenoise2", noise_floor="vst"),
}


def read(image: Path) -> DWI:
    """The series; b-vectors as they stand in the file."""
    stem = image.name.split("_example")[0]
    loaded = nib.load(image)
    data = torch.from_numpy(np.moveaxis(np.asarray(loaded.dataobj, np.float32), -1, 0).copy())
    bvals, bvecs = (np.loadtxt(image.with_name(f"{stem}.{end}")) for end in ("bval", "bvec"))
    bvecs = bvecs if bvecs.shape[1] == 3 else bvecs.T
    none = np.zeros(len(bvals), int)
    return DWI(data, Grid(tuple(data.shape[1:]), loaded.affine), bvals, bvecs, none, none)


def shells(dwi: DWI) -> tuple[np.ndarray, list[np.ndarray]]:
    """b-values of the shells above b=0, and the volumes of each."""
    rounded = np.round(dwi.bvals / 100) * 100
    values = np.unique(rounded[~dwi.is_b0])
    return values, [np.flatnonzero(~dwi.is_b0 & (rounded == value)) for value in values]


def extrapolated(b: np.ndarray, signal: np.ndarray) -> float:
    """Sum of two exponentials through 1 at b=0, fitted up to `FITTED`, at the highest b-value."""
    low = b <= FITTED

    def model(p: np.ndarray, at: np.ndarray) -> np.ndarray:
        return p[0] * np.exp(-at * p[1]) + (1 - p[0]) * np.exp(-at * p[2])

    start, limits = [0.6, 1.5e-3, 0.2e-3], ([0, 0, 0], [1, 5e-3, 5e-3])
    found = least_squares(lambda p: model(p, b[low]) - signal[low], start, bounds=limits, x_scale=[1, 1e-3, 1e-3])
    return float(model(found.x, b[-1:])[0])


def main(image: Path, mask_path: Path) -> None:
    """One row per way of processing."""
    dwi = read(image)
    mask = np.asarray(nib.load(mask_path).dataobj) > 0
    volume = Volume(torch.from_numpy(mask.astype(np.float32)), dwi.grid)
    b, volumes = shells(dwi)
    middle = [dwi.data[v].mean(0).numpy() for v, value in zip(volumes, b, strict=True) if 2000 <= value <= 3000]
    ratio = np.mean(middle, axis=0) / np.maximum(dwi.data[torch.as_tensor(dwi.is_b0)].mean(0).numpy(), 1e-6)
    low, high = np.quantile(ratio[mask], (1 / 3, 2 / 3))
    print(f"shells at b {', '.join(f'{value:.0f}' for value in b)}; {mask.sum()} voxels, of which a third each\n")
    print(f"| processing | lowest third at b {b[-1]:.0f} | extrapolated | less | highest third | extrapolated | less |")
    print("|---|---|---|---|---|---|---|")
    for name, settings in WAYS.items():
        data = denoise(dwi, volume, settings).dwi.data.numpy()
        cells = []
        for third in (mask & (ratio <= low), mask & (ratio > high)):
            signal = np.array([data[v][:, third].mean() for v in volumes]) / data[dwi.is_b0][:, third].mean()
            expected = extrapolated(b, signal)
            cells += [f"{signal[-1]:.4f}", f"{expected:.4f}", f"{signal[-1] - expected:+.4f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))
