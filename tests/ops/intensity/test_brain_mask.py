"""Brain masks on heads of known shape."""

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
    """A grid around a head at the origin, in any orientation."""
    shape = tuple(int(n) for n in np.round(np.array([160.0, 200, 90 - lowest]) / mm))
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = -80, -100, lowest
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    turned = image.as_reoriented(turn)
    return Grid(turned.shape, turned.affine)


def _head(grid: Grid, centre_dark: float = 0.0) -> tuple[Volume, np.ndarray]:
    """A b=0-like head: brain with ventricles, skull, thin scalp, bright eyes and a neck; the true brain."""
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
    found = mask.numpy()
    assert mask.grid is volume.grid and set(np.unique(found)) <= {0.0, 1.0}
    assert _dice(found, truth) > 0.92
    assert (found[truth] > 0.5).mean() > 0.985


def test_b0_mask_leaves_eyes_and_neck_out_and_has_no_holes():
    grid = _grid(3.0, "LAS")
    volume, _ = _head(grid)
    found = brain_mask_b0(volume).numpy() > 0.5
    for point in ((30, 80, -24), (-30, 80, -24), (0, -25, -58)):
        i, j, k = np.round(grid.to_voxels(np.array(point, float))).astype(int)
        assert not found[i, j, k]
    assert np.array_equal(ndimage.binary_fill_holes(found), found)
    assert ndimage.label(found)[1] == 1


def test_b0_mask_of_a_coil_that_is_dark_in_the_middle():
    volume, truth = _head(_grid(3.0), centre_dark=0.65)
    found = brain_mask_b0(volume).numpy()
    assert (found[truth] > 0.5).mean() > 0.98
    assert _dice(found, truth) > 0.92


def test_b0_mask_of_a_slab():
    volume, truth = _head(_grid(3.0, lowest=0.0))
    found = brain_mask_b0(volume).numpy()
    assert _dice(found, truth) > 0.92
    assert (found[truth] > 0.5).mean() > 0.98


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
    found = brain_mask_b0(volume).numpy()
    assert found.shape == shape
    assert found.any()
    assert set(np.unique(found)) <= {0.0, 1.0}


def test_b0_mask_does_not_depend_on_scale_or_run():
    volume, _ = _head(_grid(4.0))
    first = brain_mask_b0(volume).data
    assert torch.equal(first, brain_mask_b0(volume).data)
    assert torch.equal(first, brain_mask_b0(Volume(volume.data * 1024, volume.grid)).data)


def test_otsu_as_simpleitk():
    import SimpleITK as sitk  # noqa: N813

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 4, 5000), rng.normal(60, 12, 3000)])
    reference = sitk.OtsuThresholdImageFilter()
    reference.SetNumberOfHistogramBins(256)
    reference.Execute(sitk.GetImageFromArray(values[:, None]))
    assert abs(otsu(values) - reference.GetThreshold()) < 2 * np.ptp(values) / 256


def test_t1w_mask_of_a_turned_template_head():
    template = load_template()
    turned = _grid(2.0, "PSR")
    brain = resample_onto(template.brain.data[None], template.brain.grid, turned)[0]
    truth = resample_onto(template.mask.data[None], template.mask.grid, turned)[0].numpy() > 0.5
    away = ndimage.distance_transform_edt(~truth, sampling=2.0)
    head = brain + torch.from_numpy(np.where((away > 8) & (away < 14), 120.0, 0).astype(np.float32))
    mask = brain_mask_t1w(Volume(head, turned))
    assert mask.grid is turned
    assert _dice(mask.numpy(), truth) > 0.93


def _t2_head(grid: Grid, fat: float) -> tuple[Volume, np.ndarray]:
    """The template's brain in the contrast of a T2w, with bias and noise, in a skull, in a scalp; the true brain.

    CSF fills what the template leaves free between gyri, as it does in a head.
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


def test_dwiref_mask_is_closer_than_the_fast_one():
    volume, truth = _t2_head(_grid(2.5, "LPS"), fat=0.15)
    mask = brain_mask_dwiref(volume)
    found = mask.numpy()
    assert mask.grid is volume.grid and set(np.unique(found)) == {0.0, 1.0}
    assert _dice(found, truth) > 0.97
    assert _dice(found, truth) > _dice(brain_mask_b0(volume).numpy(), truth) + 0.02
    assert np.array_equal(ndimage.binary_fill_holes(found), found > 0.5)


def test_t2w_mask_under_bright_fat():
    volume, truth = _t2_head(_grid(2.0, "PSR"), fat=1.2)
    mask = brain_mask_t2w(volume)
    assert mask.grid is volume.grid
    assert _dice(mask.numpy(), truth) > 0.95


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 10, 3), (14, 14, 14)])
def test_dwiref_mask_of_what_is_no_head_is_the_fast_one(shape):
    data = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    volume = Volume(torch.from_numpy(data), Grid(shape, np.diag([3.0, 3, 3, 1])))
    assert torch.equal(brain_mask_dwiref(volume).data, brain_mask_b0(volume).data)
