"""Figures of slices (PNG), drawn from results. Line plots are in `plots`, captions in `sections`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import (
    Anatomy,
    Coregistration,
    Distortion,
    Motion,
    Preprocessed,
    Quality,
)
from dsiprep.ops.qspace.tensor import main_directions
from dsiprep.report.rendering import (
    BRAIN_COLOUR,
    GREY_MATTER_COLOUR,
    SIGNED_COLOURMAP,
    WHITE_MATTER_COLOUR,
    ColourBar,
    Contour,
    apply_colourmap,
    render_png,
)
from dsiprep.report.slice_layout import IN_PLANE_AXES, Group, Layout, View, sample_at, symmetric, window

TENSOR_B = 1300.0  # s/mm²: diffusion is close enough to Gaussian for the tensor's principal direction
TENSOR_DIRECTIONS = 12  # volumes to include, even if their b-values are higher


def _window_groups(
    layout: Layout, canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5
) -> np.ndarray:
    """Grey-scale RGB in which each group has its own intensity window."""
    rgb = np.zeros((*canvas.shape, 3), np.uint8)
    for group in layout.groups:
        rows = slice(group.tiles[0].y, group.tiles[0].y + group.tiles[0].height)
        columns = slice(group.tiles[0].x, group.tiles[-1].x + group.tiles[-1].width)
        part = None if inside is None else inside[rows, columns]
        rgb[rows, columns] = apply_colourmap(canvas[rows, columns], window(canvas[rows, columns], part, top))
    return rgb


def mean_volume(dwi: DWI, selected: np.ndarray) -> Volume:
    """Mean of the selected volumes, summed one at a time so that a memory-mapped series is not loaded as a whole."""
    total = torch.zeros(dwi.grid.shape, dtype=torch.float32)
    index = np.flatnonzero(selected)
    for v in index:
        total += dwi.data[int(v)].cpu().float()
    return Volume(total / max(len(index), 1), dwi.grid)


def removal(dwi: DWI, cleaned: DWI, mask: Volume) -> tuple[list[tuple[str, bytes]], bytes]:
    """Frames before and after noise or ringing was removed, and a figure of the removed signal.

    Axial slices of a b=0 volume and of the volume with the highest b-value. Both frames have the same windows.
    """
    volumes = (int(np.argmin(dwi.bvals)), int(np.argmax(dwi.bvals)))
    view = View.of(mask, 6)
    layout = Layout.rows(view, ("axial", "axial"), tuple(f"b = {dwi.bvals[v]:.0f}" for v in volumes))
    before = layout.paint_groups([dwi.volume(v) for v in volumes])
    after = layout.paint_groups([cleaned.volume(v) for v in volumes])
    inside = layout.paint(mask)
    frames = [
        (name, render_png(layout, _window_like(layout, canvas, after, inside)))
        for name, canvas in (("before", before), ("after", after))
    ]
    return frames, _removed_signal(layout, before - after, inside)


def _window_like(layout: Layout, canvas: np.ndarray, reference: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Grey-scale RGB in which each group has the intensity window of a reference canvas."""
    rgb = np.zeros((*canvas.shape, 3), np.uint8)
    for group in layout.groups:
        rows = slice(group.tiles[0].y, group.tiles[0].y + group.tiles[0].height)
        rgb[rows] = apply_colourmap(canvas[rows], window(reference[rows], inside[rows], 99.8))
    return rgb


def _removed_signal(layout: Layout, residual: np.ndarray, inside: np.ndarray) -> bytes:
    groups = tuple(Group(group.plane, f"removed, {group.tag}", group.tiles) for group in layout.groups)
    limits = symmetric(residual, inside, 99)
    tagged = Layout(layout.view, groups, layout.width, layout.height)
    return render_png(tagged, apply_colourmap(residual, limits), bars=[ColourBar("gray", limits, "removed")])


def noise_level(noise: Volume, mask: Volume) -> bytes:
    """Noise standard deviation, axial slices."""
    layout = Layout.rows(View.of(mask, 6), ("axial",))
    canvas, inside = layout.paint(noise), layout.paint(mask)
    limits = (0.0, window(canvas, inside)[1])
    rgb = np.where(canvas[..., None] > 0, apply_colourmap(canvas, limits, "magma"), 0).astype(np.uint8)
    return render_png(layout, rgb, bars=[ColourBar("magma", limits, "noise SD")])


