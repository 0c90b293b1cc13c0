"""Prior on head poses: each volume is expected near the resting pose of the head around that time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsiprep.data.dwi import DWI
from dsiprep.ops.image.affine import point_displacement, rigid_matrix, rigid_parameters
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.motion.gauss_newton_kernels import STUDENT_DOF
from dsiprep.ops.motion.poses import MIN_JITTER_MM, geometric_median, pose_scales

__all__ = [
    "PosePrior",
    "add_pose_prior",
    "estimate_jitter",
    "estimate_pose_prior",
    "negative_log_prior",
    "resting_poses",
    "rms_extent",
]


@dataclass(frozen=True, eq=False)
class PosePrior:
    """Expected poses, with a heavy-tailed penalty on the distance from them.

    The distance of a pose from its expected pose follows a Student t distribution of scale `jitter`, so volumes that
    clearly moved are hardly pulled back.

    Attributes
    ----------
    poses : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    jitter : float
        mm, per axis, of points at the root mean square distance from the centre.
    """

    poses: np.ndarray
    jitter: float

    def take(self, volumes: np.ndarray) -> PosePrior:
        """Prior of the given volumes."""
        return PosePrior(self.poses[volumes], self.jitter)


def estimate_pose_prior(dwi: DWI, transforms: np.ndarray, centre: np.ndarray, probe_points: np.ndarray) -> PosePrior:
    """Resting poses around the time of each volume, run by run, and the jitter of the diffusion-weighted volumes.

    Parameters
    ----------
    dwi : DWI
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    centre : ndarray, (3,)
        World position (mm) that rotations are about.
    probe_points : ndarray, (m, 3)
        World points of the brain (mm) whose displacement is measured.
    """
    poses = np.empty_like(transforms)
    for run in np.unique(dwi.run):
        volumes = dwi.run == run
        poses[volumes] = resting_poses(transforms[volumes], centre)
    distances = point_displacement(transforms, poses, probe_points)[~dwi.is_b0]
    return PosePrior(poses, estimate_jitter(np.sqrt((distances**2).mean(1))))


def add_pose_prior(
    hessian: np.ndarray,
    slope: np.ndarray,
    transforms: np.ndarray,
    prior: PosePrior,
    points: PointSet,
    scale: np.ndarray,
    affine: bool = False,
) -> None:
    """Add the pose prior to normal equations in place, in units of the residual's variance.

    Parameters
    ----------
    hessian, slope : ndarray, (n, p, p) and (n, p)
        Of which the first 6 (rigid) or 12 (affine) parameters are those of the pose.
    transforms : ndarray, (n, 4, 4)
    prior : PosePrior
        Of these volumes.
    points : PointSet
    scale : ndarray, (n,)
        Scale of each volume's residual.
    affine : bool
    """
    step, lengths = _step_to_prior(transforms, prior.poses, points, affine)
    distance = ((step * lengths) ** 2).sum(axis=1) / prior.jitter**2
    precision = (STUDENT_DOF + 6) / (STUDENT_DOF + distance) * scale**2
    weights = precision[:, None] * (lengths / prior.jitter) ** 2
    index = np.arange(step.shape[1])
    hessian[:, index, index] += weights
    slope[:, index] += weights * step


def negative_log_prior(transforms: np.ndarray, prior: PosePrior, points: PointSet) -> np.ndarray:
    """Negative logarithm of the prior density of rigid poses (n, 4, 4), zero at the expected poses, (n,)."""
    step, lengths = _step_to_prior(transforms, prior.poses, points, affine=False)
    distance = ((step * lengths) ** 2).sum(axis=1) / prior.jitter**2
    return (STUDENT_DOF + 6) / 2 * np.log1p(distance / STUDENT_DOF)


def _step_to_prior(
    transforms: np.ndarray, poses: np.ndarray, points: PointSet, affine: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Newton step from each transform to its expected pose, (n, 6 or 12), and mm per unit of it, (6 or 12,)."""
    difference, extent, centre = np.linalg.inv(poses) @ transforms, rms_extent(points), points.centre
    if not affine:
        lengths = np.concatenate([np.sqrt((extent**2).sum() - extent**2), np.ones(3)])
        return rigid_parameters(difference, centre), lengths
    linear = difference[:, :3, :3] - np.eye(3)
    shift = difference[:, :3, 3] + linear @ centre
    return np.concatenate([linear.reshape(-1, 9), shift], axis=1), np.concatenate([np.tile(extent, 3), np.ones(3)])


def resting_poses(matrices: np.ndarray, centre: np.ndarray, width: int = 12, radius: float = 60.0) -> np.ndarray:
    """Resting pose of the head around each volume: a running geometric median over time.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        In order of acquisition.
    centre : ndarray, (3,)
        mm.
    width : int
        Half the window in volumes; weights decrease linearly with distance in time.
    radius : float
        Distance (mm) at which rotations are converted to mm.

    Returns
    -------
    ndarray, (n, 4, 4)
        Rigid.
    """
    points = rigid_parameters(matrices, centre) * pose_scales(radius)
    width = min(width, len(points) - 1)
    window = np.arange(len(points))[:, None] + np.arange(-width, width + 1)
    weights = 1 - np.abs(np.arange(-width, width + 1)) / (width + 1)
    weights = weights * ((window >= 0) & (window < len(points)))
    medians = geometric_median(points[window.clip(0, len(points) - 1)], weights)
    return rigid_matrix(medians / pose_scales(radius), centre)


def estimate_jitter(distances: np.ndarray) -> float:
    """Robust standard deviation per axis (mm) of poses from their distances (mm) to the resting pose, at least 0.05 mm.

    Based on the 30 % quantile, so up to half of the volumes may have moved: of normal distributions along three axes,
    30 % lie within 1.193 standard deviations of one axis.
    """
    return max(MIN_JITTER_MM, float(np.quantile(distances, 0.3)) / 1.193)


def rms_extent(points: PointSet) -> np.ndarray:
    """Root mean square distance (mm) of the points from their centre along each world axis, (3,)."""
    return np.sqrt((points.world.astype(float) ** 2).mean(axis=0))
