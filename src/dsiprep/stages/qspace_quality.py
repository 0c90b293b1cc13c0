"""Quality of the samples in q-space: signal and noise floor, places on the lattice, antipodes, prediction of each."""

from __future__ import annotations

import numpy as np

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.qspace import QSpaceQuality
from dsiprep.ops.qspace.lattice import common_rotation, predict_at
from dsiprep.ops.qspace.sampling_scheme import lattice_points

__all__ = ["METHODS", "measure_qspace", "qspace_row"]

METHODS = {
    "qspace": (
        "Each sample in q-space was predicted from the others by 3dSHORE, and, for schemes on a lattice, its distance "
        "from its place on the lattice after rotation with the head was computed, less the rotation that all samples "
        "share."
    ),
}
LEAST_WEIGHTED = 12  # diffusion-weighted volumes
SAMPLE = 10_000  # voxels
HALF_STEP = 0.5  # lattice steps, from which on a sample is nearer to another point
ANTIPODE = 0.02  # fraction of the largest |q|
HIGH_B = 3000.0  # s/mm²
PERCENTILES = (10, 50, 90)


def measure_qspace(
    dwi: DWI, mask: Volume, nominal: tuple[np.ndarray, np.ndarray], noise: Volume | None
) -> QSpaceQuality | None:
    """Quality of the samples of a preprocessed series.

    Parameters
    ----------
    dwi : DWI
        Preprocessed, with rotated b-vectors.
    mask : Volume
        Brain, on its grid.
    nominal : (ndarray (n,), ndarray (n, 3))
        b-values and b-vectors of its volumes as they were prescribed.
    noise : Volume or None
        Noise standard deviation before denoising, which sets the noise floor of magnitudes; the residual of the
        prediction is used without.

    Returns
    -------
    QSpaceQuality or None
        None with too few diffusion-weighted volumes.
    """
    weighted, inside = ~dwi.is_b0, mask.data > 0.5
    if weighted.sum() < LEAST_WEIGHTED or not bool(inside.any()) or weighted.all():
        return None
    brain = np.flatnonzero(inside.numpy())
    chosen = brain[:: max(1, len(brain) // SAMPLE)]
    samples = np.stack([volume.numpy().ravel()[chosen] for volume in dwi.data]).astype(float)
    moment = samples @ samples.T / samples.shape[1]
    prediction = predict_at(dwi.q, dwi.q, moment)
    errors = np.sqrt(np.mean((samples - prediction.left_out @ samples) ** 2, axis=1))
    sigma = _sigma(noise) or prediction.noise
    reference = float(np.median(samples[~weighted]))
    places = _places(nominal, dwi, weighted)
    high = weighted & (dwi.bvals >= min(HIGH_B, float(dwi.bvals.max()) / 2))
    return QSpaceQuality(
        np.percentile(samples, PERCENTILES, axis=1).T / reference,
        sigma * np.sqrt(np.pi / 2) / reference,
        float((samples[high] < 2 * sigma).mean()),
        errors / reference,
        prediction.noise / reference,
        places[0],
        places[1],
        places[2],
        _antipodal_difference(samples, dwi.q, weighted, prediction.noise),
    )


def qspace_row(quality: QSpaceQuality | None, weighted: np.ndarray) -> dict[str, float | str | None]:
    """Columns of image_qc.tsv; `weighted` marks the diffusion-weighted volumes."""
    if quality is None:
        return {}
    offset = quality.offset[np.isfinite(quality.offset)]
    row: dict[str, float | str | None] = {
        "noise_floor": quality.floor,
        "samples_at_noise_floor": quality.at_floor,
        "prediction_error": float(np.sqrt(np.mean(quality.left_out[weighted] ** 2))),
        "prediction_error_max": float(quality.left_out[weighted].max()),
        "residual_noise": quality.noise,
        "antipodal_difference": quality.antipodal,
    }
    if len(offset):
        row |= {
            "lattice_points": quality.prescribed,
            "lattice_points_lost": quality.lost,
            "lattice_samples_turned_off": int((offset > HALF_STEP).sum()),
            "lattice_offset_mean": float(offset.mean()),
            "lattice_offset_max": float(offset.max()),
        }
    return row


def _sigma(noise: Volume | None) -> float:
    """Median noise where there is any; zero without a map."""
    if noise is None:
        return 0.0
    values = noise.numpy()
    return float(np.median(values[values > 0])) if (values > 0).any() else 0.0


def _places(nominal: tuple[np.ndarray, np.ndarray], dwi: DWI, weighted: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Distance of each sample from its lattice point in steps (NaN without), prescribed points, and those lost."""
    offset = np.full(len(dwi), np.nan)
    prescribed = np.sqrt(nominal[0][weighted])[:, None] * nominal[1][weighted]
    points = lattice_points(prescribed)
    if points is None:
        return offset, 0, 0
    step = float(np.sum(prescribed**2) / np.sum(points**2)) ** 0.5
    turned = dwi.q[weighted] @ common_rotation(prescribed, dwi.q[weighted])
    moved = np.linalg.norm(turned - prescribed, axis=1) / step
    offset[weighted] = moved
    occupied = {tuple(point) for point in points[moved <= HALF_STEP]}
    distinct = {tuple(point) for point in points}
    return offset, len(distinct), len(distinct - occupied)


def _antipodal_difference(samples: np.ndarray, q: np.ndarray, weighted: np.ndarray, noise: float) -> float | None:
    """RMS difference between antipodal samples over that of noise alone; None if there are no such samples."""
    limit = ANTIPODE * np.linalg.norm(q, axis=1).max()
    opposite = np.linalg.norm(q[:, None] + q[None], axis=-1) + np.where(weighted[:, None] & weighted, 0.0, np.inf)
    pairs = np.argwhere(np.triu(opposite <= limit, 1))
    if not len(pairs):
        return None
    difference = samples[pairs[:, 0]] - samples[pairs[:, 1]]
    return float(np.sqrt(np.mean(difference**2) / 2) / max(noise, 1e-12))
