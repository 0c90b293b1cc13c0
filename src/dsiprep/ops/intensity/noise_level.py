"""Noise level of a series from local patches, below the Marchenko-Pastur distribution of pure noise, and from air.

The level varies smoothly and less often than the signal does, so patches lie side by side.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch

from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.intensity.magnitude_noise import MagnitudeNoise
from dsiprep.ops.intensity.patches import in_batches, patch_grid, thread_pool

__all__ = [
    "centred",
    "correlation_factor",
    "default_window",
    "degrees_of_freedom",
    "gram",
    "noise_edge",
    "noise_level",
    "noise_variance",
    "samples",
]

MAGNITUDE_ROUNDS = 2  # of the noise level of magnitudes with stabilised variance
BRIGHTNESS_GROUPS = 8  # of volumes, over which expected magnitudes are averaged
BISECTIONS = 10
LEAST_PURE = 0.8  # share of voxels without signal in a patch from which the correlation of the noise is judged
LEAST_PATCHES, MOST_PATCHES = 8, 100  # number of those patches
BELOW_EDGE = 0.95  # of the largest noise eigenvalue: what lies above it is not counted when the noise is estimated
ROUNDS = 8  # of counting components and estimating the noise of a patch; most settle after three
LEAST_SMOOTHING = 2.5  # voxels, standard deviation; small windows alone tell the noise level within 5 %
TINY = 1e-30


def noise_level(
    data: torch.Tensor,
    mask: torch.Tensor | None = None,
    window: int = 0,
    magnitude: MagnitudeNoise | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Noise standard deviation of a series, smooth on the scale of a patch, (i, j, k).

    Parameters
    ----------
    data, mask, window
        As in `mppca`.
    magnitude : MagnitudeNoise, optional
        Return the standard deviation of one channel, which exceeds that of magnitudes where there is little signal: the
        level with which the noise of magnitudes has standard deviation 1 once its variance is stabilised.
    factor : float
        From `correlation_factor`: by how much patches underestimate the noise.
    """
    n, shape = data.shape[0], tuple(data.shape[1:])
    width = window or default_window(n)
    grid = patch_grid(shape, width, width, mask)
    size = int(np.prod(grid.widths))
    needs = 16 * size * n + 16 * min(size, n) ** 2
    level: torch.Tensor | None = None
    for _ in range(1 if magnitude is None else 1 + MAGNITUDE_ROUNDS):
        maps = torch.zeros(2, *shape, device=data.device)  # weight, variance
        with thread_pool(data.device) as pool:
            for planes, index in grid.slabs(data.device):
                voxels, valid = samples(data[:, planes])
                before = None if level is None else level[planes].reshape(-1)
                work = partial(_patch_variance, voxels, valid, before, magnitude, factor)
                sums = torch.zeros(len(voxels), 2, device=data.device)
                for part, variance in in_batches(work, index, needs, pool):
                    weight = valid[part] * (variance > 0)[:, None]
                    row = torch.stack([weight, weight * variance[:, None]], -1)
                    sums.index_add_(0, part.reshape(-1), row.reshape(-1, 2))
                maps[:, planes] += sums.T.reshape(2, *data[0, planes].shape)
        relative = _smoothed(maps, max(width / 2, LEAST_SMOOTHING))
        if magnitude is None or level is not None:
            relative *= factor
        level = relative if level is None else level * relative
    assert level is not None
    return level


