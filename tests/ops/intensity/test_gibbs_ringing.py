"""Local subvoxel shifts compared with DIPY, MRtrix3 and Fourier shifts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.ops.intensity import gibbs_ringing as module
from dsiprep.ops.intensity.gibbs_ringing import unring
from helpers.ringing_slices import ellipses, rms, scanned, truth_of


def as_planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(image, 2, 0).astype(np.float32).copy())


@pytest.fixture(scope="module")
def ringing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images that ring, (m, i, j), their truth and their flat places."""
    fine = ellipses()
    truth, flat = truth_of(fine)
    return np.abs(as_planes(np.abs(scanned(fine))).numpy()), *(as_planes(a).numpy() for a in (truth, flat * 1.0))


def test_error_is_below_that_of_dipy(ringing: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    from dipy.denoise.gibbs import gibbs_removal

    image, truth, flat = ringing
    theirs = gibbs_removal(np.moveaxis(image, 0, 2).astype(float), slice_axis=2, num_processes=1)
    ours = unring(torch.from_numpy(image)).numpy()
    assert rms(ours - truth) < 0.9 * rms(np.moveaxis(theirs, 2, 0) - truth)
    assert rms((ours - truth)[flat > 0]) < 0.35 * rms((image - truth)[flat > 0])


@pytest.mark.skipif(not shutil.which("mrdegibbs"), reason="MRtrix3 is not installed")
def test_as_mrdegibbs(tmp_path: Path, ringing: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    image, truth, flat = ringing
    nib.save(nib.Nifti1Image(np.moveaxis(image, 0, 2), np.eye(4)), tmp_path / "before.nii")
    subprocess.run(["mrdegibbs", "-quiet", tmp_path / "before.nii", tmp_path / "after.nii"], check=True)
    theirs = np.moveaxis(nib.load(tmp_path / "after.nii").get_fdata(), 2, 0)
    ours = unring(torch.from_numpy(image)).numpy()
    assert rms((ours - truth)[flat > 0]) <= 1.02 * rms((theirs - truth)[flat > 0])
    assert rms(ours - truth) <= 1.02 * rms(theirs - truth)


def test_kernel_and_tensors_are_equal(ringing: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    lines = torch.from_numpy(ringing[0])
    fine = torch.matmul(torch.from_numpy(module._refinement(lines.shape[1])), lines)
    from_kernel = np.empty(tuple(lines.shape), np.float32)
    module._least_variation(fine.numpy(), module._interpolator(), from_kernel)
    from_tensors = module._least_variation_torch(fine, module._interpolator()).numpy()
    differing = np.abs(from_kernel - from_tensors) > 1e-3
    assert differing.mean() < 1e-3  # two shifts that are equally good up to rounding
    assert np.abs(from_kernel - from_tensors)[~differing].max() < 1e-3


@pytest.mark.parametrize("size", [48, 51])
def test_lines_are_shifted_as_by_fourier(size: int) -> None:
    """Every shift of the table, on lines with all frequencies below the highest."""
    rng = np.random.default_rng(0)
    spectrum = rng.normal(size=(size // 2, 2)) @ [1, 1j] * (np.arange(size // 2) < 0.48 * size)
    frequency = np.fft.rfftfreq(size)[: size // 2]

    def line(shift: float) -> np.ndarray:
        waves = np.exp(2j * np.pi * frequency * (np.arange(size)[:, None] + shift))
        return (waves @ spectrum).real

    fine = module._refinement(size) @ line(0)
    for step, (first, *weights) in enumerate(module._interpolator()):
        rows = (module.OVERSAMPLING * np.arange(size)[:, None] + int(first) + np.arange(module.TAPS)) % len(fine)
        shift = (step - module.STEPS) / (2 * module.STEPS)
        assert rms(fine[rows] @ np.array(weights) - line(shift)) < 2e-3 * rms(line(0))


def test_what_does_not_ring_stays() -> None:
    x, y = np.linspace(0, 2 * np.pi, 40, endpoint=False), np.linspace(0, 2 * np.pi, 33, endpoint=False)
    smooth = (300 + 100 * np.cos(x[:, None] + 1) + 50 * np.sin(2 * y))[None].astype(np.float32)
    assert rms(unring(torch.from_numpy(smooth)).numpy() - smooth) < 0.7
    constant = torch.full((2, 32, 35), 7.0)
    assert float((unring(constant) - 7).abs().max()) < 1e-4


def test_both_axes_are_treated_alike(ringing: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    planes = torch.from_numpy(ringing[0])
    turned = unring(planes.mT.contiguous()).mT
    differing = (turned - unring(planes)).abs() > 1e-2
    assert float(differing.float().mean()) < 2e-3
