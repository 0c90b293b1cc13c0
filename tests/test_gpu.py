"""Stages on a simulated GPU (see `pretend_gpu`) and on a real one: no operation mixes devices, results match the CPU.

These tests need no package that only reads or writes files, so that `benchmarks/gpu.sh` can run them anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import KSpace, PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi
from dsiprep.data.results import Blip
from dsiprep.io.bundled_template import bundled_template
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.settings import DenoiseSettings, DistortionSettings, UnringingSettings
from dsiprep.stages.denoise import denoise_complex
from dsiprep.stages.distortion import correct_distortion
from dsiprep.stages.unringing import unring_references
from helpers import epi_pair as simulation
from helpers import tissue_head as tissues
from helpers.pretend_gpu import pretend_gpu
from helpers.ringing_slices import ellipses, scanned

RunOnBoth = Callable[[Callable[[torch.device], Any]], list[Any]]


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.cuda)])
def run_on_both(request: pytest.FixtureRequest) -> RunOnBoth:
    """A function that returns the results of another one on the CPU and on a GPU."""
    if request.param == "real" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")

    def run(work: Callable[[torch.device], Any]) -> list[Any]:
        gpu: AbstractContextManager[Any] = pretend_gpu() if request.param == "simulated" else nullcontext()
        on_cpu = work(torch.device("cpu"))
        with gpu:
            return [on_cpu, work(torch.device("cuda", 0))]

    return run


def test_simulated_gpu_raises_the_errors_of_a_gpu() -> None:
    on_cpu = torch.ones(2, 3)
    with pretend_gpu() as device:
        on_gpu = on_cpu.to(device)
        assert on_gpu.device.type == (on_gpu + 1).device.type == torch.zeros(2, device=device).device.type == "cuda"
        assert on_cpu.device.type == on_gpu.cpu().device.type == "cpu"
        assert float(on_gpu.sum()) == 6
        assert on_gpu[on_cpu > 0].device.type == "cuda"
        for invalid in (lambda: on_gpu + on_cpu, lambda: torch.stack([on_cpu, on_gpu]), lambda: on_cpu[on_gpu > 0]):
            with pytest.raises(RuntimeError, match="same device"):
                invalid()
        for invalid in (on_gpu.numpy, lambda: np.asarray(on_gpu)):
            with pytest.raises(TypeError, match=r"Tensor\.cpu"):
                invalid()


def test_pepolar_field_matches_the_cpu(run_on_both: RunOnBoth) -> None:
    grid = simulation.make_grid("RAS")
    pe = (PhaseEncoding(1, 1, 0.05), PhaseEncoding(1, -1, 0.05))
    axis = np.array([0.0, 1.0, 0.0])
    images = [
        torch.from_numpy(simulation.acquire(grid, 1, sign, np.eye(4), 5.0, axis)).float()[None] for sign in (1.0, -1.0)
    ]
    blips = tuple(Blip(name, p, torch.zeros(0)) for name, p in zip(("up", "down"), pe, strict=True))
    mask = Volume((images[0][0] > 35).float(), grid)

    def work(device: torch.device) -> torch.Tensor:
        b0s = (images[0].to(device), images[1].to(device))
        return correct_distortion(blips, b0s, grid, mask, DistortionSettings()).fields[0].data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    assert float(on_cpu.abs().max()) > 2
    assert float((on_cpu - on_gpu).norm(dim=0).max()) < 0.001


@pytest.mark.parametrize("fraction", [1.0, 0.75])
def test_unringing_matches_the_cpu(fraction: float, run_on_both: RunOnBoth) -> None:
    image = torch.from_numpy(np.abs(scanned(ellipses(count=4), fraction)).astype(np.float32))
    epi = RawEpi("epi", image[None], Grid(tuple(image.shape), np.eye(4)), PhaseEncoding(1, 1), KSpace(2, 1, fraction))

    def work(device: torch.device) -> torch.Tensor:
        (done,), text = unring_references((replace(epi, data=epi.data.to(device)),), UnringingSettings())
        assert "Gibbs ringing is removed" in text
        return done.data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    differing = (on_cpu - on_gpu).abs() > 0.05  # of 250; two shifts that are equally good up to rounding
    assert float(differing.float().mean()) < 2e-3


def test_complex_denoising_matches_the_cpu(run_on_both: RunOnBoth) -> None:
    rng = np.random.default_rng(0)
    image = 50 + rng.normal(size=(20, 12, 12, 8)) + 1j * rng.normal(size=(20, 12, 12, 8))
    magnitude, phase = (torch.from_numpy(f(image).astype(np.float32)) for f in (np.abs, np.angle))
    grid, none = Grid((12, 12, 8), np.eye(4)), np.zeros(20, int)
    dwi = DWI(magnitude, grid, np.full(20, 1000.0), np.tile([1.0, 0, 0], (20, 1)), none, none)
    mask = Volume(torch.ones(grid.shape), grid)

    def work(device: torch.device) -> torch.Tensor:
        found = denoise_complex(dwi.to(device), phase, mask.to(device), DenoiseSettings(), [2])
        return found.dwi.data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    torch.testing.assert_close(on_gpu, on_cpu, atol=0.01, rtol=0)


def test_fieldmapless_field_matches_the_cpu(run_on_both: RunOnBoth) -> None:
    case = tissues.case()
    image = Volume(torch.from_numpy(case.acquire(tissues.UP)), case.grid)

    def work(device: torch.device) -> torch.Tensor:
        return case.correct(image.to(device)).fields[0].data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    assert float((on_cpu - on_gpu).norm(dim=0)[torch.from_numpy(case.brain)].max()) < 0.001


def test_registration_matches_the_cpu(run_on_both: RunOnBoth) -> None:
    """Including the lowest plane of the template, where the field of view cuts the brain stem."""
    template = bundled_template()
    fixed, mask = resample_to_spacing(template.brain, 4.0), resample_to_spacing(template.mask, 4.0)
    pose = np.eye(4)
    pose[:3, 3] = 3.0, -2.0, 4.0

    def work(device: torch.device) -> torch.Tensor:
        moving, target, target_mask = fixed.to(device), fixed.to(device), mask.to(device)
        return register_diffeomorphic(moving, target, pose, fixed_mask=target_mask, finest_mm=4.0).forward.data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    assert float(on_cpu.norm(dim=0).max()) > 2
    assert float((on_cpu - on_gpu).norm(dim=0).max()) < 0.002
