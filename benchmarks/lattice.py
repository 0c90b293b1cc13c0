"""A DSI series on its lattice again, with half of the volumes moved: `python benchmarks/lattice.py [SCHEME ...]`.

The signal of the phantom's brain (5 mm) for the gradients as its head saw them (half of the volumes turned by up to 9
degrees about each axis), with Rician noise of SNR 25 at b=0: no image is moved, so that errors are those of q-space
alone. Prints, in units of the noise at b=0,

- the RMS difference between acquired volumes and their prediction from the others, over that of their own noise;
- the RMS error at the points of the full lattice of radius 5 against the expected magnitude, by b;

and the error in degrees of the peaks of DIPY's DSI model in white matter with one bundle (fraction above 0.9) and with
two, against the fibres of the phantom: from the predicted lattice, from the table taken for a lattice though the head
turned, and from an acquisition of the lattice in which the head lay still. Each true bundle is matched with the nearest
of up to two peaks.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from dipy.core.gradients import gradient_table
from dipy.data import get_sphere
from dipy.direction import peaks_from_model
from dipy.reconst.dsi import DiffusionSpectrumModel
from scipy.special import ive

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.qspace import Lattice
from dsiprep.data.results import Acquired, Preprocessed
from dsiprep.ops.image.affine import nearest_rotation
from dsiprep.ops.qspace.lattice import ball
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.phantom.head import make_head
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import fibres_at, make_tissue
from dsiprep.stages.lattice import evaluate_lattice

SEED, SNR, VOXEL_MM = 3, 25.0, 5.0
PEAK_VOXELS = 400  # of each kind


class Subject:
    """The brain of a phantom and a session in which half of the volumes moved."""

    def __init__(self, scheme: str) -> None:
        settings = PhantomSettings(scheme=scheme, resolution=VOXEL_MM, moved=0.5, seed=SEED)
        streams = np.random.default_rng(SEED).spawn(4)
        head = make_head(streams[0])
        self.session = plan_session(head, load_scheme(scheme), settings, streams[1])
        self.grid = head.box(np.array([150, 190, 150]), VOXEL_MM)
        self.tissue = make_tissue(head, self.grid)
        maps = head.maps(self.grid, ("brain", "wm"))
        self.brain, self.white = maps["brain"] > 0.5, maps["wm"]
        points = self.grid.to_world(np.argwhere(self.brain))
        self.fibres, self.shares = fibres_at(head, points)
        start = nearest_rotation(self.session.poses[0][:3, :3])  # from the head to the scanner
        self.still = self.session.bvecs @ start  # the gradients of a head that lies as in the first volume
        self.to_lattice = start  # in whose axes they are a lattice
        b0 = self.signal(np.zeros(1), np.zeros((1, 3)))
        self.sigma = float(b0.mean() / SNR)

    def signal(self, bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
        """Noise-free signal in the brain, (n, voxels)."""
        rows = [self.tissue.signal(float(b), g)[self.brain] for b, g in zip(bvals, bvecs, strict=True)]
        return np.stack(rows).astype(float)

    def noisy(self, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = self.sigma * rng.normal(size=(2, *clean.shape))
        return np.hypot(clean + noise[0], noise[1])

    def expected(self, clean: np.ndarray) -> np.ndarray:
        """Mean magnitude of the signal with Rician noise."""
        x = clean**2 / (4 * self.sigma**2)
        return self.sigma * np.sqrt(np.pi / 2) * ((1 + 2 * x) * ive(0, x) + 2 * x * ive(1, x))

    def on_lattice(self, samples: np.ndarray, grid: str) -> Lattice:
        """The lattice that dsiprep predicts from samples (n, voxels) with the rotated gradients."""
        bvals, n = self.session.bvals, len(samples)
        data = torch.as_tensor(samples[:, :, None, None], dtype=torch.float32)
        line = Grid((samples.shape[1], 1, 1), np.eye(4))
        zeros = np.zeros(n, int)
        rotated = DWI(data, line, bvals, self.session.head_bvecs @ self.to_lattice.T, zeros, zeros)
        nominal = DWI(data, line, bvals, self.session.bvecs, zeros, zeros)
        mask = Volume(torch.ones(line.shape), line)
        preprocessed = Preprocessed(rotated, Volume(data[0], line), mask, "none")
        acquired = Acquired(nominal, (), recognise(bvals, self.session.bvecs), mask, np.ones(1))
        found = evaluate_lattice(preprocessed, acquired, grid)
        assert found is not None
        return found


def peak_errors(subject: Subject, samples: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> list[float]:
    """Mean error in degrees of the peaks of DIPY's DSI model where there is one bundle, and where there are two.

    `bvecs` are in the axes of the scanner, as are the fibres with which peaks are compared.
    """
    sphere = get_sphere(name="repulsion724")
    table = gradient_table(bvals, bvecs=bvecs, b0_threshold=50)
    model = DiffusionSpectrumModel(table)
    white = subject.white[subject.brain] > 0.95
    second = subject.shares[:, 1]
    errors = []
    for chosen in (white & (second < 0.1), white & (second > 0.35)):
        voxels = np.flatnonzero(chosen)
        voxels = voxels[:: max(1, len(voxels) // PEAK_VOXELS)][:PEAK_VOXELS]
        peaks = peaks_from_model(
            model, samples[:, voxels].T, sphere, relative_peak_threshold=0.3, min_separation_angle=25, npeaks=2
        ).peak_dirs
        fibres = subject.fibres[voxels] @ subject.to_lattice.T
        cosine = np.abs(np.einsum("vfa,vpa->vfp", fibres, peaks)).max(-1)
        angle = np.degrees(np.arccos(np.clip(cosine, 0, 1)))
        weights = np.where(subject.shares[voxels] > 0.2, 1.0, 0.0)
        errors.append(float((angle * weights).sum() / weights.sum()))
    return errors


def full_sphere(samples: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Samples of a half sphere and their antipodes."""
    weighted = bvals > 50
    return (
        np.concatenate([samples, samples[weighted]]),
        np.concatenate([bvals, bvals[weighted]]),
        np.concatenate([bvecs, -bvecs[weighted]]),
    )


