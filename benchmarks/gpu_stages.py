"""Every stage on given data, one after the other, for `gpu.py`: inputs from the phantom, without a file of a dataset.

Only what stages import is needed here: neither the grouping of a BIDS dataset, nor the cache, nor N4, which runs on the
CPU and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.data.results import Acquired, Anatomy, Distortion, Motion, Preprocessed
from dsiprep.data.template import Template
from dsiprep.device import with_cpu_fallback
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.phantom.dataset import simulate_t1w
from dsiprep.phantom.head import make_head
from dsiprep.phantom.scanner import FIELD_OF_VIEW, add_noise
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import make_tissue
from dsiprep.settings import (
    AcquisitionSettings,
    AnatomySettings,
    CoregisterSettings,
    DenoiseSettings,
    DistortionSettings,
    MotionSettings,
    ResampleSettings,
)
from dsiprep.stages.acquisition import conform
from dsiprep.stages.anatomy import process_anatomy
from dsiprep.stages.coregister import coregister
from dsiprep.stages.denoise import denoise
from dsiprep.stages.distortion import correct_distortion, mean_diffusion
from dsiprep.stages.dwiref import reference_image
from dsiprep.stages.fieldmapless import correct_without_fieldmap
from dsiprep.stages.motion import estimate_motion
from dsiprep.stages.quality import measure_quality
from dsiprep.stages.resample import resample


@dataclass(frozen=True)
class Step:
    """One stage on fixed inputs.

    Attributes
    ----------
    name : str
    work : callable
        A device to the result of the stage, on the CPU.
    compared : callable
        A result to the numbers that are compared between devices: vectors (3, m), or values (m,).
    unit : str
        Of those numbers: "mm", or "%" of the mean b=0 signal of the brain.
    on_gpu : bool
        Whether the pipeline gives this stage a GPU.
    """

    name: str
    work: Callable[[torch.device], Any]
    compared: Callable[[Any], np.ndarray]
    unit: str = "mm"
    on_gpu: bool = True


def simulate(settings: PhantomSettings) -> tuple[RawUnit, Volume]:
    """The series with its reversed b=0 volumes, and the T1w image, as `read_unit` would give them."""
    table = load_scheme(settings.scheme)
    streams = np.random.default_rng(settings.seed).spawn(4)
    head = make_head(streams[0])
    session = plan_session(head, table, settings, streams[1])
    t1w, t1w_grid, _ = simulate_t1w(head, settings.t1w_resolution, streams[2])
    tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, settings.resolution / 2))
    sigma = _signal_of_brain(session.ideal(tissue, 0.0, np.zeros(3))) / settings.snr
    series = torch.empty((len(session.bvals), *session.grid.shape))
    for v in range(len(series)):
        series[v] = _stored(add_noise(session.acquire(tissue, v), sigma, streams[3]))
    reversed_pe = [
        _stored(add_noise(session.image(tissue, pose, session.reversed_pe), sigma, streams[3]))
        for pose in session.epi_poses
    ]
    run = RawRun("sub-01_dir-PA_dwi.nii.gz", series, session.grid, session.bvals, session.bvecs, session.pe)
    epi = RawEpi("sub-01_dir-AP_epi.nii.gz", torch.stack(reversed_pe), session.grid, session.reversed_pe)
    return RawUnit("sub-01", (run,), (epi,)), Volume(_stored(t1w), t1w_grid)


def _stored(image: np.ndarray) -> torch.Tensor:
    """What a file of integers holds of an image."""
    return torch.from_numpy(np.rint(image).astype(np.float32))


def _signal_of_brain(b0: np.ndarray) -> float:
    """Mean of the brighter half of the head, which is the brain at b=0."""
    head = b0[b0 > 0.1 * b0.max()]
    return float(head[head > np.median(head)].mean())


def steps(
    raw: RawUnit, t1w: Volume, template: Template, resolution: float, finest_mm: float
) -> Generator[Step, Any, None]:
    """The stages in the order of the pipeline; each receives the result of the one before by `send`.

    Parameters
    ----------
    raw, t1w
        From `simulate`.
    template : Template
    resolution : float
        Of the output, mm.
    finest_mm : float
        Voxel size at which the registration to the template ends.
    """
    acquired: Acquired = yield Step(
        "acquisition",
        lambda on: conform(raw, AcquisitionSettings()),
        lambda found: _signals(found.dwi.data, found),
        unit="%",
        on_gpu=False,
    )
    denoised = yield Step("denoise", partial(_denoise, acquired), lambda found: _signals(found.dwi.data, acquired), "%")
    moved: Motion = yield Step("motion", partial(_motion, acquired), partial(_sent_points, acquired.mask))
    inside = moved.mask.data > 0.5
    found: Distortion = yield Step("distortion", partial(_distortion, acquired, moved), partial(_field, inside))
    anatomy: Anatomy = yield Step(
        "anatomy", partial(_anatomy, t1w, template, finest_mm), partial(_normalised, template)
    )
    reference = reference_image(moved, found)
    rigid = CoregisterSettings()
    aligned = yield Step(
        "coregister", lambda on: coregister(reference.dwiref, reference.mask, anatomy, rigid),
        lambda fit: _transformed(fit.dwiref_to_acpc.matrix[None], anatomy.mask), on_gpu=False,
    )  # fmt: skip
    distorted = coregister(moved.dwiref, moved.mask, anatomy, rigid)
    yield Step("fieldmapless", partial(_alone, acquired, moved, anatomy, distorted), partial(_field, inside))
    transforms = ((moved,), found, aligned, anatomy)
    preprocessed = yield Step(
        "resample", partial(_resample, denoised.dwi, transforms, resolution), _preprocessed_signals, "%"
    )
    yield Step(
        "quality", lambda on: measure_quality("sub-01", acquired, denoised, *transforms, preprocessed),
        lambda found: np.asarray(found.confounds["framewise_displacement"], float), on_gpu=False,
    )  # fmt: skip


def _denoise(acquired: Acquired, on: torch.device) -> Any:
    settings = DenoiseSettings()
    return with_cpu_fallback(lambda dwi, mask: denoise(dwi, mask, settings), on, (acquired.dwi, acquired.mask))


def _motion(acquired: Acquired, on: torch.device) -> Motion:
    series = acquired.dwi.select(acquired.dwi.blip == 0)
    pe, settings = acquired.blips[0].pe, MotionSettings()
    return with_cpu_fallback(
        lambda dwi, mask: estimate_motion(dwi, mask, settings, pe, acquired.multiband, acquired.slice_axis),
        on,
        (series, acquired.mask),
    )


def _distortion(acquired: Acquired, moved: Motion, on: torch.device) -> Distortion:
    means, grid, settings = mean_diffusion(acquired.dwi, (moved,)), acquired.dwi.grid, DistortionSettings()
    b0s = (moved.dwiref.data[None], acquired.blips[1].epis)

    def correct(*images: torch.Tensor) -> Distortion:
        return correct_distortion(acquired.blips, images[:2], grid, moved.mask, settings, diffusion=images[2:])

    return with_cpu_fallback(correct, on, (*b0s, *means))


def _anatomy(t1w: Volume, template: Template, finest_mm: float, on: torch.device) -> Anatomy:
    settings = replace(AnatomySettings(), biascorrect="none", finest_mm=finest_mm)
    return with_cpu_fallback(lambda image: process_anatomy((image,), None, None, template, settings), on, (t1w,))


def _alone(acquired: Acquired, moved: Motion, anatomy: Anatomy, start: Any, on: torch.device) -> Distortion:
    pe = acquired.blips[0].pe
    assert pe is not None
    return with_cpu_fallback(
        lambda b0: correct_without_fieldmap(pe, b0, moved.mask, anatomy, start), on, (moved.dwiref,)
    )


def _resample(dwi: Any, transforms: tuple, resolution: float, on: torch.device) -> Preprocessed:
    settings = ResampleSettings(resolution=resolution)
    return with_cpu_fallback(lambda moved: resample(moved, *transforms, settings, "none"), on, (dwi,))


def _signals(data: torch.Tensor, acquired: Acquired) -> np.ndarray:
    """Voxels of the brain in all volumes, in % of the mean b=0 signal."""
    return _relative(data, acquired.mask.data > 0.5, acquired.dwi.is_b0)


def _preprocessed_signals(found: Preprocessed) -> np.ndarray:
    return _relative(found.dwi.data, found.mask.data > 0.5, found.dwi.is_b0)


def _relative(data: torch.Tensor, inside: torch.Tensor, is_b0: np.ndarray) -> np.ndarray:
    inner = data[:, inside]
    return (inner * (100 / inner[torch.as_tensor(is_b0)].mean())).numpy().ravel()


def _sent_points(mask: Volume, found: Motion) -> np.ndarray:
    return _transformed(found.transforms, mask)


def _transformed(matrices: np.ndarray, mask: Volume) -> np.ndarray:
    """Where transforms (n, 4, 4) send six points at 60 mm from the centre of the brain, (3, 6 n)."""
    centre = mask.grid.to_world(np.argwhere(mask.numpy() > 0.5)).mean(0)
    points = centre + 60 * np.concatenate([np.eye(3), -np.eye(3)])
    sent = matrices[:, None, :3, :3] @ points[:, :, None] + matrices[:, None, :3, 3:]
    return np.moveaxis(sent[..., 0], -1, 0).reshape(3, -1)


def _field(inside: torch.Tensor, found: Distortion) -> np.ndarray:
    return found.fields[0].data.numpy()[:, inside.numpy()]


def _normalised(template: Template, found: Anatomy) -> np.ndarray:
    """Where points of the template's brain, every 4 mm, lie in the native T1w image."""
    assert found.acpc_to_template is not None
    grid: Grid = template.mask.grid
    voxels = np.argwhere(template.mask.numpy()[::4, ::4, ::4] > 0.5) * 4
    points = chain_points(found.acpc_to_template, grid.to_world(voxels))
    matrix = found.anat_to_acpc.matrix
    return (points @ matrix[:3, :3].T + matrix[:3, 3]).T
