"""Drift of the signal over a scan: measured on b=0 volumes, or on the gain of every volume over its prediction."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Drift
from dsiprep.ops.qspace.prediction import choose_model_for, predict

METHODS = {
    "drift": (
        "Drift of the signal over the scan was estimated from the b=0 volumes of each run, or, without enough of them, "
        "from the gain of each volume over its prediction by the others with a 3dSHORE model. A linear or quadratic "
        "function of time was fitted and, where significant, divided out [@vos2017]."
    )
}
LEAST_B0S = 5  # over most of a run; fewer do not tell drift from the scatter of single volumes
LEAST_COVERED = 0.6  # of the run, between its first and last b=0
SIGNIFICANT = 0.01
LEAST_DRIFT = 0.005  # over the run; less is left as it is
MOST_DRIFT = 0.4
ROUNDS = 3  # of prediction: each takes most of the drift out of what predicts
POINTS = 4000  # voxels of the brain in which volumes are predicted
HUBER = 1.5  # standard deviations beyond which a volume has less weight


def estimate_drift(dwi: DWI, mask: Volume) -> Drift:
    """Gain of each volume relative to the first of its run.

    Parameters
    ----------
    dwi : DWI
        As acquired, with volumes in order of acquisition.
    mask : Volume
        Rough brain mask, 0 or 1.

    Returns
    -------
    Drift
        Gains are 1 in runs without significant drift.

    References
    ----------
    Vos et al. 2017, Magn Reson Med 77:285, doi 10.1002/mrm.26124.
    """
    gains, measured, notes = np.ones(len(dwi)), np.full(len(dwi), np.nan), []
    inside = mask.data.to(dwi.data.device) > 0
    for run in np.unique(dwi.run):
        volumes = np.flatnonzero(dwi.run == run)
        time = np.linspace(0, 1, len(volumes))
        b0 = dwi.is_b0[volumes]
        if b0.sum() >= LEAST_B0S and np.ptp(time[b0]) >= LEAST_COVERED:
            found = np.array([float(dwi.data[int(v)][inside].mean()) for v in volumes[b0]])
            fit, order = _fit(time[b0], found, np.ones(len(found)), np.ones((len(found), 1)))
            gain, scale = _evaluate(fit, time)
            measured[volumes[b0]], source = found / scale, f"{len(found)} b=0 volumes"
        else:
            gain, order, found = _from_predictions(dwi, volumes, inside, time)
            measured[volumes], source = found, "the gain of volumes over their prediction"
        change = gain[-1] - 1
        if order and np.ptp(gain) > MOST_DRIFT:
            notes.append(f"A drift of {change:+.0%} from {source} is too large to be believed, and is not corrected.")
        elif order and np.ptp(gain) >= LEAST_DRIFT:
            gains[volumes] = gain
            notes.append(f"{('Linear', 'Quadratic')[order - 1]} drift of {change:+.1%} over the run, from {source}.")
    return Drift(gains, measured, tuple(notes))


def without_drift(dwi: DWI, drift: Drift) -> DWI:
    """Divide every volume by its gain; the series itself if there is no drift."""
    if (drift.gains == 1).all():
        return dwi
    gains = torch.as_tensor(drift.gains, dtype=torch.float32, device=dwi.data.device)
    return dwi.with_data(dwi.data / gains[:, None, None, None])


def _from_predictions(
    dwi: DWI, volumes: np.ndarray, inside: torch.Tensor, time: np.ndarray
) -> tuple[np.ndarray, int, np.ndarray]:
    """Gain (n,), order of the polynomial (0 if there is no drift) and measured gains (n,; NaN at b=0) of a run."""
    weighted = np.flatnonzero(~dwi.is_b0[volumes])
    gain, measured = np.ones(len(volumes)), np.full(len(volumes), np.nan)
    b0, bvals, bvecs = dwi.is_b0[volumes], dwi.bvals[volumes][weighted], dwi.bvecs[volumes][weighted]
    model = choose_model_for(bvals, "auto")
    if model.name != "3dSHORE" or not b0.any():
        return gain, 0, measured
    voxels = torch.nonzero(inside.flatten())[:, 0]
    voxels = voxels[:: max(1, len(voxels) // POINTS)]
    samples = torch.stack([dwi.data[int(v)].flatten()[voxels] for v in volumes])
    # what 3dSHORE misses depends on b, and volumes may be ordered by b
    nuisance = np.stack([np.ones(len(bvals)), np.sqrt(bvals / bvals.max()), bvals / bvals.max()], 1)
    pose, order = np.tile(np.eye(4), (len(weighted), 1, 1)), 0
    for _ in range(ROUNDS):
        corrected = samples / torch.as_tensor(gain, dtype=samples.dtype, device=samples.device)[:, None]
        observed, reference = corrected[weighted], corrected[np.flatnonzero(b0)].mean(0, keepdim=True)
        predicted = predict(observed, reference, model, bvals, bvecs, pose, np.ones(len(weighted))).values
        power = (predicted * predicted).sum(1)
        ratio = ((predicted * observed).sum(1) / power).cpu().numpy().astype(float)
        fit, found = _fit(time[weighted], ratio, power.cpu().numpy().astype(float), nuisance)
        order = max(order, found)
        gain = gain * _evaluate(fit, time)[0]
        measured[weighted] = ratio
    measured[weighted] *= gain[weighted]
    return gain, order, measured


def _fit(time: np.ndarray, values: np.ndarray, weight: np.ndarray, nuisance: np.ndarray) -> tuple[np.ndarray, int]:
    """Polynomial in time of the significant order: coefficients (3,) of 1, t, t², and the order, 0 to 2.

    The first column of `nuisance` (n, k) is constant. Volumes far off the fit have less weight (Huber).
    """
    powers = np.stack([time, time**2], 1)
    weight = weight / weight.mean()
    full = np.column_stack([nuisance, powers])
    for _ in range(10):
        off = values - full @ _solve(full, values, weight)
        spread = 1.4826 * np.median(np.abs(off)) + 1e-12
        robust = weight * np.minimum(1, HUBER * spread / np.maximum(np.abs(off), 1e-12))
        weight = 0.5 * (weight + robust / max(float(robust.mean()), 1e-12))
    fits = [np.column_stack([nuisance, powers[:, :order]]) for order in range(3)]
    squares = [float((weight * (values - basis @ _solve(basis, values, weight)) ** 2).sum()) for basis in fits]
    order = 2 if _improves(squares, 1, 2, len(values), full.shape[1]) else 0
    if not order and _improves(squares, 0, 1, len(values), full.shape[1] - 1):
        order = 1
    if not order and _improves(squares, 0, 2, len(values), full.shape[1]):
        order = 2
    solution = _solve(fits[order], values, weight)
    coefficients = np.zeros(3)
    coefficients[0] = solution[0]
    coefficients[1 : 1 + order] = solution[nuisance.shape[1] :]
    return coefficients, order


def _solve(basis: np.ndarray, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    root = np.sqrt(weight)
    return np.linalg.lstsq(basis * root[:, None], values * root, rcond=None)[0]


def _improves(squares: list[float], low: int, high: int, count: int, parameters: int) -> bool:
    """F test of whether the polynomial of order `high` fits better than that of order `low`."""
    freedom = count - parameters
    if freedom < 1:
        return False
    ratio = (squares[low] - squares[high]) / (high - low) / max(squares[high] / freedom, 1e-30)
    return bool(stats.f.sf(ratio, high - low, freedom) < SIGNIFICANT)


def _evaluate(coefficients: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, float]:
    """The polynomial relative to its value at time 0, and that value."""
    start = float(coefficients[0])
    return (coefficients[0] + coefficients[1] * time + coefficients[2] * time**2) / start, start
