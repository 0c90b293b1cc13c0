"""A phantom head with known tissues, acquired with one phase encoding and a known displacement."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Distortion
from dsiprep.data.transform import Affine
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.phantom.head import make_head
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import READOUT_TIME, Source, add_noise, scan
from dsiprep.phantom.session import make_field
from dsiprep.phantom.signal import make_tissue
from dsiprep.stages.fieldmapless import correct_without_fieldmap

VOXEL = 3.0

UP = PhaseEncoding(1, 1, READOUT_TIME)


class Case:
    """A phantom with displacements of up to 8 mm, and its tissues.

    Attributes
    ----------
    grid : Grid
    brain : ndarray, (i, j, k), bool
    known : ndarray, (i, j, k)
        Displacement along y for `UP`, mm.
    maps : Tensor, (3, i, j, k)
        CSF, grey and white matter.
    noise : float
        Standard deviation for an SNR of 20.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        head = make_head(rng)
        affine = np.diag([-VOXEL, VOXEL, VOXEL, 1.0])
        shape = (60, 72, 52)
        affine[:3, 3] = head.centre + np.array([0, 0, -6]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        self.grid = Grid(shape, affine)
        self.head = head
        tissue = make_tissue(head, head.box(VOXEL * np.array(shape) + 40, VOXEL / 2))
        field, field_grid = make_field(head, 8.0, VOXEL * READOUT_TIME)
        self.source = Source(tissue.signal(0.0, np.zeros(3)), tissue.grid, field, field_grid)
        points = self.grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)).reshape(-1, 3)
        atlas, inside = head.atlas, head.to_template(points)
        brain, gm, wm = (interpolate(atlas[n], head.atlas_grid, inside).reshape(shape) for n in ("brain", "gm", "wm"))
        self.brain = brain > 0.5
        self.known = interpolate(field, field_grid, points).reshape(shape) * VOXEL * READOUT_TIME
        maps = torch.from_numpy(np.stack([np.clip(brain - gm - wm, 0, 1), gm, wm]).astype(np.float32))
        self.maps = maps * torch.from_numpy(self.brain)
        self.noise = float(self.acquire(replace(UP, readout_time=0.0))[self.brain].mean()) / 20

    def acquire(self, pe: PhaseEncoding) -> np.ndarray:
        """Distorted, noise-free b=0 image, (i, j, k)."""
        return np.asarray(scan(self.source, self.grid, pe, np.eye(4)), np.float32)

    def mask(self) -> Volume:
        return Volume(torch.from_numpy(self.brain.astype(np.float32)), self.grid)

    def anatomy(self, tissue: torch.Tensor | None) -> Anatomy:
        image = Volume(self.maps.sum(0), self.grid)
        identity = Affine(np.eye(4), "anat", "ACPC")
        return Anatomy("T1w", image, self.mask(), tissue, identity, None, None, "a", None, None)

    def correct(self, b0: Volume, pe: PhaseEncoding = UP, pose_error: float = 0.0) -> Distortion:
        """Correct an image from an initial pose with a rotation error in degrees and a translation error of about half
        as many mm."""
        parameters = np.array([np.deg2rad(pose_error), 0, 0, pose_error / 4, 0, pose_error / 2])
        pose = rigid_matrix(parameters, self.head.centre)
        start = Coregistration(Affine(pose, "dwiref", "ACPC"), 1.0, 1.0, "mi")
        return correct_without_fieldmap(pe, b0, self.mask(), self.anatomy(self.maps), start)

    def correct_noisy(self, pe: PhaseEncoding, pose_error: float = 2.0) -> Distortion:
        """Acquire an image with noise and correct it."""
        image = add_noise(self.acquire(pe), self.noise, np.random.default_rng(7))
        return self.correct(Volume(torch.from_numpy(image), self.grid), pe, pose_error)


case = cache(Case)