def correlation_factor(data: torch.Tensor, inside: torch.Tensor, window: int = 0) -> float:
    """Standard deviation of the noise over that which patches find, from voxels without signal; 1 if there are too few.

    Noise that is correlated between voxels, by interpolation or a filter of k-space, has fewer degrees of freedom than
    voxels, and its lower eigenvalues are smaller than those of independent noise.

    Parameters
    ----------
    data : Tensor, (n, i, j, k), float32
        At least two volumes.
    inside : Tensor, (i, j, k)
        Voxels without signal.
    window : int
        As in `mppca`.
    """
    n, shape = data.shape[0], tuple(data.shape[1:])
    width = window or default_window(n)
    grid = patch_grid(shape, width, max(1, width // 2), None)
    ratios = []
    for planes, index in grid.slabs(data.device):
        usable = inside[planes].reshape(-1).float()
        pure = index[usable[index].mean(1) >= LEAST_PURE]
        if len(pure):
            voxels, _ = samples(data[:, planes])
            some = pure[:: max(1, len(pure) * len(grid.starts[0]) // MOST_PATCHES)]
            found = _patch_variance(voxels, usable, None, None, 1.0, some)
            direct = (voxels.var(1) * usable)[some].sum(1) / usable[some].sum(1)
            ratios.append(direct / found.clamp(min=TINY))
    together = torch.cat(ratios) if ratios else torch.zeros(0)
    return float(together.median().sqrt()) if len(together) >= LEAST_PATCHES else 1.0


def default_window(volumes: int) -> int:
    """Odd width of a patch: 3 up to 27 volumes, 5 up to 62, 7 up to 343, then so that its cube has as many voxels.

    Components stand out more clearly in wide patches, of which fewer are needed, and more are needed for their signal.
    """
    width = 3 if volumes <= 27 else 5 if volumes <= 62 else 7
    while width**3 < volumes:
        width += 2
    return width


def noise_variance(eigenvalues: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Noise variance of matrices X, (b,).

    Signal that a patch does not resolve raises the largest eigenvalues of the noise. The variance is therefore taken
    from the lower half of the noise eigenvalues: their mean over that of the lower half of the Marchenko-Pastur
    distribution. Counting the eigenvalues below the edge of the distribution and estimating the variance alternate,
    from half of the eigenvalues on; counting stops a little short of the edge, where signal hides.

    Parameters
    ----------
    eigenvalues : Tensor, (b, d)
        Eigenvalues of X X', ascending, with X oriented so that rows <= columns. All but the last `rows` are ignored.
    rows, columns : Tensor, (b,), int
        The smaller and larger dimension of X, in degrees of freedom; k signal components leave
        (rows - k) (columns - k) of them.
    """
    values = eigenvalues.double().clamp(min=0)
    size = values.shape[1]
    first = size - rows[:, None]
    total = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    below = total.gather(1, first)[:, 0]
    noise, variance = (rows // 2).clamp(min=1), torch.zeros_like(below)
    for _ in range(ROUNDS):
        half = (noise + 1) // 2
        lower = total.gather(1, (first + half[:, None]).clamp(max=size))[:, 0] - below
        freedom = (columns - rows + noise).clamp(min=1).double()
        variance = torch.where(rows > 0, lower / (half * freedom * _lower_half_mean(noise / freedom)), 0.0)
        counted = (values <= noise_edge(BELOW_EDGE * variance, rows, columns)[:, None]).sum(1) - first[:, 0]
        counted = counted.clamp(min=1)
        if bool((counted == noise).all()):
            break
        noise = counted
    return variance


def noise_edge(variance: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Upper edge of the Marchenko-Pastur distribution of the eigenvalues of X X'."""
    return variance * (rows.double().sqrt() + columns.double().sqrt()) ** 2


def _lower_half_mean(aspect: torch.Tensor) -> torch.Tensor:
    """Mean of the lower half of the Marchenko-Pastur distribution of unit mean, for aspect ratios from 0 to 1."""
    table = torch.from_numpy(_lower_half_table()).to(aspect.device)
    position = aspect.clamp(0, 1) * (len(table) - 1)
    index = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[index], table[index + 1], position - index)


@lru_cache(1)
def _lower_half_table(entries: int = 101, nodes: int = 4000) -> np.ndarray:
    """`_lower_half_mean` at aspect ratios in even steps from 0 to 1."""
    aspect = np.linspace(0, 1, entries)[1:, None]
    angle = (np.arange(nodes) + 0.5) * (np.pi / nodes)
    value = 1 + aspect - 2 * np.sqrt(aspect) * np.cos(angle)
    mass = np.sin(angle) ** 2 / value
    mass = np.cumsum(mass, 1) / mass.sum(1, keepdims=True)
    share = np.diff(np.minimum(mass, 0.5), axis=1, prepend=0.0)  # cut within the node that holds the median
    return np.append(1.0, 2 * (share * value).sum(1))


def samples(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels of a slab as rows (m, n), and 1 for those that are not zero in all volumes, (m,)."""
    voxels = data.reshape(data.shape[0], -1).T.contiguous()
    voxels = voxels if voxels.is_complex() else voxels.float()
    return voxels, (voxels != 0).any(1).float()


def centred(
    voxels: torch.Tensor,
    valid: torch.Tensor,
    level: torch.Tensor | None,
    magnitude: MagnitudeNoise | None,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches (b, m, n) without their mean over voxels, that mean, and the number of voxels; stabilised if wanted."""
    patches, sample = voxels[index], valid[index]
    if magnitude is not None and level is not None:
        patches = magnitude.stabilise(patches / level[index].clamp(min=TINY)[..., None])
    count = sample.sum(1).long()
    mean = (patches * sample[..., None]).sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    return (patches - mean) * sample[..., None], mean, count


def gram(patches: torch.Tensor) -> torch.Tensor:
    return patches.mH @ patches if patches.shape[1] >= patches.shape[2] else patches @ patches.mH


def degrees_of_freedom(count: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smaller and larger dimension of patches of `count` voxels and n volumes without their mean."""
    freedom = (count - 1).clamp(min=0)
    return freedom.clamp(max=n), freedom.clamp(min=n)


def _patch_variance(
    voxels: torch.Tensor,
    valid: torch.Tensor,
    level: torch.Tensor | None,
    magnitude: MagnitudeNoise | None,
    factor: float,
    index: torch.Tensor,
) -> torch.Tensor:
    """Noise variance (b,) of patches, relative to `level` if magnitudes are stabilised with it."""
    patches, mean, count = centred(voxels, valid, level, magnitude, index)
    variance = noise_variance(torch.linalg.eigvalsh(gram(patches)), *degrees_of_freedom(count, voxels.shape[1])).float()
    if magnitude is None or level is not None:
        return variance
    return _channel_variance(patches + mean, mean[:, 0], valid[index], variance * factor**2, magnitude)


def _channel_variance(
    patches: torch.Tensor,
    mean: torch.Tensor,
    sample: torch.Tensor,
    variance: torch.Tensor,
    magnitude: MagnitudeNoise,
) -> torch.Tensor:
    """Noise variance (b,) of one channel for which magnitudes have a given mean variance, by bisection.

    The expected magnitudes are means over volumes of similar brightness in each voxel.
    """
    volumes = patches.shape[2]
    size = max(1, volumes // BRIGHTNESS_GROUPS)
    order = mean.argsort(1)[:, : volumes - volumes % size]
    grouped = patches.gather(2, order[:, None].expand(-1, patches.shape[1], -1)).unflatten(2, (-1, size)).mean(3)
    count = sample.sum(1).clamp(min=1) * grouped.shape[2]
    low = variance.clamp(min=TINY).sqrt()
    high = low / magnitude.variance(torch.zeros(1, device=low.device)).sqrt()
    middle = (low + high) / 2
    for _ in range(BISECTIONS):
        relative = magnitude.variance(grouped / middle[:, None, None]) * sample[..., None]
        above = middle**2 * relative.sum((1, 2)) / count > variance
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        middle = (low + high) / 2
    return middle**2


def _smoothed(maps: torch.Tensor, width: float) -> torch.Tensor:
    """Standard deviation from weight and weighted variance (2, i, j, k), smoothed; the median where nothing is near."""
    if not bool((maps[0] > 0).any()):
        return torch.zeros_like(maps[0])
    middle = torch.median((maps[1] / maps[0])[maps[0] > 0])
    smooth = gaussian(maps, width)
    return torch.where(smooth[0] > 1e-6, smooth[1] / smooth[0].clamp(min=1e-6), middle).sqrt()
