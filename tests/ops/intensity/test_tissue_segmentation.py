"""Tissue segmentation and bias fields of simulated images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.io.templates import load_template
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.tissue_segmentation import segment_tissue

LEVELS = np.array([28.0, 68.0, 108.0])  # CSF, GM, WM


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.sum(first & second) / (first.sum() + second.sum())


@pytest.fixture(scope="module")
def brain():
    """A noisy 2 mm T1w simulated from template tissue maps: (image, mask, true labels, priors)."""
    template = load_template("MNI152NLin2009aSym")
    grid = template.brain.grid.at_spacing(2.0)
    priors = torch.stack([resample_to_spacing(Volume(t, template.brain.grid), 2.0).data for t in template.tissue])
    mask = resample_to_spacing(template.mask, 2.0).numpy() > 0.5
    truth = priors.argmax(0).numpy()
    rng = np.random.default_rng(0)
    clean = ndimage.gaussian_filter(np.where(mask, LEVELS[truth], 0), 0.3)
    image = Volume(torch.from_numpy((clean + rng.normal(0, 6, clean.shape)).astype(np.float32)), grid)
    return image, Volume(torch.from_numpy(mask.astype(np.float32)), grid), truth, priors


def _dice_by_tissue(probabilities: torch.Tensor, mask: Volume, truth: np.ndarray) -> list[float]:
    inside = mask.numpy() > 0.5
    best = probabilities.argmax(0).numpy()
    return [_dice((best == tissue) & inside, (truth == tissue) & inside) for tissue in range(3)]


def test_segmentation_without_atlas(brain):
    image, mask, truth, _ = brain
    result = segment_tissue(image, mask)
    csf, gm, wm = _dice_by_tissue(result, mask, truth)
    assert csf > 0.8
    assert gm > 0.9
    assert wm > 0.93
    total = result.sum(0).numpy()
    assert np.allclose(total[mask.numpy() > 0.5], 1, atol=1e-4)
    assert np.all(total[mask.numpy() <= 0.5] == 0)


def test_segmentation_with_a_misaligned_atlas(brain):
    """Priors misaligned by up to 4 mm must not displace the tissue borders."""
    image, mask, truth, priors = brain
    misaligned = torch.roll(priors, (2, -1), (1, 2))
    csf, gm, wm = _dice_by_tissue(segment_tissue(image, mask, misaligned), mask, truth)
    assert csf > 0.75
    assert gm > 0.85
    assert wm > 0.88


def test_segmentation_of_a_t2w(brain):
    """Voxels of mixed CSF and cortex need their own Gaussian; otherwise cortex is classified as WM."""
    _, mask, truth, priors = brain
    clean = ndimage.gaussian_filter(np.where(mask.numpy() > 0.5, np.array([220.0, 100.0, 75.0])[truth], 0), 0.6)
    noise = np.random.default_rng(2).normal(0, 6, clean.shape)
    image = Volume(torch.from_numpy((clean + noise).astype(np.float32)), mask.grid)
    csf, gm, wm = _dice_by_tissue(segment_tissue(image, mask, torch.roll(priors, (2, -1), (1, 2))), mask, truth)
    assert csf > 0.65
    assert gm > 0.87
    assert wm > 0.84


def test_deep_grey_matter_brighter_than_cortex(brain):
    """Halfway between cortex and white matter, intensity is ambiguous; the atlas prior decides."""
    image, mask, truth, priors = brain
    depth = ndimage.distance_transform_edt(mask.numpy() > 0.5, sampling=2.0)
    deep = (truth == 1) & (depth > 26) & (priors[1].numpy() > 0.6)
    assert deep.sum() > 500
    data = image.data + 20 * torch.from_numpy(deep.astype(np.float32))
    bright = Volume(data, image.grid)
    by_atlas = segment_tissue(bright, mask, priors).argmax(0).numpy()
    alone = segment_tissue(bright, mask).argmax(0).numpy()
    assert (by_atlas[deep] == 1).mean() > 0.8
    assert (by_atlas[deep] == 1).mean() > (alone[deep] == 1).mean() + 0.1


def test_neighbourhood_term_suppresses_noise(brain):
    image, mask, truth, _ = brain
    rng = np.random.default_rng(1)
    noisy = image.numpy() + rng.normal(0, 14, image.numpy().shape).astype(np.float32)
    alone = np.abs(noisy[..., None] - LEVELS).argmin(-1)
    inside = mask.numpy() > 0.5
    plain = np.mean(alone[inside] == truth[inside])
    result = segment_tissue(Volume(torch.from_numpy(noisy), image.grid), mask).argmax(0).numpy()
    assert np.mean(result[inside] == truth[inside]) > plain + 0.03


def test_segmentation_is_scale_invariant(brain):
    image, mask, _, priors = brain
    first = segment_tissue(image, mask, priors)
    second = segment_tissue(Volume(image.data * 37, image.grid), mask, priors)
    assert float((first - second).abs().max()) < 1e-2


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 3), (5, 5, 5)])
def test_segmentation_of_tiny_or_uniform_images(shape):
    ones = Volume(torch.ones(shape), Grid(shape, np.eye(4)))
    result = segment_tissue(ones, ones)
    assert result.shape == (3, *shape)
    assert bool(torch.isfinite(result).all())
    empty = Volume(torch.zeros(shape), ones.grid)
    assert float(segment_tissue(ones, empty).abs().sum()) == 0


def test_n4_recovers_a_known_field(brain):
    image, mask, _, _ = brain
    world = image.grid.to_world(np.moveaxis(np.indices(image.grid.shape), 0, -1))
    field = np.exp(0.006 * world[..., 1] - 3e-5 * (world[..., 0] ** 2 + world[..., 2] ** 2)).astype(np.float32)
    inside = mask.numpy() > 0.5
    result = n4_bias(Volume(image.data * torch.from_numpy(field), image.grid), mask, 2)
    assert result.grid is image.grid
    assert abs(float(result.data[torch.from_numpy(inside)].mean()) - 1) < 1e-3
    ratio = result.numpy()[inside] / field[inside]
    assert ratio.std() / ratio.mean() < 0.05 < 0.3 * field[inside].std() / field[inside].mean() * 3
    assert np.corrcoef(np.log(result.numpy()[inside]), np.log(field[inside]))[0, 1] > 0.98


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 20, 20), (9, 9, 9)])
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_n4_of_tiny_or_uniform_images_is_one(shape, value):
    flat = Volume(torch.full(shape, value), Grid(shape, np.eye(4)))
    assert float((n4_bias(flat, None, 4).data - 1).abs().max()) == 0


def test_n4_with_zeros_in_the_mask(brain):
    image, mask, _, _ = brain
    data = image.data.clone()
    data[40:50, 40:50, 30:40] = 0
    result = n4_bias(Volume(data, image.grid), mask, 4).data
    assert bool(torch.isfinite(result).all())
    assert float(result.min()) > 0
