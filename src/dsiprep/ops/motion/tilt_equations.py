"""Gauss-Newton steps of the poses of tilted volumes and of the fields that change with the tilt.

Where the field of volume v lacks w = s_v t_v . f, its image differs from the prediction I by -div(w I d): the residual
is linear in the values and in the slopes of the two fields f. The equations of all volumes are summed at each point and
projected on the splines; the pose of every volume, its gain and how much interpolation blurs it are eliminated (Schur
complement), so that the fields explain only what a pose cannot, and poses do not bend to the fields. Volumes are
predicted from one another, and a prediction holds the mean tilt of the volumes it is made of: t_v stands for the tilt
of the volume less that of its prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg

from dsiprep.ops.image.point_set import target_gradients
from dsiprep.ops.motion.gauss_newton import apply_steps
from dsiprep.ops.motion.gauss_newton_kernels import STUDENT_DOF
from dsiprep.ops.motion.tilted_series import TiltedSeries

__all__ = ["TiltEquations", "pose_step", "solve_fields", "tilt_equations"]

OWN_TERMS = 8  # of each volume: rotation vector, translation, gain, blur
LEAST_JACOBIAN = 0.1
TOLERANCE, MAX_ITERATIONS = 1e-2, 100  # of conjugate gradients


@dataclass(frozen=True, eq=False)
class TiltEquations:
    """Normal equations of the fields, and of pose, gain and blur of each of k volumes.

    Attributes
    ----------
    volumes : ndarray, (k,), int
    products : ndarray, (3, 3, i, j, k), float32
        Sums over volumes of the weighted products of [I', I] (rows 00, 01, 11) with those of the tilts (columns 00,
        01, 11).
    side : ndarray, (2, count)
        Right-hand side of the fields.
    own : ndarray, (k, 8, 8)
        Normal matrix of pose, gain and blur.
    own_side : ndarray, (k, 8)
    mixed : ndarray, (k, 8, count)
        Products of these with a field, for a tilt of 1.
    tilts : ndarray, (k, 2)
        t_v in degrees times s_v, less that of the prediction.
    """

    volumes: np.ndarray
    products: np.ndarray
    side: np.ndarray
    own: np.ndarray
    own_side: np.ndarray
    mixed: np.ndarray
    tilts: np.ndarray


def tilt_equations(
    series: TiltedSeries,
    volumes: np.ndarray,
    tilts: np.ndarray,
    observed: torch.Tensor,
    predicted: torch.Tensor,
    usable: np.ndarray,
    axis: int,
) -> TiltEquations:
    """Sum the equations of some volumes.

    Parameters
    ----------
    series : TiltedSeries
    volumes : ndarray, (k,)
    tilts : ndarray, (k, 2)
        As in `TiltEquations`.
    observed, predicted : Tensor, (k, m)
        Of these volumes.
    usable : ndarray, (k, m) bool
        Whether a point counts in a volume.
    axis : int
        Voxel axis along which the fields displace: that of phase encoding, or another as a control.
    """
    basis = series.basis
    products, side = np.zeros((3, 3, *series.grid.shape), np.float32), np.zeros((2, basis.knots.count))
    own, own_side, mixed = [], [], []
    for row, (v, displacement) in enumerate(zip(volumes, series.displacements(volumes), strict=True)):
        image, residual, weight = _fit(observed[row].numpy(), predicted[row].numpy(), usable[row])
        encoded = np.linalg.solve(series.transforms[v, :3, :3], displacement.direction)
        slope = series.at_points(displacement.slope.numpy()).T
        jacobian = (1 + slope @ encoded).clip(min=LEAST_JACOBIAN).astype(np.float32)
        still = image / jacobian
        gradient = target_gradients(torch.from_numpy(still)[None], series.points)[0].numpy()
        along = gradient @ np.linalg.solve(series.transforms[v, :3, :3], series.grid.directions[:, axis])
        gradient = jacobian[:, None] * gradient - slope * (gradient @ encoded)[:, None]
        blurred = image[series.points.neighbours].mean(axis=1) - image
        own_terms = (np.cross(series.points.world, gradient), gradient, image[:, None], blurred[:, None])
        nuisance = np.concatenate(own_terms, axis=1)
        weighted = nuisance * weight[:, None]
        own.append(nuisance.T.astype(float) @ weighted)
        own_side.append(weighted.T.astype(float) @ residual)
        by_value = _projected(series, np.vstack([weighted.T * along, weight * along * residual]), None)
        by_slope = _projected(series, np.vstack([weighted.T * still, weight * still * residual]), axis)
        joint = by_value + by_slope
        mixed.append(joint[:OWN_TERMS])
        side += tilts[row][:, None] * joint[OWN_TERMS]
        pairs = np.stack([weight * along * along, weight * along * still, weight * still * still])
        p, r = tilts[row]
        tilt_pairs = np.array([p * p, p * r, r * r], np.float32)[None, :, None, None, None]
        products += tilt_pairs * series.on_grid(pairs)[:, None]
    return TiltEquations(volumes, products, side, np.stack(own), np.stack(own_side), np.stack(mixed), tilts)


def solve_fields(equations: TiltEquations, series: TiltedSeries, prior: sparse.csr_matrix, axis: int) -> np.ndarray:
    """Change of the coefficients of `series`, (2, count), for a prior of precision `prior` on those that result.

    Residuals are observed less predicted, which a missing displacement makes negative.
    """
    basis, count = series.basis, series.basis.knots.count
    own = equations.own + 1e-9 * np.trace(equations.own, axis1=1, axis2=2)[:, None, None] * np.eye(OWN_TERMS)
    whitened = np.linalg.inv(np.linalg.cholesky(own))
    half = np.einsum("kab,kbc->kac", whitened, equations.mixed).reshape(-1, count)
    factor = np.repeat(equations.tilts, OWN_TERMS, axis=0)
    explained = np.einsum("kab,kb->ka", whitened, equations.own_side).reshape(-1)
    side = -(equations.side - factor.T * explained @ half) - (prior @ series.coefficients.T).T

    def product(flat: np.ndarray) -> np.ndarray:
        c = flat.reshape(2, count)
        values, slopes = basis.evaluate(c), basis.evaluate(c, axis)
        first, second = (_combined(equations.products[n : n + 2], values, slopes) for n in (0, 1))
        data = basis.adjoint(first) + basis.adjoint(second, axis)
        projected = (factor * (half @ c.T)).sum(axis=1)
        return (data - (factor.T * projected) @ half + (prior @ c.T).T).ravel()

    solution, _ = cg(
        LinearOperator((2 * count, 2 * count), product), side.ravel(), rtol=TOLERANCE, maxiter=MAX_ITERATIONS
    )
    return solution.reshape(2, count)


def pose_step(equations: TiltEquations, series: TiltedSeries, change: np.ndarray) -> np.ndarray:
    """Transforms of all volumes after the step of the poses that goes with a change of the coefficients, (n, 4, 4)."""
    of_fields = np.einsum("kac,kc->ka", equations.mixed, equations.tilts @ change)
    steps = np.linalg.solve(equations.own, (equations.own_side + of_fields)[..., None])[..., 0]
    transforms = series.transforms.copy()
    rows = equations.volumes
    transforms[rows], _ = apply_steps(transforms[rows], steps[:, :6], series.points)
    return transforms


def _combined(products: np.ndarray, values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Products (2, 3, i, j, k) of I' or I with both, applied to values and slopes (2, i, j, k) of both fields."""
    (aa, ab, bb) = (products[0, n] for n in range(3))
    (cc, cd, dd) = (products[1, n] for n in range(3))
    first = aa * values[0] + ab * values[1] + cc * slopes[0] + cd * slopes[1]
    second = ab * values[0] + bb * values[1] + cd * slopes[0] + dd * slopes[1]
    return np.stack([first, second])


def _projected(series: TiltedSeries, values: np.ndarray, axis: int | None) -> np.ndarray:
    return series.basis.adjoint(series.on_grid(values), axis)


def _fit(observed: np.ndarray, predicted: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prediction times its gain, residuals, and their Student t weights over the variance; each (m,) float32."""
    gain = float(observed[usable] @ predicted[usable]) / max(float(predicted[usable] @ predicted[usable]), 1e-12)
    image = (gain * predicted).astype(np.float32)
    residual = (observed - image).astype(np.float32)
    scale = max(1.4826 * float(np.median(np.abs(residual[usable]))), 1e-9)
    weight = usable * (STUDENT_DOF + 1) / (STUDENT_DOF + (residual / scale) ** 2) / scale**2
    return image, residual, weight.astype(np.float32)
