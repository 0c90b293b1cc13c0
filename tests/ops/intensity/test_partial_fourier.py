"""Sampling of k-space seen from images, and images restored from partial Fourier sampling."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.ops.intensity.gibbs_ringing import unring
from dsiprep.ops.intensity.kspace_sampling import HalfSampled, half_sampled_band, power_profile, steepest_fall
from dsiprep.ops.intensity.partial_fourier import apodised, full_kspace
from dsiprep.stages.unringing import INTERPOLATED
from helpers.ringing_slices import ellipses, rms, scanned, truth_of
from helpers.shared_data import SHARED


def profiles(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power along j, the axis of phase encoding, and along i."""
    volume = torch.from_numpy(np.abs(image).astype(np.float32))[None]
    return power_profile(volume, 2, 1), power_profile(volume, 2, 0)


@pytest.mark.parametrize(("fraction", "phase"), [(5 / 8, 0.0), (6 / 8, 0.0), (6 / 8, 1.5), (7 / 8, 1.0)])
def test_edge_of_sampling_is_found(fraction: float, phase: float) -> None:
    along, other = profiles(scanned(ellipses(count=6), fraction, 1.0, phase=phase))
    band = half_sampled_band(along, other, fraction)
    assert band is not None
    assert abs(band.edge - (fraction - 0.5)) < 0.025
    assert 3 < band.step < 9  # half the amplitude is 6 dB


@pytest.mark.parametrize("fraction", [5 / 8, 6 / 8, 7 / 8])
def test_full_sampling_has_no_edge(fraction: float) -> None:
    along, other = profiles(scanned(ellipses(count=6), 1.0, 1.0, phase=1.0))
    assert half_sampled_band(along, other, fraction) is None


def test_zero_filling_is_found() -> None:
    image = scanned(ellipses(count=6), 1.0, 2.0)
    spectrum = np.fft.fftshift(np.fft.fft2(image, axes=(0, 1)), (0, 1))
    padded = np.fft.ifft2(np.fft.ifftshift(np.pad(spectrum, ((12, 12), (15, 15), (0, 0))), (0, 1)), axes=(0, 1))
    for profile, size in zip(profiles(padded), padded.shape[1::-1], strict=True):
        assert steepest_fall(profile, size) > INTERPOLATED
    for profile, size in zip(profiles(image), image.shape[1::-1], strict=True):
        assert steepest_fall(profile, size) < INTERPOLATED - 3


@pytest.mark.skipif(not (SHARED / "bids").exists(), reason="needs the shared data of real people")
@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("bids/sub-xa30/dwi/sub-xa30_dir-AP_dwi", 1),
        ("bids/sub-xa30/dwi/sub-xa30_dir-PA_dwi", 1),
        ("bids_more/sub-sag/dwi/sub-sag_acq-slices_dir-AP_dwi", 0),
        ("bids_more/sub-sag/dwi/sub-sag_acq-slices_dir-HF_dwi", 1),
    ],
)
def test_edge_in_images_of_people(name: str, axis: int) -> None:
    """Siemens, partial Fourier 6/8 by the sidecar: along phase encoding there is a step, along readout none."""
    stored = nib.load(SHARED / f"{name}.nii.gz")
    assert json.loads((SHARED / f"{name}.json").read_text())["PartialFourier"] == 0.75
    volume = torch.from_numpy(np.asarray(stored.dataobj[..., :1], np.float32)).movedim(3, 0)
    along, other = power_profile(volume, 2, axis), power_profile(volume, 2, 1 - axis)
    band = half_sampled_band(along, other, 0.75)
    assert band is not None
    assert 0.19 < band.edge < 0.26
    assert half_sampled_band(other, along, 0.75) is None
    assert max(steepest_fall(along, volume.shape[1 + axis]), steepest_fall(other, volume.shape[2 - axis])) < 10


@pytest.mark.skipif(not (SHARED / "bids").exists(), reason="needs the shared data of real people")
def test_interpolated_images_of_a_person() -> None:
    """Canon: readout lines were zero-filled by the scanner."""
    stored = nib.load(SHARED / "bids/sub-canon/dwi/sub-canon_acq-ortho_dir-PA_dwi.nii.gz")
    volume = torch.from_numpy(np.asarray(stored.dataobj[..., :1], np.float32)).movedim(3, 0)
    assert steepest_fall(power_profile(volume, 2, 0), 80) > INTERPOLATED


@pytest.mark.parametrize("fraction", [5 / 8, 6 / 8, 7 / 8])
def test_ringing_of_both_periods_is_removed(fraction: float) -> None:
    fine = ellipses()
    truth, flat = truth_of(fine)
    image = scanned(fine, fraction)
    planes = torch.from_numpy(np.moveaxis(np.abs(image), 2, 0).copy())
    band = HalfSampled(fraction - 0.5, 0.0, 6.0)
    restored = apodised(unring(full_kspace(planes, 1, band)), 1, band)

    def left(found: torch.Tensor) -> float:
        return rms((np.moveaxis(found.numpy(), 0, 2) - truth)[flat])

    full = torch.from_numpy(np.moveaxis(np.abs(scanned(fine)), 2, 0).copy())
    assert left(restored) < 1.2 * left(unring(full))  # as from full k-space
    assert left(restored) < left(unring(planes))
    assert rms(np.moveaxis(restored.numpy(), 0, 2) - truth) < rms(np.moveaxis(unring(planes).numpy(), 0, 2) - truth)


def test_magnitudes_are_restored_as_the_object_is() -> None:
    """As from full k-space, up to voxels where the magnitude is nearly zero; the real part exactly."""
    fine, band = ellipses((61, 73)), HalfSampled(0.25, 0.0, 6.0)
    full, partial = scanned(fine), scanned(fine, 6 / 8)
    _, flat = truth_of(fine)
    magnitudes, real = (torch.from_numpy(np.moveaxis(f(partial), 2, 0).copy()) for f in (np.abs, np.real))
    restored = np.moveaxis(full_kspace(magnitudes, 1, band).numpy(), 0, 2)
    assert rms((restored - full.real)[flat]) < 0.5 * rms((np.abs(partial) - full.real)[flat])
    exact = np.moveaxis(full_kspace(real, 1, band, signed=True).numpy(), 0, 2)
    np.testing.assert_allclose(exact, full.real, atol=0.01)