def b0_reference(motion: Motion) -> bytes:
    """The dwiref that all volumes were aligned to, with the outline of its brain mask."""
    layout = Layout.rows(View.of(motion.mask))
    canvas, mask = layout.paint(motion.dwiref), layout.paint(motion.mask)
    low, high = window(canvas, mask)
    return render_png(layout, apply_colourmap(canvas, (low, high)), [Contour(mask, BRAIN_COLOUR)])


def realignment(dwi: DWI, motion: Motion) -> list[tuple[str, bytes]]:
    """Mean of all diffusion-weighted volumes before and after alignment to the dwiref."""
    layout = Layout.middle_slices(View.of(motion.mask))
    points, indices = layout.points()
    weighted = [p for p, v in enumerate(motion.volumes) if not dwi.is_b0[v]]
    before = np.zeros(len(points), np.float32)
    after = np.zeros(len(points), np.float32)
    for p in weighted:
        volume = dwi.volume(int(motion.volumes[p]))
        before += sample_at(volume, points)
        after += sample_at(volume, points, via=motion.transforms[p])
    count = max(len(weighted), 1)
    mask = layout.paint(motion.mask)
    canvases = [layout.scatter(values / count, indices) for values in (before, after)]
    low, high = window(canvases[1], mask, 99.7)
    return [
        (name, render_png(layout, apply_colourmap(canvas, (low, high))))
        for name, canvas in zip(("before", "after"), canvases, strict=True)
    ]


def tissue_contours(layout: Layout, anatomy: Anatomy, via: np.ndarray | None = None) -> list[Contour]:
    """Outlines of brain and white matter in the structural image; `via` maps world points of the layout to ACPC."""
    contours = [Contour(layout.paint(anatomy.mask, via=via), BRAIN_COLOUR, 0.9)]
    if anatomy.tissue is not None:
        white = Volume(anatomy.tissue[2], anatomy.image.grid)
        contours.append(Contour(layout.paint(white, via=via), WHITE_MATTER_COLOUR, 0.9))
    return contours


def distortion_correction(
    distortion: Distortion, blip: int, mask: Volume, anatomy: Anatomy, coregistration: Coregistration
) -> list[tuple[str, bytes]]:
    """b=0 image of one blip before and after correction, with the outlines of the structural image."""
    layout = Layout.rows(View.of(mask))
    to_acpc = np.linalg.inv(coregistration.dwiref_to_acpc.matrix)
    contours = tissue_contours(layout, anatomy, to_acpc) if anatomy.modality != "none" else []
    inside = layout.paint(mask)
    frames = []
    for name, volume in (("before", distortion.before[blip]), ("after", distortion.after[blip])):
        canvas = layout.paint(volume)
        frames.append((name, render_png(layout, apply_colourmap(canvas, window(canvas, inside, 99)), contours)))
    return frames


def blip_difference(distortion: Distortion, mask: Volume) -> list[tuple[str, bytes]]:
    """Blip-up minus blip-down before and after correction, each image scaled to its mean in the brain."""
    layout = Layout.rows(View.of(mask))
    inside = layout.paint(mask)
    canvases = []
    for pair in (distortion.before, distortion.after):
        up, down = (layout.paint(volume) for volume in pair)
        means = [float(canvas[inside > 0.5].mean() or 1) for canvas in (up, down)]
        canvases.append(200 * (up / means[0] - down / means[1]) / 2)
    limits = symmetric(canvases[0], inside, 98)
    bar = ColourBar(SIGNED_COLOURMAP, limits, "% of mean")
    return [
        (
            name,
            render_png(
                layout, apply_colourmap(canvas, limits, SIGNED_COLOURMAP), [Contour(inside, "#dddddd", 0.7)], [bar]
            ),
        )
        for name, canvas in zip(("before", "after"), canvases, strict=True)
    ]


def fieldmap(distortion: Distortion, mask: Volume, axis: np.ndarray) -> tuple[bytes, str]:
    """The off-resonance field and its unit, Hz; without a readout time, the displacement along `axis` (3,) in mm."""
    if distortion.fieldmap_hz is not None:
        return signed_map(distortion.fieldmap_hz, mask, "Hz"), "Hz"
    displacement = distortion.fields[0]
    along = torch.einsum("dijk,d->ijk", displacement.data.cpu().float(), torch.as_tensor(axis, dtype=torch.float32))
    return signed_map(Volume(along, displacement.grid), mask, "mm"), "mm"


