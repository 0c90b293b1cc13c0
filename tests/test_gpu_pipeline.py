"""The whole pipeline on a simulated GPU (see `pretend_gpu`) matches the CPU."""

from __future__ import annotations

import deepbet
import numpy as np
import pytest
import torch

from dsiprep.data.results import UnitResults
from dsiprep.io.bids import find_units
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.pipeline import preprocess
from dsiprep.settings import AnatomySettings, MotionSettings, ResampleSettings, Settings
from helpers.pretend_gpu import pretend_gpu


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

    on_cpu = work(torch.device("cpu"))
    with pretend_gpu() as gpu:
        return [on_cpu, work(gpu)]


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
