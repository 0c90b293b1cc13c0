"""Signal that patches of a series did not resolve, put back from the residual of its principal components."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.intensity.noise_level import noise_edge

__all__ = ["restore_signal"]

SCALES = ((0.7, 2.0), (1.4, 2.5))  # voxels, standard deviations: width of the smooth part, and of its mean energy
TRUNCATED = 2.0  # standard deviations
REFERENCES = 32  # components of noise from which its share is taken
SAMPLES = 40_000  # voxels from which the components are found
BLOCK = 16  # volumes at a time
TINY = 1e-30

Volumes = Callable[[int], torch.Tensor]


def restore_signal(denoised: torch.Tensor, observed: Volumes, sigma: torch.Tensor, inside: torch.Tensor) -> None:
    """Add the smooth part of the residual where it has more energy than smoothed noise, in place.

    Signal lies in few principal components of the whole series, those above the Marchenko-Pastur distribution; the
    noise of the residual is spread over all. Smoothing leaves noise the same share q0 of its energy in all components,
    and more to signal that adjacent voxels share: q, both averaged around the voxel. Of a smoothed component of
    signal, the part 1 - f q0 / q is added. With f = 1 that is the Wiener filter, which loses signal as readily as it
    lets noise through; f is the share of components that hold signal, so that where noise is spread over many others,
    less signal is lost. Of pure noise, nothing is added.

    Parameters
    ----------
    denoised : Tensor, (n, i, j, k), float32 or complex64
    observed : volume number -> Tensor, (i, j, k)
        The series as it was before, in the same units.
    sigma : Tensor, (i, j, k)
        Noise standard deviation, in the same units.
    inside : Tensor, (i, j, k), bool
        Where `denoised` is defined.

    References
    ----------
    Tukey 1977, Exploratory Data Analysis, ISBN 978-0-201-07616-5 (twicing: the smooth part of a residual is added).
    Veraart et al. 2016, NeuroImage 142:394, doi 10.1016/j.neuroimage.2016.08.016 (Marchenko-Pastur distribution).
    """
    basis, count = _components(len(denoised), observed, sigma, inside)
    if not count:
        return
    n = len(denoised)
    null = range(n // 2, n, max(1, (n - n // 2) // REFERENCES))
    used = torch.cat([basis[:, :count], basis[:, null]], dim=1)
    residual = _project(used, denoised, observed, inside)
    restored = torch.zeros_like(residual[:count])
    for width, around in SCALES:
        near, far = (_normalised(inside, size) for size in (width, around))
        noise = torch.stack([_energy_ratio(_parts(part), near, far)[1] for part in residual[count:]]).median(0).values
        for part, total in zip(residual[:count], restored, strict=True):
            smooth, ratio = _energy_ratio(_parts(part), near, far)
            smooth *= (1 - count / n * noise / ratio.clamp(min=TINY)).clamp_(min=0)
            found = torch.view_as_complex(smooth.movedim(0, -1).contiguous()) if part.is_complex() else smooth[0]
            total += found
            part -= found
    for first in range(0, n, BLOCK):
        rows = slice(first, first + BLOCK)
        denoised[rows] += torch.tensordot(basis[rows, :count], restored, 1)


def _components(n: int, observed: Volumes, sigma: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Principal components of a series in units of noise, (n, n), strongest first, and how many hold signal."""
    voxels = torch.nonzero(inside.reshape(-1))[:, 0]
    voxels = voxels[:: max(1, len(voxels) // SAMPLES)]
    level = sigma.reshape(-1)[voxels]
    scale = torch.where(level > 0, 1 / level, 0.0)
    sample = torch.stack([observed(v).reshape(-1)[voxels] * scale for v in range(n)])
    count = max(len(voxels), 1)
    values, vectors = torch.linalg.eigh(sample @ sample.mH / count)
    edge = noise_edge(values.new_tensor(1 / count), values.new_tensor(n), values.new_tensor(count))
    return vectors.flip(1), int((values > edge).sum())


def _project(basis: torch.Tensor, denoised: torch.Tensor, observed: Volumes, inside: torch.Tensor) -> torch.Tensor:
    """The residual in components (n, c), as (c, i, j, k), 0 outside."""
    result = denoised.new_zeros(basis.shape[1], *denoised.shape[1:])
    for first in range(0, len(denoised), BLOCK):
        rows = range(first, min(first + BLOCK, len(denoised)))
        residual = torch.stack([torch.where(inside, observed(v) - denoised[v], 0.0) for v in rows])
        result += torch.tensordot(basis[rows.start : rows.stop].mH, residual, 1)
    return result


Smoother = Callable[[torch.Tensor], torch.Tensor]


def _normalised(inside: torch.Tensor, sigma: float) -> Smoother:
    """Gaussian smoothing of volumes (c, i, j, k) that are 0 outside, as a mean over voxels inside."""
    share = gaussian(inside[None].float(), sigma, TRUNCATED)[0]
    scale = torch.where(inside, 1 / share.clamp(min=TINY), 0.0)
    return lambda volumes: gaussian(volumes, sigma, TRUNCATED).mul_(scale)


def _parts(values: torch.Tensor) -> torch.Tensor:
    """Real and, of complex numbers, imaginary part of a volume, (1 or 2, i, j, k)."""
    return torch.view_as_real(values).movedim(-1, 0) if values.is_complex() else values[None]


def _energy_ratio(residual: torch.Tensor, near: Smoother, far: Smoother) -> tuple[torch.Tensor, torch.Tensor]:
    """The smoothed residual (c, i, j, k), and its local energy over that of the residual (i, j, k)."""
    smooth = near(residual)
    energies = far(torch.stack([smooth.square().sum(0), residual.square().sum(0)]))
    return smooth, energies[0] / energies[1].clamp(min=TINY)