def signed_map(volume: Volume, mask: Volume, unit: str) -> bytes:
    """A map of positive and negative values in the brain, with its colour bar."""
    layout = Layout.rows(View.of(mask))
    inside, canvas = layout.paint(mask), layout.paint(volume)
    limits = symmetric(canvas, inside, 99.5)
    rgb = np.where(inside[..., None] > 0.5, apply_colourmap(canvas, limits, "RdBu_r"), 0).astype(np.uint8)
    return render_png(layout, rgb, bars=[ColourBar("RdBu_r", limits, unit)])


def structural_image(anatomy: Anatomy) -> bytes:
    """The structural image in ACPC space with the outlines of brain, grey matter and white matter."""
    layout = Layout.rows(View.of(anatomy.mask))
    canvas = layout.paint(anatomy.image)
    inside = layout.paint(anatomy.mask)
    contours = [Contour(inside, BRAIN_COLOUR)]
    if anatomy.tissue is not None:
        white, grey = (layout.paint(Volume(anatomy.tissue[t], anatomy.image.grid)) for t in (2, 1))
        contours += [Contour(white + grey, GREY_MATTER_COLOUR, 0.8), Contour(white, WHITE_MATTER_COLOUR, 0.8)]
    return render_png(layout, apply_colourmap(canvas, window(canvas, inside)), contours)


def normalisation(template: Volume, warped: Volume) -> list[tuple[str, bytes]]:
    """The template and the normalised brain of the subject, with the outline of the template brain."""
    mask = Volume((template.data > 0).float(), template.grid)
    layout = Layout.rows(View.of(mask))
    inside = layout.paint(mask)
    contour = [Contour(inside, BRAIN_COLOUR, 0.9)]
    frames = []
    for name, volume in (("template", template), ("subject", warped)):
        canvas = layout.paint(volume)
        frames.append((name, render_png(layout, apply_colourmap(canvas, window(canvas, inside)), contour)))
    return frames


def coregistration(preprocessed: Preprocessed, anatomy: Anatomy) -> list[tuple[str, bytes]]:
    """The b=0 reference and the structural image in ACPC space, with the same outlines."""
    layout = Layout.rows(View.of(anatomy.mask))
    inside = layout.paint(anatomy.mask)
    contours = tissue_contours(layout, anatomy)
    frames = []
    target = "reference" if anatomy.modality == "none" else anatomy.modality
    for name, volume in (("dwiref", preprocessed.dwiref), (target, anatomy.image)):
        canvas = layout.paint(volume)
        frames.append((name, render_png(layout, apply_colourmap(canvas, window(canvas, inside, 99)), contours)))
    return frames


def b_value_ranges(bvals: np.ndarray, is_b0: np.ndarray, count: int = 3) -> list[tuple[str, np.ndarray]]:
    """b=0 and up to `count` ranges of b-values with similar numbers of volumes: [(label, (n,) bool)]."""
    ranges = [("b = 0", is_b0)] if is_b0.any() else []
    weighted = np.flatnonzero(~is_b0)
    levels = np.unique(np.round(bvals[weighted], -2))
    if len(levels) == 0:
        return ranges
    edges = np.unique(np.quantile(bvals[weighted], np.linspace(0, 1, min(count, len(levels)) + 1)))
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0] + 1])
    for low, high in pairwise(edges):
        last = high == edges[-1]
        selected = ~is_b0 & (bvals >= low) & ((bvals <= high) if last else (bvals < high))
        if selected.any():
            ends = np.round([bvals[selected].min(), bvals[selected].max()], -1).astype(int)
            name = f"b {ends[0]}" if ends[0] == ends[1] else f"b {ends[0]}-{ends[1]}"
            ranges.append((f"{name}, {int(selected.sum())} vol.", selected))
    return ranges


def mean_images(preprocessed: Preprocessed) -> bytes:
    """Mean images of b=0 and of ranges of b-values, with the outline of the brain mask."""
    dwi = preprocessed.dwi
    ranges = b_value_ranges(dwi.bvals, dwi.is_b0)
    layout = Layout.rows(View.of(preprocessed.mask), ("axial",) * len(ranges), tuple(name for name, _ in ranges))
    canvas = layout.paint_groups([mean_volume(dwi, selected) for _, selected in ranges])
    inside = layout.paint(preprocessed.mask)
    return render_png(layout, _window_groups(layout, canvas, inside, 99.7), [Contour(inside, BRAIN_COLOUR, 0.9)])


