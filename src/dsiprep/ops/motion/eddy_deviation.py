"""Eddy currents of single volumes beyond what follows the gradient of the same volume.

Eddy currents of earlier gradients decay over seconds, and gradients heat the magnet's shims, so displacements do not
quite follow R g_v. A displacement along the phase-encoding axis p that is linear in space and that the model lacks is
taken for a rotation about the axes perpendicular to p. Rotations displace along the other axes as well: with the
linear part L of an affine map, a rotation has L_pa = -L_ap, and a displacement along p has L_pa alone. Hence the
displacement along p is L_pp, L_pa + L_ap and L_pb + L_bp, and L_aa, L_bb and L_ab + L_ba, which neither can cause, are
the errors of the same fit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsiprep.data.transform import EDDY_MM, EddyCurrents
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.motion.eddy_model import kept_fraction
from dsiprep.ops.motion.gauss_newton import make_targets, normal_equations
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel, chunks
from dsiprep.ops.qspace.prediction import Prediction

__all__ = ["deviation_step"]

ALONG, ERRORS = slice(6, 9), slice(9, 12)  # parameters of the fit, after those of the pose and before the gain


def deviation_step(level: PyramidLevel, weighted: np.ndarray, state: MotionState, predicted: Prediction) -> MotionState:
    """One Gauss-Newton step of the linear terms of eddy currents, volume by volume, fitted together with the poses.

    Terms are kept by the fraction that their size over all volumes exceeds that of the errors of the same fit.

    Parameters
    ----------
    level : PyramidLevel
    weighted : ndarray, (n,)
        Indices of the diffusion-weighted volumes.
    state : MotionState
        With `eddy` and `fit`.
    predicted : Prediction
        Of those volumes.
    """
    eddy = state.eddy
    assert eddy is not None
    steps = predicted.relaxation * np.concatenate(
        [_steps(level, some, state, predicted, part) for part, some in chunks(weighted)]
    )
    deviation = state.deviation[weighted, 1:] - steps[:, ALONG]
    sizes = (float(np.sqrt((x**2).sum(axis=1).mean())) for x in (deviation, steps[:, ERRORS]))
    size, error = sizes
    kept = kept_fraction(size, error**2, len(weighted))
    change = np.zeros_like(state.deviation)
    change[weighted, 1:] = kept * deviation - state.deviation[weighted, 1:]
    return replace(
        state,
        deviation=state.deviation + change,
        eddy=replace(eddy, coefficients=eddy.coefficients + np.pad(change, ((0, 0), (0, 6)))),
    )


def _steps(level: PyramidLevel, some: np.ndarray, state: MotionState, predicted: Prediction, part: slice) -> np.ndarray:
    """Steps of rotation, translation, three terms along the phase-encoding axis (mm) and three errors, (n, 12)."""
    moving, transforms = level.take(some, state.eddy_of(some)), state.transforms[some]
    targets = make_targets(predicted.values[part], level.points)
    assert state.eddy is not None
    assert state.fit is not None
    fit, columns = state.fit.take(part), _columns(transforms, state.eddy, level.points)
    hessian, slope, _ = normal_equations(moving, targets, transforms, fit.gain, fit.scale, affine=True)
    normal = np.swapaxes(columns, 1, 2) @ hessian @ columns
    diagonal = np.einsum("nii->ni", normal)
    normal += 1e-6 * diagonal[:, :, None] * np.eye(columns.shape[2])
    return np.linalg.solve(normal, (np.swapaxes(columns, 1, 2) @ slope[..., None]))[..., :-1, 0]


def _columns(transforms: np.ndarray, eddy: EddyCurrents, points: PointSet) -> np.ndarray:
    """Affine steps and gain (13) of `normal_equations` for a unit of each parameter of the fit, (n, 13, 13).

    Affine steps act in the frame of the head, about the centre of the points; the scanner's axes turn with each pose.
    """
    columns = np.zeros((len(transforms), 13, 13))
    for axis, (i, j) in enumerate(((2, 1), (0, 2), (1, 0))):  # rotations, as in `gauss_newton`
        columns[:, 3 * i + j, axis], columns[:, 3 * j + i, axis] = 1, -1
    columns[:, 9:12, 3:6] = np.eye(3)
    axes = np.swapaxes(transforms[:, :3, :3], 1, 2) @ eddy.axes
    p, (a, b) = eddy.along, [axis for axis in range(3) if axis != eddy.along]
    pairs = [(p, 0), (p, 1), (p, 2), (a, a), (b, b), (a, b)]
    for number, (to, by) in enumerate(pairs):
        columns[:, :9, 6 + number] = np.einsum("ni,nj->nij", axes[:, :, to], axes[:, :, by]).reshape(-1, 9) / EDDY_MM
    columns[:, 12, 12] = 1
    return columns
