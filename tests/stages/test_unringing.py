"""Which runs are unringed and how, and the slice plane in which it is done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import KSpace, PhaseEncoding, k_space
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.data.results import Acquired, Denoised
from dsiprep.settings import AcquisitionSettings, UnringingSettings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.unringing import plan_unringing, unring_b0, unring_references, unring_series
from helpers.ringing_slices import ellipses, rms, scanned, truth_of

AUTO = UnringingSettings()
FULL = KSpace(2, 1, 1.0)


def grid(shape: tuple[int, ...]) -> Grid:
    return Grid((shape[0], shape[1], shape[2]), np.diag([2.0, 2, 2, 1]))


def volumes(image: np.ndarray, axes: tuple[int, int, int] = (0, 1, 2)) -> torch.Tensor:
    """Two volumes of magnitudes whose axes i, j and slices are moved to `axes`."""
    moved = np.moveaxis(np.abs(image).astype(np.float32), (0, 1, 2), axes)
    return torch.from_numpy(np.stack([moved, moved]))


def acquired(data: torch.Tensor, sampled: KSpace | None) -> Acquired:
    bvals, bvecs = np.array([0.0, 1000]), np.array([[0.0, 0, 0], [1, 0, 0]])
    run = RawRun("run", data, grid(tuple(data.shape[1:])), bvals, bvecs, PhaseEncoding(1, 1), k_space=sampled)
    return conform(RawUnit("u", (run,)), AcquisitionSettings())


def unringed(
    data: torch.Tensor, sampled: KSpace | None, settings: UnringingSettings = AUTO
) -> tuple[torch.Tensor, str]:
    raw = acquired(data, sampled)
    found = unring_series(raw, Denoised(raw.dwi, None, None, ""), settings)
    return found.dwi.data, f"{' '.join(found.methods)}: {found.description}"


@pytest.mark.parametrize(
    ("fields", "axis", "method", "words"),
    [
        ({"PartialFourier": 1}, 1, "mrdegibbs", "sampled fully"),
        ({"PartialFourierEnabled": "NO"}, 1, "mrdegibbs", "sampled fully"),
        ({"PartialFourier": 0.75}, 0, "rpg", "partial Fourier 0.75 along i"),
        ({"PartialFourier": 0.75}, None, "none", "no PhaseEncodingDirection"),
        ({"PartialFourier": 0.75, "PartialFourierDirection": "SLICE_SELECT"}, 1, "none", "not give PartialFourier"),
        ({"PartialFourierEnabled": "YES"}, 1, "none", "not give PartialFourier"),
        ({}, 1, "none", "not give PartialFourier"),
    ],
)
def test_choice_from_the_sidecar(fields: dict[str, object], axis: int | None, method: str, words: str) -> None:
    chosen, reason = plan_unringing(k_space(fields, axis), AUTO)
    assert chosen == method
    assert words in reason
    assert plan_unringing(k_space(fields, axis), UnringingSettings("mrdegibbs"))[0] == "mrdegibbs"
    assert plan_unringing(k_space(fields, axis), UnringingSettings("none"))[0] == "none"


def test_interpolated_and_resampled_runs_are_left_alone() -> None:
    image = scanned(ellipses(count=6), 1.0, 1.0)
    spectrum = np.fft.fftshift(np.fft.fft2(image, axes=(0, 1)), (0, 1))
    padded = np.fft.ifft2(np.fft.ifftshift(np.pad(spectrum, ((12, 12), (15, 15), (0, 0))), (0, 1)), axes=(0, 1))
    for data, sampled, words in (
        (volumes(padded), FULL, "so the images were interpolated"),
        (volumes(image), None, "was resampled"),
    ):
        found, text = unringed(data, sampled)
        assert torch.equal(found, data)
        assert text.startswith("none: Gibbs ringing is not removed: ")
        assert words in text
    assert not torch.equal(unringed(volumes(padded), FULL, UnringingSettings("mrdegibbs"))[0], volumes(padded))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("fraction", [1.0, 0.75])
def test_any_slice_axis(axes: tuple[int, int, int], fraction: float) -> None:
    """The plane and the phase-encoding axis follow the acquisition: the result is the same along other axes."""
    fine = ellipses(count=6)
    image = scanned(fine, fraction)
    truth, flat = truth_of(fine)
    found, text = unringed(volumes(image, axes), KSpace(axes[2], axes[1], fraction))
    assert text.startswith("mrdegibbs" if fraction == 1 else "rpg")
    error = np.moveaxis(found[0].numpy(), axes, (0, 1, 2)) - truth
    assert rms(error[flat]) < (0.35 if fraction == 1 else 0.45) * rms((np.abs(image) - truth)[flat])
    assert float(found.min()) >= 0


def test_reconstructed_partial_fourier_has_no_step() -> None:
    """Where the scanner filled in the missing half, nothing is restored."""
    _, text = unringed(volumes(scanned(ellipses(count=6), 1.0, 1.0)), KSpace(2, 1, 0.75))
    assert text.startswith("mrdegibbs")
    assert "not left at zero" in text


def test_signed_intensities_stay_signed() -> None:
    image = scanned(ellipses(count=6), 1.0, 5.0)
    raw = acquired(volumes(image), FULL)
    real = torch.from_numpy(np.stack([image.real.astype(np.float32)] * 2))
    signed: DWI = replace(raw.dwi.with_data(real), signed=True)
    found = unring_series(raw, Denoised(signed, None, None, ""), AUTO).dwi
    assert found.signed
    assert float(found.data.min()) < -3


def test_b0_volumes_and_references() -> None:
    data = volumes(scanned(ellipses(count=6), 0.75))
    sampled = KSpace(2, 1, 0.75)
    whole, _ = unringed(data, sampled)
    for_motion = unring_b0(acquired(data, sampled), AUTO).data
    assert len(for_motion) == 1
    assert torch.equal(for_motion[0], whole[0])
    epi = RawEpi("epi", data, grid(tuple(data.shape[1:])), PhaseEncoding(1, -1), sampled)
    (done,), text = unring_references((epi,), AUTO)
    torch.testing.assert_close(done.data, whole, atol=0.05, rtol=0)
    assert text.startswith("In the images of fmap/: Gibbs ringing is removed")
    assert unring_references((), AUTO) == ((), "")
