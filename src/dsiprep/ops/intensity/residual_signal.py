"""Signal that adjacent voxels share but patches did not resolve, put back from the residual of a denoised series."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsiprep.ops.image.filters import gaussian

__all__ = ["restore_signal"]

SCALES = ((0.7, 2.0), (1.4, 2.5))  # voxels, standard deviations: width of the smooth part, and of its mean energy
TRUNCATED = 2.0  # standard deviations
REFERENCES = 32  # volumes from which the share of noise is taken
TINY = 1e-30


def restore_signal(denoised: torch.Tensor, observed: Callable[[int], torch.Tensor], inside: torch.Tensor) -> None:
    """Add the smooth part of the residual where it has more energy than smoothed noise, in place.

    White noise loses the same share of its energy by smoothing in all volumes; signal that a patch did not resolve, as
    of a volume with motion or of an edge, loses less. Of the smoothed residual, the Wiener share 1 - q0 / q is added:
    q is its energy over that of the residual, both averaged around the voxel, and q0 the median of q over volumes. Of
    pure noise, only what the scatter of q lets pass is added.

    Parameters
    ----------
    denoised : Tensor, (n, i, j, k), float32 or complex64
    observed : volume number -> Tensor, (i, j, k)
        The series as it was before, in the same units.
    inside : Tensor, (i, j, k), bool
        Where `denoised` is defined.

    References
    ----------
    Tukey 1977, Exploratory Data Analysis, ISBN 978-0-201-07616-5 (twicing: the smooth part of a residual is added).
    """
    for width, around in SCALES:
        near, far = (_normalised(inside, sigma) for sigma in (width, around))
        numbers = range(0, len(denoised), max(1, len(denoised) // REFERENCES))
        some = [_energy_ratio(_parts(observed(v) - denoised[v], inside), near, far)[1] for v in numbers]
        noise = torch.stack(some).median(0).values
        for v, volume in enumerate(denoised):
            smooth, ratio = _energy_ratio(_parts(observed(v) - volume, inside), near, far)
            smooth *= (1 - noise / ratio.clamp(min=TINY)).clamp_(min=0)
            volume += torch.view_as_complex(smooth.movedim(0, -1).contiguous()) if volume.is_complex() else smooth[0]


Smoother = Callable[[torch.Tensor], torch.Tensor]


def _normalised(inside: torch.Tensor, sigma: float) -> Smoother:
    """Gaussian smoothing of volumes (c, i, j, k) that are 0 outside, as a mean over voxels inside."""
    share = gaussian(inside[None].float(), sigma, TRUNCATED)[0]
    scale = torch.where(inside, 1 / share.clamp(min=TINY), 0.0)
    return lambda volumes: gaussian(volumes, sigma, TRUNCATED).mul_(scale)


def _parts(residual: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Real and, of complex numbers, imaginary part of a residual as (1 or 2, i, j, k), 0 outside."""
    parts = torch.view_as_real(residual).movedim(-1, 0) if residual.is_complex() else residual[None]
    return torch.where(inside, parts, 0.0)


def _energy_ratio(residual: torch.Tensor, near: Smoother, far: Smoother) -> tuple[torch.Tensor, torch.Tensor]:
    """The smoothed residual (c, i, j, k), and its local energy over that of the residual (i, j, k)."""
    smooth = near(residual)
    energies = far(torch.stack([smooth.square().sum(0), residual.square().sum(0)]))
    return smooth, energies[0] / energies[1].clamp(min=TINY)
