"""The slices of one volume against its prediction in the head: normal equations for the pose of each shot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.motion import shot_of_slices
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.image.interpolation import spline_coefficients
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.motion.carried_field import CarriedField
from dsiprep.ops.motion.pyramid import chunks
from dsiprep.ops.motion.slice_kernels import PARAMETERS, gather_slices_loop, slice_equations_loop

__all__ = ["PredictedSlices", "ShotEquations"]

MARGIN = 4  # voxels around the brain, into which predictions are continued by their nearest values
GAIN_SPREAD = 0.03  # of the gain of slices about that of their volume
LOST_SPREAD = 1.0  # the same for slices with signal dropout
LEAST_JACOBIAN = 0.1
BENT_MM = 0.05  # displacement from which on the field of a turned head is taken into account


@dataclass(frozen=True, eq=False)
class ShotEquations:
    """Cost of a volume as a function of the poses of its shots, and what else was fitted.

    Attributes
    ----------
    hessian, slope : ndarray, (shots, 6, 6) and (shots, 6)
        The cost of a change d of the pose T to T @ rigid_matrix(d, centre) is d' hessian d / 2 - slope' d.
    cost : ndarray, (shots,)
        Minus the logarithm of the likelihood, without constants that depend on the scale.
    gain : ndarray, (slices,)
        That would minimise the cost at these poses.
    scale : float
        Of the residual, re-estimated.
    voxels : ndarray, (shots,)
        Voxels of brain.
    """

    hessian: np.ndarray
    slope: np.ndarray
    cost: np.ndarray
    gain: np.ndarray
    scale: float
    voxels: np.ndarray


@dataclass(frozen=True, eq=False)
class PredictedSlices:
    """A series, its predictions, and which slices are acquired together.

    Attributes
    ----------
    dwi : DWI
        As acquired.
    points : PointSet
        Voxels of the head.
    predicted : Tensor, (n, m)
        Each volume at `points`.
    eddy : EddyCurrents or None
    slice_axis : int
    shots : tuple of tuple of int
        Slices of each shot, in order of acquisition.
    lost : ndarray, (n, slices) bool
        Slices with signal dropout.
    field : CarriedField or None
        Displacement by off-resonance on the grid of `points`; None if it is not known.
    """

    dwi: DWI
    points: PointSet
    predicted: torch.Tensor
    eddy: EddyCurrents | None
    slice_axis: int
    shots: tuple[tuple[int, ...], ...]
    lost: np.ndarray
    field: CarriedField | None = None

    @cached_property
    def shot_of(self) -> np.ndarray:
        """Shot of each slice, (slices,)."""
        return shot_of_slices(self.shots)

    @cached_property
    def _field_in_box(self) -> np.ndarray:
        """Table of the field on the grid around the points, (a, b, c, 4); empty if it is not known."""
        if self.field is None:
            return np.zeros((0, 0, 0, 4), np.float32)
        grid = self._box[0]
        low = np.rint(self.points.grid.to_voxels(grid.to_world(np.zeros(3)))).astype(int)
        return self.field.around(low, grid.shape)

    def is_bent(self, poses: np.ndarray) -> np.ndarray:
        """Whether poses (..., 4, 4) alone miss a part of the displacement by the field that counts, (...)."""
        missed = np.zeros(poses.shape[:-2]) if self.field is None else self.field.largest_bend(poses)
        return missed > BENT_MM

    def _turns(self, poses: np.ndarray) -> np.ndarray:
        """What the field adds in each pose (..., 4, 4), in voxels of the head per mm, (..., 3) float32."""
        none = np.zeros((*poses.shape[:-2], 3))
        return (none if self.field is None else self.field.turns(poses)).astype(np.float32)

    @cached_property
    def _box(self) -> tuple[Grid, np.ndarray, np.ndarray]:
        """Grid around the points, the nearest point of each voxel, and whether the voxel is one of the points."""
        voxels = self.points.voxels.astype(int)
        low = voxels.min(0) - MARGIN
        shape = tuple(int(n) for n in np.ptp(voxels, axis=0) + 1 + 2 * MARGIN)
        affine = self.points.grid.affine.copy()
        affine[:3, 3] = self.points.grid.to_world(low)
        index = np.full(shape, -1)
        index[tuple((voxels - low).T)] = np.arange(len(voxels))
        nearest = distance_transform_edt(index < 0, return_distances=False, return_indices=True)
        return Grid((shape[0], shape[1], shape[2]), affine), index[tuple(nearest)], index >= 0

    def coefficients(self, volume: int) -> np.ndarray:
        """Cubic B-spline coefficients of the prediction of a volume on the grid around the points."""
        values = self.predicted[volume].cpu().numpy()[self._box[1]]
        return spline_coefficients(torch.from_numpy(values)[None])[0].numpy()

    def equations(
        self, volume: int, coefficients: np.ndarray, poses: np.ndarray, gain: np.ndarray, scale: float
    ) -> ShotEquations:
        """Equations of a volume at the poses (shots, 4, 4) of its shots; `gain` (slices,) and scale held fixed."""
        grid, _, inside = self._box
        acquired = self.dwi.grid
        to_world = grid.affine[:3].copy()
        to_world[:, 3] -= self.points.centre
        maps = (np.linalg.inv(grid.affine) @ np.linalg.inv(poses) @ acquired.affine)[:, :3]
        eddy = eddy_on_grid(None if self.eddy is None else self.eddy.take(np.array([volume])), acquired)
        count = acquired.shape[self.slice_axis]
        table = self._field_in_box if self.is_bent(poses).any() else self._field_in_box[:0]
        hessian = np.zeros((count, PARAMETERS, PARAMETERS))
        slope, sums = np.zeros((count, PARAMETERS)), np.zeros((count, 3))
        slice_equations_loop(
            self.dwi.data[volume].cpu().numpy(), coefficients, inside, maps[self.shot_of].astype(np.float32),
            to_world.astype(np.float32), np.linalg.inv(to_world[:, :3]).T.astype(np.float32), self.slice_axis,
            eddy.coefficients, eddy.frame, eddy.along, table, self._turns(poses)[self.shot_of],
            np.zeros(3, np.float32) if self.field is None else self.field.direction.astype(np.float32), gain, scale,
            hessian, slope, sums,
        )  # fmt: skip
        return self._by_shot(volume, hessian, slope, sums, gain, scale)

    def _by_shot(
        self,
        volume: int,
        hessian: np.ndarray,
        slope: np.ndarray,
        sums: np.ndarray,
        gain: np.ndarray,
        scale: float,
    ) -> ShotEquations:
        """Eliminate the gain of each slice, which is expected near that of the volume, and sum over shots."""
        new_scale = float(np.sqrt(sums[:, 1].sum() / max(sums[:, 2].sum(), 1))) + 1e-12
        variance = min(scale, new_scale) ** 2 if np.isfinite(scale) else new_scale**2
        square, side, mixed = hessian[:, 6, 6], -slope[:, 6], hessian[:, 6, :6]
        intact = ~self.lost[volume]
        total = max(float(square[intact].sum()), 1e-12)
        mean = float((square * gain + side)[intact].sum() / total) if intact.any() else 1.0
        spread = np.where(intact, GAIN_SPREAD, LOST_SPREAD) * max(abs(mean), 1e-3)
        precision = variance / spread**2
        side = side + precision * (mean - gain)
        square = square + precision
        full = np.tril(hessian[:, :6, :6]) + np.swapaxes(np.tril(hessian[:, :6, :6], -1), 1, 2)
        reduced = full - mixed[:, :, None] * mixed[:, None, :] / square[:, None, None]
        reduced_slope = -slope[:, :6] - mixed * (side / square)[:, None]
        shots = len(self.shots)
        out_h, out_s, out_sums = np.zeros((shots, 6, 6)), np.zeros((shots, 6)), np.zeros((shots, 3))
        np.add.at(out_h, self.shot_of, reduced / variance)
        np.add.at(out_s, self.shot_of, reduced_slope / variance)
        np.add.at(out_sums, self.shot_of, sums)
        return ShotEquations(out_h, out_s, out_sums[:, 0], gain + side / square, new_scale, out_sums[:, 2])

    def samples(self, volumes: np.ndarray, poses: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Volumes at the points, by the poses (v, shots, 4, 4) of their shots, and the weight of the samples; (v, m).

        Slices with signal dropout are left out. Where the weight is 0 there is no sample, and the value is 0.
        """
        acquired, i_j_k = self.dwi.grid, tuple(self.points.voxels.astype(int).T)
        table = np.zeros((0, 4), np.float32) if self.field is None else self.field.table[i_j_k]
        turns = self._turns(poses)
        bends = _moved_with(np.linalg.inv(acquired.affine) @ poses @ self.points.grid.affine, turns)
        total = np.zeros((len(volumes), len(self.points)), np.float32)
        weight = np.zeros_like(total)
        for part, some in chunks(volumes):
            maps = (np.linalg.inv(acquired.affine) @ poses[part] @ self.points.grid.affine)[..., :3, :]
            eddy = eddy_on_grid(None if self.eddy is None else self.eddy.take(some), acquired)
            gather_slices_loop(
                self.dwi.data[torch.as_tensor(some, device=self.dwi.data.device)].cpu().numpy(), self.points.voxels,
                maps[:, self.shot_of].astype(np.float32), self.slice_axis, ~self.lost[some], eddy.coefficients,
                eddy.frame, eddy.along, table, bends[part][:, self.shot_of], turns[part][:, self.shot_of],
                total[part], weight[part],
            )  # fmt: skip
        return torch.from_numpy(total / np.maximum(weight, 1e-6)), torch.from_numpy(weight)

    def prediction_at(
        self, volume: int, voxels: np.ndarray, pose: np.ndarray, gain: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted intensity of a volume in one pose at its voxels (g, 3), (g,), and whether that is in the brain."""
        grid, nearest, inside = self._box
        world = self.dwi.grid.to_world(voxels)
        if self.eddy is not None:
            world = world - self.eddy.displacement(volume, world)
        back = np.linalg.inv(grid.affine) @ np.linalg.inv(pose)
        at, jacobian = (world @ back[:3, :3].T + back[:3, 3]).T, np.ones(len(world), np.float32)
        if self.field is not None:
            at, jacobian = _undone(self._field_in_box, self._turns(pose), at)
        values = map_coordinates(self.predicted[volume].cpu().numpy()[nearest], at, order=1, mode="nearest")
        brain = map_coordinates(inside.astype(np.float32), at, order=1) > 0.5
        return (gain * values / jacobian).astype(np.float32), brain

    def with_predictions(self, predicted: torch.Tensor) -> PredictedSlices:
        """Copy with other predictions."""
        return replace(self, predicted=predicted)


def _moved_with(maps: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) by the linear parts of maps (..., 4, 4), (..., 3) float32."""
    return np.einsum("...ab,...b->...a", maps[..., :3, :3], vectors).astype(np.float32)


def _undone(table: np.ndarray, turn: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxel coordinates (3, m) without what the field of a turned head adds, and the Jacobian determinant, (m,)."""
    point = at
    for _ in range(2):
        u = map_coordinates(table[..., 0], point, order=1, mode="nearest")
        point = at - turn[:, None] * u
    slopes = np.stack([map_coordinates(table[..., 1 + c], point, order=1, mode="nearest") for c in range(3)])
    return point, np.maximum(1 + turn @ slopes, LEAST_JACOBIAN)
