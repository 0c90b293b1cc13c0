"""Diffusion-weighted volumes against b=0: a step of the head after a single b=0 is found, and none is invented."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.motion.diffusion_to_b0 import align_diffusion_to_b0, b_ranges
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel, build_pyramid
from dsiprep.phantom.head import make_head
from dsiprep.phantom.scanner import FIELD_OF_VIEW, add_noise
from dsiprep.phantom.session import plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import make_tissue

COUNT = 13
STEP = np.r_[np.deg2rad([0.9, 0, -0.6]), 0.5, 1.5, -1.0]


@pytest.fixture(scope="module")
def series() -> tuple[DWI, PyramidLevel]:
    """A still head: one b=0 and twelve directions at b 1000, 4 mm, SNR 25."""
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(COUNT, 3))
    bvecs = directions / np.linalg.norm(directions, axis=1)[:, None]
    bvals = np.r_[0, np.full(COUNT - 1, 1000.0)]
    bvecs[0] = 0
    settings = PhantomSettings(resolution=4.0, moved=0.0, max_motion=0.0, distortion=0.0)
    head = make_head(rng)
    session = plan_session(head, (bvals, bvecs), settings, rng)
    tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, 2.0))
    images = [session.acquire(tissue, volume) for volume in range(COUNT)]
    points = head.brain_points(4) @ session.poses[0, :3, :3].T + session.poses[0, :3, 3]
    brain = np.zeros(session.grid.shape, bool)
    brain[tuple(np.rint(session.grid.to_voxels(points)).astype(int).T)] = True
    sigma = float(images[0][brain].mean() / settings.snr)
    data = np.stack([add_noise(image, sigma, rng) for image in images]).astype(np.float32)
    dwi = DWI(torch.from_numpy(data), session.grid, bvals, bvecs, np.zeros(COUNT, int), np.zeros(COUNT, int))
    mask = Volume(torch.from_numpy(binary_dilation(brain).astype(np.float32)), session.grid)
    return dwi, build_pyramid(dwi, mask, ())[0]


@pytest.mark.parametrize("size", [0.0, 1.0], ids=["still", "step"])
def test_step_between_b0_and_diffusion_is_measured(series: tuple[DWI, PyramidLevel], size: float) -> None:
    """Poses start at the truth, but for a step that all diffusion-weighted volumes share."""
    dwi, level = series
    true = np.tile(np.eye(4), (COUNT, 1, 1))
    step = rigid_matrix(size * STEP, level.points.centre)
    start = np.where(dwi.is_b0[:, None, None], true, true @ step)
    state = MotionState(start, None, np.zeros((10, 3)), np.zeros((COUNT, 4)), None, 2, dwi.grid)
    found, shift = align_diffusion_to_b0(dwi, level, state)
    error = point_displacement(found.transforms, true, level.probe_points())[~dwi.is_b0].mean()
    assert np.isnan(shift.measured[0])
    assert shift.applied[0] == 0
    if size:
        assert error < 0.25
        assert shift.applied[1:].min() > 1.5
        np.testing.assert_allclose(shift.applied[1:], shift.measured[1:], rtol=1e-6)
        _, again = align_diffusion_to_b0(dwi, level, found, shift)
        np.testing.assert_array_equal(again.applied, shift.applied)  # the larger of both, not the rest of the second
    else:
        assert error < 1e-9
        assert not shift.applied.any()
        assert shift.measured[1:].max() < 0.2


def test_ranges_are_shells_or_thirds_of_a_lattice() -> None:
    bvals = np.r_[0, np.tile([3000.0, 1000, 2000], 8)]
    shells = b_ranges(bvals, bvals < 50)
    assert [sorted(set(bvals[part])) for part in shells] == [[1000], [2000], [3000]]
    lattice = np.linspace(0, 5000, 61)
    thirds = b_ranges(lattice, lattice < 50)
    assert [len(part) for part in thirds] == [20, 20, 20]
    few = np.r_[0, [700.0] * 2, [2000.0] * 12]
    assert [len(part) for part in b_ranges(few, few < 50)] == [14]
