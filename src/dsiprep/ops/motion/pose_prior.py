"""Prior on head poses: each volume is expected near the pose the head rests in at that time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsiprep.ops.image.affine import rigid_matrix, rigid_parameters
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.motion.gauss_newton_kernels import FREEDOM
from dsiprep.ops.motion.poses import LEAST_JITTER, geometric_median, pose_scales

__all__ = ["PosePrior", "add_pose_prior", "jitter", "resting_poses"]


@dataclass(frozen=True, eq=False)
class PosePrior:
    """Where volumes are expected: a pull towards `poses` that fades for volumes that are clearly elsewhere.

    The distance d of a pose from where it is expected follows a Student t distribution of scale `jitter`.

    Attributes
    ----------
    poses : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    jitter : float
        mm, per axis, of points at the root mean square distance from the centre.
    """

    poses: np.ndarray
    jitter: float


def _away(transforms: np.ndarray, poses: np.ndarray, centre: np.ndarray, affine: bool) -> np.ndarray:
    """The step that leads from each transform back to its pose, in the parameters of a step, (n, 6 or 12)."""
    difference = np.linalg.inv(poses) @ transforms
    if not affine:
        return rigid_parameters(difference, centre)
    linear = difference[:, :3, :3] - np.eye(3)
    shift = difference[:, :3, 3] + linear @ centre
    return np.concatenate([linear.reshape(-1, 9), shift], axis=1)


def add_pose_prior(
    hessian: np.ndarray,
    slope: np.ndarray,
    transforms: np.ndarray,
    prior: PosePrior,
    points: PointSet,
    scale: np.ndarray,
    affine: bool = False,
) -> None:
    """Add the expectation of prior to normal equations (their first parameters), in units of the residual's variance."""
    away = _away(transforms, prior.poses, points.centre, affine)
    spread = _spread(points)
    lengths = np.ones(away.shape[1])
    if affine:
        lengths[:9] = np.tile(spread, 3)
    else:
        lengths[:3] = np.sqrt((spread**2).sum() - spread**2)
    distance = ((away * lengths) ** 2).sum(axis=1) / prior.jitter**2
    trust = (FREEDOM + 6) / (FREEDOM + distance) * scale**2
    weights = trust[:, None] * (lengths / prior.jitter) ** 2
    index = np.arange(away.shape[1])
    hessian[:, index, index] += weights
    slope[:, index] += weights * away


def resting_poses(matrices: np.ndarray, centre: np.ndarray, width: int = 12, radius: float = 60.0) -> np.ndarray:
    """The pose that the head rests in around each volume: a running geometric median over time.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        In order of acquisition.
    centre : ndarray, (3,)
        mm.
    width : int
        Half the window in volumes; weights fall off linearly.
    radius : float
        Rotations are counted in mm at this distance.

    Returns
    -------
    ndarray, (n, 4, 4)
        Rigid.
    """
    points = rigid_parameters(matrices, centre) * pose_scales(radius)
    width = min(width, len(points) - 1)
    near = np.arange(len(points))[:, None] + np.arange(-width, width + 1)
    weights = 1 - np.abs(np.arange(-width, width + 1)) / (width + 1)
    weights = weights * ((near >= 0) & (near < len(points)))
    prior = geometric_median(points[near.clip(0, len(points) - 1)], weights)
    return rigid_matrix(prior / pose_scales(radius), centre)


def jitter(distances: np.ndarray) -> float:
    """Spread per axis (mm) of poses about prior, from their distances (mm) to it: robust, at least 0.05 mm.

    From the nearest 30 %, so that as much as half the volumes may have moved: of normal distributions along three
    axes, 30 % lie within 1.193 times the spread along one.
    """
    return max(LEAST_JITTER, float(np.quantile(distances, 0.3)) / 1.193)


def _spread(points: PointSet) -> np.ndarray:
    return np.sqrt((points.world.astype(float) ** 2).mean(axis=0))
