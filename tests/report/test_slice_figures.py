"""Figures of slices, compared with nibabel and with known ground truth."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Motion, UnitResults
from dsiprep.report import slice_figures as figures
from dsiprep.report.slice_layout import Layout, View, display_axes, sample_at
from helpers.grids import AXES, make_grid
from helpers.report_subject import WHITE, ellipsoids, fibre, rigid, voxels


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "PSR"])
def test_slices_match_nibabel_canonical_image(orientation: str) -> None:
    grid = make_grid(orientation, (9, 11, 8), (2.0, 2.0, 2.0))
    data = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, grid.affine)).get_fdata()
    view = View.of(Volume(torch.ones(grid.shape), grid), 3)
    volume = Volume(torch.as_tensor(data), grid)
    low = grid.to_world(np.array([[0, 0, 0], np.asarray(grid.shape) - 1])).min(0)
    for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        position = float(view.positions[axis][1])
        expected = np.take(canonical, round((position - low[axis]) / 2), axis).T[::-1]
        shown = sample_at(volume, view.points(plane, position))
        np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_right_anterior_superior_mark_is_displayed_at_top_right(orientation: str) -> None:
    grid = make_grid(orientation, (40, 44, 38), (3.0, 3.0, 3.0))
    mark = grid.centre + np.array([25.0, 30.0, 20.0])
    data = np.exp(-np.square(voxels(grid) - mark).sum(-1) / 50)
    layout = Layout.rows(View.of(Volume(torch.ones(grid.shape), grid), 9))
    canvas = layout.paint(Volume(torch.as_tensor(data.astype(np.float32)), grid))
    for group in layout.groups:
        tiles = [canvas[t.y : t.y + t.height, t.x : t.x + t.width] for t in group.tiles]
        brightest = int(np.argmax([tile.max() for tile in tiles]))
        tile = tiles[brightest]
        row, column = np.unravel_index(int(tile.argmax()), tile.shape)
        assert column > tile.shape[1] * 0.55, group.plane  # right, or anterior in a sagittal slice
        assert row < tile.shape[0] * 0.45, group.plane  # anterior in an axial slice, otherwise superior
        assert brightest > 4, group.plane


def test_display_axes_are_orthonormal_and_close_to_world_axes(orientation: str) -> None:
    axes = display_axes(make_grid(orientation, (5, 6, 7), (1.0, 2.0, 3.0)))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert (np.diag(axes) > 0.8).all()


def test_pixels_are_isotropic_on_an_anisotropic_grid() -> None:
    grid = make_grid("LAS", (30, 30, 10), (2.0, 2.0, 6.0))
    layout = Layout.rows(View.of(Volume(torch.ones(grid.shape), grid), 2), ("coronal",))
    tile = layout.tiles[0]
    # 58 mm and 54 mm between outermost voxel centres, in steps of 2 mm
    assert (tile.width, tile.height) == (30, 28)


def test_directional_colours_match_fibre_directions(subject: UnitResults) -> None:
    content = figures.colour_fa(subject.preprocessed)
    assert content is not None
    layout = Layout.rows(View.of(subject.preprocessed.mask))
    maps = figures._fa_and_direction(subject.preprocessed, layout)
    assert maps is not None
    fa, direction = maps
    points, indices = layout.points()
    white = (ellipsoids(points) == WHITE) & (layout.paint(subject.preprocessed.mask).ravel()[indices] > 0.99)
    estimated = direction.reshape(-1, 3)[indices][white]
    # absolute value: the sign of a tensor's principal direction is arbitrary
    assert np.abs((estimated * fibre(points)[white]).sum(-1)).mean() > 0.97
    rgb = figures._direction_rgb(fa, direction).reshape(-1, 3)[indices]
    middle = white & (np.abs(points[:, 0]) < 8)
    side = white & (np.abs(points[:, 0]) > 44)
    assert (rgb[middle].argmax(1) == 0).mean() > 0.97  # red: left-right, as simulated
    assert (rgb[side].argmax(1) == 2).mean() > 0.97  # blue: inferior-superior


def test_fibre_segments_follow_fibre_directions(subject: UnitResults, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {}
    monkeypatch.setattr(
        figures, "render_png", lambda layout, rgb, **options: arguments.update(options, layout=layout) or b""
    )
    figures.fibre_sticks(subject.preprocessed)
    segments, layout = arguments["segments"][0], arguments["layout"]
    tile = next(t for t in layout.tiles if t.plane == "coronal")
    centre = segments.mean(1)
    right = (centre[:, 0] > tile.x + 0.62 * tile.width) & (centre[:, 0] < tile.x + 0.75 * tile.width)
    across, down = (segments[right, 1] - segments[right, 0]).T
    assert right.sum() > 10
    assert np.mean(across * down) < 0  # segments rise to the right; row indices increase downwards


def test_structural_outlines_align_with_dwiref_mask(subject: UnitResults) -> None:
    mask = subject.motions[0].mask
    layout = Layout.rows(View.of(mask))
    via = np.linalg.inv(subject.coregistration.dwiref_to_acpc.matrix)
    structural = figures.tissue_contours(layout, subject.anatomy, via)[0].canvas > 0.5
    diffusion = layout.paint(mask) > 0.5
    assert 2 * (structural & diffusion).sum() / (structural.sum() + diffusion.sum()) > 0.93


def test_realignment_corrects_known_motion() -> None:
    grid = make_grid("oblique", (26, 28, 24), (4.0, 4.0, 4.0))
    points = voxels(grid)
    # Shifts of 7 mm to the left and to the right blur the mean before realignment.
    transforms = np.stack([rigid(np.zeros(3), np.array([dx, 0.0, 0.0])) for dx in (-7.0, 7.0)])

    def head(positions: np.ndarray) -> np.ndarray:
        return np.exp(-np.square((positions - grid.centre) / [16, 20, 18]).sum(-1))

    data = np.stack([head(points - t[:3, 3]) for t in transforms]).astype(np.float32)
    reference = Volume(torch.as_tensor(head(points).astype(np.float32)), grid)
    mask = Volume((reference.data > 0.2).float(), grid)
    index = np.arange(2)
    dwi = DWI(torch.as_tensor(data), grid, np.array([900.0, 900]), np.eye(3)[:2], index * 0, index * 0)
    slice_z = np.zeros((2, 24), np.float32)
    motion = Motion(transforms, index, reference, mask, index * 1.0, index * 1.0, slice_z, 2, [], "3dSHORE")
    frames = dict(figures.realignment(dwi, motion))
    layout = Layout.middle_slices(View.of(mask))
    truth = figures.apply_colourmap(layout.paint(reference), (0, float(layout.paint(reference).max())))
    expected = pixels(figures.render_png(layout, truth))
    errors = {name: np.abs(pixels(content) - expected).mean() for name, content in frames.items()}
    assert errors["after"] < 0.35 * errors["before"]


def test_b_value_ranges_cover_every_volume_once(subject: UnitResults) -> None:
    dwi = subject.acquired.dwi
    ranges = figures.b_value_ranges(dwi.bvals, dwi.is_b0)
    assert np.sum([selected for _, selected in ranges], axis=0).tolist() == [1] * len(dwi)
    shell = np.array([0.0, *[1000.0] * 6])
    assert [name for name, _ in figures.b_value_ranges(shell, shell == 0)] == ["b = 0", "b 1000, 6 vol."]


def test_directional_maps_preserve_hue(subject: UnitResults) -> None:
    content = figures.colour_fa(subject.preprocessed)
    assert content is not None
    colours = pixels(content).reshape(-1, 3)
    pure_red = (colours[:, 0] > 180) & (np.delete(colours, 0, 1).max(1) < 60)
    assert pure_red.sum() > 200  # fibres at the midline of the simulated subject run left-right


@pytest.mark.parametrize("name", sorted(AXES))
def test_empty_image_and_mask_are_rendered(name: str) -> None:
    grid = make_grid(name, (8, 9, 7), (3.0, 3.0, 3.0))
    empty = Volume(torch.zeros(grid.shape), grid)
    transforms = np.zeros((0, 4, 4))
    index = np.zeros(0, int)
    motion = Motion(transforms, index, empty, empty, index * 1.0, index * 1.0, np.zeros((0, 7)), 2, [], "none")
    assert pixels(figures.b0_reference(motion)).max() > 0  # orientation labels