def main() -> None:
    for scheme in sys.argv[1:] or ["dsi257"]:
        subject, rng = Subject(scheme), np.random.default_rng(0)
        bvals, session = subject.session.bvals, subject.session
        clean = subject.signal(bvals, session.head_bvecs)
        samples = subject.noisy(clean, rng)
        start = time.process_time()
        lattice = subject.on_lattice(samples, "dsi515")
        seconds = time.process_time() - start
        weighted = bvals > 50
        own = np.sqrt(np.mean((samples - subject.expected(clean))[weighted] ** 2))
        left = np.sqrt(np.mean(lattice.left_out[weighted] ** 2))
        print(
            f"{scheme}: left-out error {left / subject.sigma:.3f} sigma, {left / own:.3f} of the noise of the volumes"
        )
        print(f"  {lattice.model}, {seconds:.1f} CPU s, {int(lattice.extrapolated.sum())} of 515 points extrapolated")
        target = lattice.dwi.bvals, lattice.dwi.bvecs @ subject.to_lattice
        error = lattice.dwi.data[:, :, 0, 0].numpy() - subject.expected(subject.signal(*target))
        parts = ((-1, 1), (1, 600), (600, 1500), (1500, 3000), (3000, 5000), (5000, 7100))
        for low, high in parts:
            inside = (target[0] >= low) & (target[0] < high)
            if inside.any():
                size = np.sqrt(np.mean(error[inside] ** 2)) / subject.sigma
                print(f"  b {low:5d} to {high:5d}: error {size:.2f} sigma")
        size = np.sqrt(np.mean(error**2)) / subject.sigma
        print(f"  all points: {size:.3f} sigma (a volume: {own / subject.sigma:.3f})")
        if len(bvals) < 200:
            continue
        still = subject.noisy(subject.signal(bvals, subject.still), rng)
        cases = {
            "predicted lattice": (lattice.dwi.data[:, :, 0, 0].numpy(), lattice.dwi.bvals, lattice.dwi.bvecs),
            "rotated table taken for a lattice": full_sphere(samples, bvals, session.head_bvecs @ subject.to_lattice.T),
            "table as prescribed": full_sphere(samples, bvals, session.bvecs),
            "head that lay still": full_sphere(still, bvals, session.bvecs),
        }
        for name, case in cases.items():
            one, two = peak_errors(subject, *case)
            print(f"  DIPY DSI peaks, {name}: {one:.2f} degrees (one bundle), {two:.2f} (two)", flush=True)


if __name__ == "__main__":
    assert len(ball(25)) == 515
    main()
