"""Where the voxels of a volume, whose slices have poses of their own, would be if it had one pose."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.motion import Motion
from dsiprep.data.transform import DisplacementField, EddyCurrents
from dsiprep.ops.image.interpolation import sample_linear
from dsiprep.ops.motion.slice_reconstruction import reconstruct

__all__ = ["in_one_pose", "volume_in_mean_pose"]

INVERSE_ITERATIONS = 3  # of the fixed-point inversion of displacements


def volume_in_mean_pose(
    volume: torch.Tensor,
    grid: Grid,
    motion: Motion,
    row: int,
    blip_pose: np.ndarray,
    distortion: DisplacementField | None,
) -> torch.Tensor:
    """Volume `row` of `motion` as it would have been in its mean pose, (i, j, k); as acquired without `motion.slices`.

    Parameters
    ----------
    volume : Tensor, (i, j, k)
    grid : Grid
    motion : Motion
    row : int
    blip_pose : ndarray, (4, 4)
        Points of the undistorted reference to points of that of this blip.
    distortion : DisplacementField or None
        Of this blip.
    """
    slices = motion.slices
    if slices is None:
        return volume
    image, axis = volume.cpu().numpy(), motion.slice_axis
    eddy = None if motion.eddy is None else motion.eddy.take(np.array([row]))
    used = np.moveaxis(np.broadcast_to(~slices.left_out[row], np.moveaxis(image, axis, -1).shape), -1, axis)
    voxels = np.argwhere(used)
    poses = slices.slice_poses[row]
    points = in_one_pose(voxels, grid, poses, axis, motion.transforms[row], blip_pose, distortion, eddy)
    elsewhere = image.copy()
    mine = slices.gaps[:, 0] == row
    elsewhere[tuple(slices.gaps[mine, 1:].T)] = slices.gap_values[mine]
    values = image[tuple(voxels.T)].astype(np.float32)
    return torch.from_numpy(reconstruct(values, points, elsewhere).values).to(volume.device)


def in_one_pose(
    voxels: np.ndarray,
    grid: Grid,
    poses: np.ndarray,
    axis: int,
    pose: np.ndarray,
    blip_pose: np.ndarray | None = None,
    distortion: DisplacementField | None = None,
    eddy: EddyCurrents | None = None,
) -> np.ndarray:
    """Voxel coordinates in a volume of one pose of what was acquired in voxels whose slices have other poses.

    Parameters
    ----------
    voxels : ndarray, (m, 3) int
    grid : Grid
        Of the volume.
    poses : ndarray, (slices, 4, 4)
        Points of the reference to points of each slice.
    axis : int
        Across slices.
    pose : ndarray, (4, 4)
        The one pose.
    blip_pose, distortion : optional
        Point x of the undistorted reference is acquired at pose @ blip_pose @ x + distortion(x).
    eddy : EddyCurrents, optional
        Of this volume alone.

    Returns
    -------
    ndarray, (m, 3), float32
    """
    back = np.eye(4) if blip_pose is None else np.linalg.inv(blip_pose)
    acquired = grid.to_world(voxels)
    undisplaced = acquired
    if eddy is not None:
        for _ in range(INVERSE_ITERATIONS):
            undisplaced = acquired - eddy.displacement(0, undisplaced)
    to_head, number = back @ np.linalg.inv(poses), voxels[:, axis]
    head, u = _moved(to_head, undisplaced, number), np.zeros_like(undisplaced)
    if distortion is not None:
        for _ in range(INVERSE_ITERATIONS):
            u = _displacement(distortion, head)
            head = _moved(to_head, undisplaced - u, number)
        u = _displacement(distortion, head)
    there = pose @ np.linalg.inv(back)
    world = head @ there[:3, :3].T + there[:3, 3] + u
    if eddy is not None:
        world = world + eddy.displacement(0, world)
    return grid.to_voxels(world).astype(np.float32)


def _moved(matrices: np.ndarray, points: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Points (m, 3), each by the matrix (slices, 4, 4) of its slice, whose numbers are `number` (m,)."""
    out, order = np.empty_like(points), np.argsort(number, kind="stable")
    ends = np.searchsorted(number[order], np.arange(len(matrices) + 1))
    for matrix, first, last in zip(matrices, ends[:-1], ends[1:], strict=True):
        rows = order[first:last]
        out[rows] = points[rows] @ matrix[:3, :3].T + matrix[:3, 3]
    return out


def _displacement(field: DisplacementField, points: np.ndarray) -> np.ndarray:
    """Displacement in mm at world points (m, 3)."""
    voxels = torch.as_tensor(field.grid.to_voxels(points).T.copy(), dtype=torch.float32)
    return sample_linear(field.data.cpu().float(), voxels).numpy().T.astype(float)
