"""All stages on a simulated GPU (see `pretend_gpu`): no operation mixes devices, and the results match the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import deepbet
import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import KSpace, PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi
from dsiprep.data.results import Blip, UnitResults
from dsiprep.io.bids import find_units
from dsiprep.io.templates import load_template
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.pipeline import preprocess
from dsiprep.settings import (
    AnatomySettings,
    DenoiseSettings,
    DistortionSettings,
    MotionSettings,
    ResampleSettings,
    Settings,
    UnringingSettings,
)
from dsiprep.stages.denoise import denoise_complex
from dsiprep.stages.distortion import correct_distortion
from dsiprep.stages.unringing import unring_references
from helpers import epi_pair as simulation
from helpers import tissue_head as tissues
from helpers.pretend_gpu import GPU, pretend_gpu
from helpers.ringing_slices import ellipses, scanned

CPU = torch.device("cpu")


def run_on_both(work: Callable[[torch.device], Any]) -> list[Any]:
    """Results of `work` on the CPU and on the simulated GPU."""
    contexts: list[tuple[torch.device, AbstractContextManager[Any]]] = [(CPU, nullcontext()), (GPU, pretend_gpu())]
    results = []
    for device, context in contexts:
        with context:
            results.append(work(device))
    return results


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


def test_pepolar_field_matches_the_cpu() -> None:
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
def test_unringing_matches_the_cpu(fraction: float) -> None:
    image = torch.from_numpy(np.abs(scanned(ellipses(count=4), fraction)).astype(np.float32))
    epi = RawEpi("epi", image[None], Grid(tuple(image.shape), np.eye(4)), PhaseEncoding(1, 1), KSpace(2, 1, fraction))

    def work(device: torch.device) -> torch.Tensor:
        (done,), text = unring_references((replace(epi, data=epi.data.to(device)),), UnringingSettings())
        assert "Gibbs ringing is removed" in text
        return done.data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    differing = (on_cpu - on_gpu).abs() > 0.05  # of 250; two shifts that are equally good up to rounding
    assert float(differing.float().mean()) < 2e-3


def test_complex_denoising_matches_the_cpu() -> None:
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


def test_fieldmapless_field_matches_the_cpu() -> None:
    case = tissues.case()
    image = Volume(torch.from_numpy(case.acquire(tissues.UP)), case.grid)

    def work(device: torch.device) -> torch.Tensor:
        return case.correct(image.to(device)).fields[0].data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    assert float((on_cpu - on_gpu).norm(dim=0)[torch.from_numpy(case.brain)].max()) < 0.001


def test_registration_matches_the_cpu() -> None:
    """Including the lowest plane of the template, where the field of view cuts the brain stem."""
    template = load_template("MNI152NLin2009aSym")
    fixed, mask = resample_to_spacing(template.brain, 4.0), resample_to_spacing(template.mask, 4.0)
    pose = np.eye(4)
    pose[:3, 3] = 3.0, -2.0, 4.0

    def work(device: torch.device) -> torch.Tensor:
        moving, target, target_mask = fixed.to(device), fixed.to(device), mask.to(device)
        return register_diffeomorphic(moving, target, pose, fixed_mask=target_mask, finest_mm=4.0).forward.data.cpu()

    on_cpu, on_gpu = run_on_both(work)
    assert float(on_cpu.norm(dim=0).max()) > 2
    assert float((on_cpu - on_gpu).norm(dim=0).max()) < 0.002


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[UnitResults]:
    """Results of the whole pipeline for a small phantom, on the CPU and on the simulated GPU."""
    small = PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=2.5, moved=0.2, ideal=False, seed=3)
    folder = make_phantom(tmp_path_factory.mktemp("phantom"), small)
    settings = Settings(
        motion=MotionSettings(), anatomy=AnatomySettings(finest_mm=4.0), resample=ResampleSettings(resolution=5.0)
    )
    unit = find_units(folder / "bids", settings)[0]
    network = deepbet.BrainExtraction

    def work(device: torch.device) -> UnitResults:
        with pytest.MonkeyPatch.context() as patch:  # deepbet moves its own weights to the GPU
            patch.setattr(deepbet, "BrainExtraction", lambda no_gpu: network(no_gpu=True))
            return preprocess(unit, settings, None, device)

    return run_on_both(work)


@pytest.mark.slow
def test_pipeline_matches_the_cpu(finished: list[UnitResults]) -> None:
    on_cpu, on_gpu = finished
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:0")
    np.testing.assert_allclose(on_cpu.motions[0].transforms, on_gpu.motions[0].transforms, atol=1e-3)
    fields = [result.distortion.fields[0].data for result in finished if result.distortion]
    assert float((fields[0] - fields[1]).norm(dim=0).max()) < 0.001
    poses = [result.coregistration.dwiref_to_acpc.matrix for result in finished]
    np.testing.assert_allclose(*poses, atol=2e-3)
    inside = on_cpu.preprocessed.mask.data > 0.5
    series = [result.preprocessed.dwi.data[:, inside] for result in finished]
    assert float((series[0] - series[1]).abs().max()) < 0.005 * float(series[0].max())
