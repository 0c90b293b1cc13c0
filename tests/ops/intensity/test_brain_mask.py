"""Brain masks of simulated heads of known shape."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.io.templates import load_template
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0, brain_mask_dwiref, brain_mask_t1w, brain_mask_t2w, otsu


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.sum((first > 0.5) & (second > 0.5)) / (np.sum(first > 0.5) + np.sum(second > 0.5))


def _grid(mm: float, axes: str = "RAS", lowest: float = -60.0) -> Grid:
    """A grid around a head at the origin, with the given voxel axes."""
    shape = tuple(int(n) for n in np.round(np.array([160.0, 200, 90 - lowest]) / mm))
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = -80, -100, lowest
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    reoriented = image.as_reoriented(transform)
    return Grid(reoriented.shape, reoriented.affine)


def _head(grid: Grid, centre_dark: float = 0.0) -> tuple[Volume, np.ndarray]:
    """A b=0-like image of brain, ventricles, skull, thin scalp, bright eyes and neck; and the true brain mask."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    world = grid.to_world(index)

    def ball(centre, radii):
        return (((world - centre) / np.asarray(radii, float)) ** 2).sum(-1)

    brain = ball((0, 0, 20), (64, 80, 58))
    data = np.where(brain < 1.42, 25.0, 0)  # scalp
    data[(brain < 1.3) & (brain >= 1)] = 4  # skull
    data[ball((0, -25, -60), (40, 45, 35)) < 1] = 30  # neck
    data[brain < 1] = 100
    data[ball((0, 0, 20), (12, 30, 12)) < 1] = 260
    for side in (-1, 1):
        data[ball((side * 30, 78, -22), (12, 12, 12)) < 1] = 300
    data *= 1 - centre_dark * np.exp(-brain / 0.3)
    rng = np.random.default_rng(0)
    data = ndimage.gaussian_filter(data, 0.4) + rng.normal(0, 2, grid.shape)
    return Volume(torch.from_numpy(np.abs(data).astype(np.float32)), grid), brain < 1


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSR", "LPS"])
@pytest.mark.parametrize("mm", [2.5, 4.0])
def test_b0_mask_in_any_orientation_and_size(axes, mm):
    volume, truth = _head(_grid(mm, axes))
    mask = brain_mask_b0(volume)
    result = mask.numpy()
    assert mask.grid is volume.grid
    assert set(np.unique(result)) <= {0.0, 1.0}
    assert _dice(result, truth) > 0.92
    assert (result[truth] > 0.5).mean() > 0.985


def test_b0_mask_excludes_eyes_and_neck_and_has_no_holes():
    grid = _grid(3.0, "LAS")
    volume, _ = _head(grid)
    result = brain_mask_b0(volume).numpy() > 0.5
    for point in ((30, 80, -24), (-30, 80, -24), (0, -25, -58)):
        i, j, k = np.round(grid.to_voxels(np.array(point, float))).astype(int)
        assert not result[i, j, k]
    assert np.array_equal(ndimage.binary_fill_holes(result), result)
    assert ndimage.label(result)[1] == 1


def test_b0_mask_with_low_coil_sensitivity_at_the_centre():
    volume, truth = _head(_grid(3.0), centre_dark=0.65)
    result = brain_mask_b0(volume).numpy()
    assert (result[truth] > 0.5).mean() > 0.98
    assert _dice(result, truth) > 0.92


def test_b0_mask_of_a_partial_head():
    volume, truth = _head(_grid(3.0, lowest=0.0))
    result = brain_mask_b0(volume).numpy()
    assert _dice(result, truth) > 0.92
    assert (result[truth] > 0.5).mean() > 0.98


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (8, 8, 1), (6, 6, 6), (12, 10, 3)])
@pytest.mark.parametrize("kind", ["zeros", "constant", "noise", "nan"])
def test_b0_mask_of_tiny_or_empty_images(shape, kind):
    rng = np.random.default_rng(0)
    data = {
        "zeros": np.zeros(shape),
        "constant": np.full(shape, 7.0),
        "noise": rng.uniform(1, 100, shape),
        "nan": np.where(rng.random(shape) < 0.3, np.nan, 50.0),
    }[kind]
    volume = Volume(torch.from_numpy(data.astype(np.float32)), Grid(shape, np.diag([3.0, 3, 3, 1])))
    result = brain_mask_b0(volume).numpy()
    assert result.shape == shape
    assert result.any()
    assert set(np.unique(result)) <= {0.0, 1.0}