def tensor_volumes(bvals: np.ndarray, is_b0: np.ndarray) -> np.ndarray:
    """Select the diffusion-weighted volumes for the tensor fit, (n,) bool.

    Volumes up to 1300 s/mm², or up to the b-value that includes `TENSOR_DIRECTIONS` volumes if that is higher; none if
    there are fewer than six.
    """
    weighted = np.sort(bvals[~is_b0])
    if len(weighted) < 6:
        return np.zeros(len(bvals), bool)
    needed = weighted[min(TENSOR_DIRECTIONS, len(weighted)) - 1]
    return ~is_b0 & (bvals <= max(TENSOR_B, needed + 50))


def _fa_and_direction(preprocessed: Preprocessed, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """FA (h, w) and principal direction (h, w, 3) inside the mask; None without b=0 or with too few directions."""
    dwi = preprocessed.dwi
    selected = tensor_volumes(dwi.bvals, dwi.is_b0)
    if not selected.any() or not dwi.is_b0.any():
        return None
    points, indices = layout.points()
    keep = sample_at(preprocessed.mask, points) > 0.5
    points, indices = points[keep], indices[keep]
    used = np.flatnonzero(selected | dwi.is_b0)
    signal = np.stack([sample_at(dwi.volume(int(v)), points) for v in used])
    fa, direction = main_directions(signal, np.where(dwi.is_b0, 0, dwi.bvals)[used], dwi.bvecs[used])
    return layout.scatter(fa, indices), layout.scatter(direction, indices)


def _direction_rgb(fa: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Directional colours (h, w, 3) uint8 with a brightness proportional to FA."""
    return (255 * np.clip(np.abs(direction) * fa[..., None] * 1.25, 0, 1)).astype(np.uint8)


def colour_fa(preprocessed: Preprocessed) -> bytes | None:
    """FA coloured by principal direction in world axes: red R-L, green A-P, blue S-I; None without a tensor fit."""
    layout = Layout.rows(View.of(preprocessed.mask))
    maps = _fa_and_direction(preprocessed, layout)
    return None if maps is None else render_png(layout, _direction_rgb(*maps), keep_hue=True)


def fibre_sticks(preprocessed: Preprocessed) -> bytes | None:
    """Principal directions as line segments on FA, three planes; None without a tensor fit."""
    view = View.of(preprocessed.mask)
    layout = Layout.middle_slices(view)
    maps = _fa_and_direction(preprocessed, layout)
    if maps is None:
        return None
    fa, direction = maps
    local = direction @ view.axes
    segments, colours = [], []
    for tile in layout.tiles:
        across, up = IN_PLANE_AXES[tile.plane]
        rows, columns = np.nonzero(fa[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] > 0.18)
        rows, columns = rows + tile.y, columns + tile.x
        half = 0.48 * np.stack([local[rows, columns, across], -local[rows, columns, up]], -1)
        centre = np.stack([columns + 0.5, rows + 0.5], -1)
        segments.append(np.stack([centre - half, centre + half], 1))
        colours.append(np.clip(np.abs(direction[rows, columns]) * 1.1 + 0.08, 0, 1))
    background = apply_colourmap(fa, (0, 2.2))
    return render_png(layout, background, segments=(np.concatenate(segments), np.concatenate(colours)), keep_hue=True)


def cnr_and_tsnr(quality: Quality, mask: Volume) -> bytes | None:
    """Contrast-to-noise ratio and temporal signal-to-noise ratio of b=0, axial slices; None if neither was measured."""
    maps = [(name, v) for name, v in (("CNR", quality.cnr), ("tSNR of b=0", quality.tsnr)) if v is not None]
    if not maps:
        return None
    layout = Layout.rows(View.of(mask), ("axial",) * len(maps), tuple(name for name, _ in maps))
    canvas = layout.paint_groups([volume for _, volume in maps])
    inside = layout.paint(mask)
    rgb = np.zeros((*canvas.shape, 3), np.uint8)
    bars = []
    for (name, _), group in zip(maps, layout.groups, strict=True):
        rows = slice(group.tiles[0].y, group.tiles[0].y + group.tiles[0].height)
        limits = (0.0, window(canvas[rows], inside[rows], 99)[1])
        rgb[rows] = np.where(inside[rows][..., None] > 0.5, apply_colourmap(canvas[rows], limits, "viridis"), 0)
        bars.append(ColourBar("viridis", limits, name.split()[0]))
    return render_png(layout, rgb, bars=bars)