def test_b0_mask_is_reproducible_and_scale_invariant():
    volume, _ = _head(_grid(4.0))
    first = brain_mask_b0(volume).data
    assert torch.equal(first, brain_mask_b0(volume).data)
    assert torch.equal(first, brain_mask_b0(Volume(volume.data * 1024, volume.grid)).data)


def test_otsu_matches_simpleitk():
    import SimpleITK as sitk  # noqa: N813

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 4, 5000), rng.normal(60, 12, 3000)])
    reference = sitk.OtsuThresholdImageFilter()
    reference.SetNumberOfHistogramBins(256)
    reference.Execute(sitk.GetImageFromArray(values[:, None]))
    assert abs(otsu(values) - reference.GetThreshold()) < 2 * np.ptp(values) / 256


def test_t1w_mask_of_a_reoriented_template_head():
    template = load_template()
    reoriented = _grid(2.0, "PSR")
    brain = resample_onto(template.brain.data[None], template.brain.grid, reoriented)[0]
    truth = resample_onto(template.mask.data[None], template.mask.grid, reoriented)[0].numpy() > 0.5
    away = ndimage.distance_transform_edt(~truth, sampling=2.0)
    head = brain + torch.from_numpy(np.where((away > 8) & (away < 14), 120.0, 0).astype(np.float32))
    mask = brain_mask_t1w(Volume(head, reoriented))
    assert mask.grid is reoriented
    assert _dice(mask.numpy(), truth) > 0.93


def _t2_head(grid: Grid, fat: float) -> tuple[Volume, np.ndarray]:
    """The template head in T2w contrast with skull, scalp, bias and noise; and the true brain mask.

    CSF fills the gaps that the template leaves between gyri.
    """
    template = load_template("MNI152NLin2009aSym")
    tissue = resample_onto(template.tissue, template.brain.grid, grid).numpy()
    brain = resample_onto(template.mask.data[None], template.mask.grid, grid)[0].numpy() > 0.5
    sizes = grid.voxel_sizes
    near = ndimage.distance_transform_edt(~brain, sampling=sizes) <= 6
    whole = ndimage.distance_transform_edt(near, sampling=sizes) > 4
    away = ndimage.distance_transform_edt(~whole, sampling=sizes)
    data = np.where(brain, np.tensordot([2.2, 1.0, 0.75], tissue, 1), np.where(whole, 2.2, 0.05))
    data = np.where(away > 7, np.where(away < 12, fat, 0), data)
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    data = ndimage.gaussian_filter(data, 0.4) * np.exp(0.004 * world[..., 1] - 0.003 * world[..., 2])
    noise = np.random.default_rng(0).normal(0, 0.04, (2, *grid.shape))
    return Volume(torch.from_numpy(np.hypot(data + noise[0], noise[1]).astype(np.float32)), grid), whole


def test_dwiref_mask_is_more_accurate_than_b0_mask():
    volume, truth = _t2_head(_grid(2.5, "LPS"), fat=0.15)
    mask = brain_mask_dwiref(volume)
    result = mask.numpy()
    assert mask.grid is volume.grid
    assert set(np.unique(result)) == {0.0, 1.0}
    assert _dice(result, truth) > 0.97
    assert _dice(result, truth) > _dice(brain_mask_b0(volume).numpy(), truth) + 0.02
    assert np.array_equal(ndimage.binary_fill_holes(result), result > 0.5)


def test_t2w_mask_with_bright_fat():
    volume, truth = _t2_head(_grid(2.0, "PSR"), fat=1.2)
    mask = brain_mask_t2w(volume)
    assert mask.grid is volume.grid
    assert _dice(mask.numpy(), truth) > 0.95


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 10, 3), (14, 14, 14)])
def test_dwiref_mask_falls_back_to_b0_mask_without_a_head(shape):
    data = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    volume = Volume(torch.from_numpy(data), Grid(shape, np.diag([3.0, 3, 3, 1])))
    assert torch.equal(brain_mask_dwiref(volume).data, brain_mask_b0(volume).data)
