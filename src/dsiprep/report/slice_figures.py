"""From results to pictures of slices (PNG). Curves are in `plots.py`; what they mean is in `sections.py`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Coregistration,
    Denoised,
    Distortion,
    Motion,
    Preprocessed,
    Quality,
)
from dsiprep.ops.qspace.tensor import main_directions
from dsiprep.report.rendering import BRAIN, GREY, SIGNED, WHITE, Bar, Contour, colour, picture
from dsiprep.report.slice_layout import ACROSS, Group, Layout, View, sample_at, symmetric, window

AXIAL = ("axial", "axial")
TENSOR_B = 1300.0  # s/mm²: Gaussian diffusion holds well enough for a direction
TENSOR_DIRECTIONS = 12


def _grey(layout: Layout, canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5) -> np.ndarray:
    """A grey picture, each group windowed for itself."""
    rgb = np.zeros((*canvas.shape, 3), np.uint8)
    for group in layout.groups:
        rows = slice(group.tiles[0].y, group.tiles[0].y + group.tiles[0].height)
        columns = slice(group.tiles[0].x, group.tiles[-1].x + group.tiles[-1].width)
        part = None if inside is None else inside[rows, columns]
        rgb[rows, columns] = colour(canvas[rows, columns], window(canvas[rows, columns], part, top))
    return rgb


def _mean(dwi: DWI, chosen: np.ndarray) -> Volume:
    """Mean of some volumes, added up one by one so that a memory-mapped series stays on the disk."""
    total = torch.zeros(dwi.grid.shape, dtype=torch.float32)
    index = np.flatnonzero(chosen)
    for v in index:
        total += dwi.data[int(v)].cpu().float()
    return Volume(total / max(len(index), 1), dwi.grid)


def denoising(acquired: Acquired, denoised: Denoised) -> tuple[list[tuple[str, bytes]], bytes]:
    """Before and after denoising as frames, and what was removed.

    A b=0 volume and the volume of highest b, axial slices. All frames of a row share one window.
    """
    dwi = acquired.dwi
    chosen = (int(np.argmin(dwi.bvals)), int(np.argmax(dwi.bvals)))
    view = View.of(acquired.mask, 6)
    layout = Layout.rows(view, AXIAL, tuple(f"b = {dwi.bvals[v]:.0f}" for v in chosen))
    before = layout.paint_groups([dwi.volume(v) for v in chosen])
    after = layout.paint_groups([denoised.dwi.volume(v) for v in chosen])
    inside = layout.paint(acquired.mask)
    frames = [("before", before), ("after", after)]
    shown = [(name, picture(layout, _paired(layout, canvas, after, inside))) for name, canvas in frames]
    return shown, _removed(layout, before - after, inside)


def _paired(layout: Layout, canvas: np.ndarray, reference: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Grey through the windows of another canvas, group by group."""
    rgb = np.zeros((*canvas.shape, 3), np.uint8)
    for group in layout.groups:
        rows = slice(group.tiles[0].y, group.tiles[0].y + group.tiles[0].height)
        rgb[rows] = colour(canvas[rows], window(reference[rows], inside[rows], 99.8))
    return rgb


def _removed(layout: Layout, residual: np.ndarray, inside: np.ndarray) -> bytes:
    groups = tuple(Group(g.plane, f"removed, {g.tag}", g.tiles) for g in layout.groups)
    limits = symmetric(residual, inside, 99)
    named = Layout(layout.view, groups, layout.width, layout.height)
    return picture(named, colour(residual, limits), bars=[Bar("gray", limits, "removed")])


def noise_level(noise: Volume, mask: Volume) -> bytes:
    """Standard deviation of the noise, axial slices."""
    layout = Layout.rows(View.of(mask, 6), ("axial",))
    canvas = layout.paint(noise)
    limits = (0.0, window(canvas, layout.paint(mask))[1])
    return picture(layout, colour(canvas, limits, "magma"), bars=[Bar("magma", limits, "noise SD")])


def reference(motion: Motion) -> bytes:
    """The b=0 reference that all volumes were aligned to, with the brain mask."""
    layout = Layout.rows(View.of(motion.mask))
    canvas, mask = layout.paint(motion.dwiref), layout.paint(motion.mask)
    low, high = window(canvas, mask)
    return picture(layout, colour(canvas, (low, high)), [Contour(mask, BRAIN)])


def realignment(dwi: DWI, motion: Motion) -> list[tuple[str, bytes]]:
    """Mean of all diffusion-weighted volumes, as acquired and with every volume put onto the dwiref."""
    layout = Layout.trio(View.of(motion.mask))
    points, places = layout.points()
    weighted = [p for p, v in enumerate(motion.volumes) if not dwi.is_b0[v]]
    before = np.zeros(len(points), np.float32)
    after = np.zeros(len(points), np.float32)
    for p in weighted:
        volume = dwi.volume(int(motion.volumes[p]))
        before += sample_at(volume, points)
        after += sample_at(volume, points, via=motion.transforms[p])
    count = max(len(weighted), 1)
    mask = layout.paint(motion.mask)
    canvases = [layout.scatter(values / count, places) for values in (before, after)]
    low, high = window(canvases[1], mask, 99.7)
    return [
        (name, picture(layout, colour(canvas, (low, high))))
        for name, canvas in zip(("before", "after"), canvases, strict=True)
    ]


def tissue_contour(layout: Layout, anatomy: Anatomy, via: np.ndarray | None = None) -> list[Contour]:
    """White matter and brain outlines of the structural image; `via` maps the layout's world to ACPC."""
    contours = [Contour(layout.paint(anatomy.mask, via=via), BRAIN, 0.9)]
    if anatomy.tissue is not None:
        white = Volume(anatomy.tissue[2], anatomy.image.grid)
        contours.append(Contour(layout.paint(white, via=via), WHITE, 0.9))
    return contours


def unwarping(
    distortion: Distortion, blip: int, mask: Volume, anatomy: Anatomy, coregistration: Coregistration
) -> list[tuple[str, bytes]]:
    """b=0 of one blip before and after, under the outlines of the structural image."""
    layout = Layout.rows(View.of(mask))
    to_acpc = np.linalg.inv(coregistration.dwiref_to_acpc.matrix)
    contours = tissue_contour(layout, anatomy, to_acpc) if anatomy.modality != "none" else []
    inside = layout.paint(mask)
    frames = []
    for name, volume in (("before", distortion.before[blip]), ("after", distortion.after[blip])):
        canvas = layout.paint(volume)
        frames.append((name, picture(layout, colour(canvas, window(canvas, inside, 99)), contours)))
    return frames


def blip_difference(distortion: Distortion, mask: Volume) -> list[tuple[str, bytes]]:
    """Blip-up minus blip-down before and after, each scaled to its own mean in the brain."""
    layout = Layout.rows(View.of(mask))
    inside = layout.paint(mask)
    canvases = []
    for pair in (distortion.before, distortion.after):
        up, down = (layout.paint(volume) for volume in pair)
        means = [float(canvas[inside > 0.5].mean() or 1) for canvas in (up, down)]
        canvases.append(200 * (up / means[0] - down / means[1]) / 2)
    limits = symmetric(canvases[0], inside, 98)
    bar = Bar(SIGNED, limits, "% of mean")
    return [
        (name, picture(layout, colour(canvas, limits, SIGNED), [Contour(inside, "#dddddd", 0.7)], [bar]))
        for name, canvas in zip(("before", "after"), canvases, strict=True)
    ]


def field(distortion: Distortion, mask: Volume, axis: np.ndarray) -> tuple[bytes, str]:
    """The off-resonance in Hz; where no readout time is known, the displacement in mm along `axis` (3,)."""
    layout = Layout.rows(View.of(mask))
    inside = layout.paint(mask)
    if distortion.fieldmap_hz is not None:
        volume, unit = distortion.fieldmap_hz, "Hz"
    else:
        up = distortion.fields[0]
        along = torch.einsum("dijk,d->ijk", up.data.cpu().float(), torch.as_tensor(axis, dtype=torch.float32))
        volume, unit = Volume(along, up.grid), "mm"
    canvas = layout.paint(volume)
    limits = symmetric(canvas, inside, 99.5)
    shown = np.where(inside[..., None] > 0.5, colour(canvas, limits, "RdBu_r"), 0).astype(np.uint8)
    return picture(layout, shown, bars=[Bar("RdBu_r", limits, unit)]), unit


def structure(anatomy: Anatomy) -> bytes:
    """The structural image in ACPC space with brain, white- and grey-matter outlines."""
    layout = Layout.rows(View.of(anatomy.mask))
    canvas = layout.paint(anatomy.image)
    inside = layout.paint(anatomy.mask)
    contours = [Contour(inside, BRAIN)]
    if anatomy.tissue is not None:
        white, grey = (layout.paint(Volume(anatomy.tissue[t], anatomy.image.grid)) for t in (2, 1))
        contours += [Contour(white + grey, GREY, 0.8), Contour(white, WHITE, 0.8)]
    return picture(layout, colour(canvas, window(canvas, inside)), contours)


def normalisation(template: Volume, warped: Volume) -> list[tuple[str, bytes]]:
    """The template and the subject's brain brought onto it, under the outline of the template's brain."""
    mask = Volume((template.data > 0).float(), template.grid)
    layout = Layout.rows(View.of(mask))
    inside = layout.paint(mask)
    contour = [Contour(inside, BRAIN, 0.9)]
    frames = []
    for name, volume in (("template", template), ("subject", warped)):
        canvas = layout.paint(volume)
        frames.append((name, picture(layout, colour(canvas, window(canvas, inside)), contour)))
    return frames


def coregistration(preprocessed: Preprocessed, anatomy: Anatomy) -> list[tuple[str, bytes]]:
    """The b=0 reference and the structural image in ACPC space, under the same outlines."""
    layout = Layout.rows(View.of(anatomy.mask))
    inside = layout.paint(anatomy.mask)
    contours = tissue_contour(layout, anatomy)
    frames = []
    other = "reference" if anatomy.modality == "none" else anatomy.modality
    for name, volume in (("dwiref", preprocessed.dwiref), (other, anatomy.image)):
        canvas = layout.paint(volume)
        frames.append((name, picture(layout, colour(canvas, window(canvas, inside, 99)), contours)))
    return frames


def b_bands(bvals: np.ndarray, is_b0: np.ndarray, count: int = 3) -> list[tuple[str, np.ndarray]]:
    """b=0 and up to `count` bands of b with about as many volumes each: [(label, (n,) bool)]."""
    bands = [("b = 0", is_b0)] if is_b0.any() else []
    weighted = np.flatnonzero(~is_b0)
    levels = np.unique(np.round(bvals[weighted], -2))
    if len(levels) == 0:
        return bands
    edges = np.unique(np.quantile(bvals[weighted], np.linspace(0, 1, min(count, len(levels)) + 1)))
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0] + 1])
    for low, high in pairwise(edges):
        last = high == edges[-1]
        chosen = ~is_b0 & (bvals >= low) & ((bvals <= high) if last else (bvals < high))
        if chosen.any():
            ends = np.round([bvals[chosen].min(), bvals[chosen].max()], -1).astype(int)
            name = f"b {ends[0]}" if ends[0] == ends[1] else f"b {ends[0]}-{ends[1]}"
            bands.append((f"{name}, {int(chosen.sum())} vol.", chosen))
    return bands


def means(preprocessed: Preprocessed) -> bytes:
    """Mean image of b=0 and of bands of b, with the brain mask."""
    dwi = preprocessed.dwi
    bands = b_bands(dwi.bvals, dwi.is_b0)
    layout = Layout.rows(View.of(preprocessed.mask), ("axial",) * len(bands), tuple(name for name, _ in bands))
    canvas = layout.paint_groups([_mean(dwi, chosen) for _, chosen in bands])
    inside = layout.paint(preprocessed.mask)
    return picture(layout, _grey(layout, canvas, inside, 99.7), [Contour(inside, BRAIN, 0.9)])


def tensor_volumes(bvals: np.ndarray, is_b0: np.ndarray) -> np.ndarray:
    """The volumes of lowest b that a tensor can be fitted to: up to 1300 s/mm², more if these are too few."""
    weighted = np.sort(bvals[~is_b0])
    if len(weighted) < 6:
        return np.zeros(len(bvals), bool)
    needed = weighted[min(TENSOR_DIRECTIONS, len(weighted)) - 1]
    return ~is_b0 & (bvals <= max(TENSOR_B, needed + 50))


def _directions(preprocessed: Preprocessed, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """FA (h, w) and principal direction (h, w, 3) inside the mask; None for too few directions."""
    dwi = preprocessed.dwi
    chosen = tensor_volumes(dwi.bvals, dwi.is_b0)
    if not chosen.any() or not dwi.is_b0.any():
        return None
    points, places = layout.points()
    keep = sample_at(preprocessed.mask, points) > 0.5
    points, places = points[keep], places[keep]
    used = np.flatnonzero(chosen | dwi.is_b0)
    signal = np.stack([sample_at(dwi.volume(int(v)), points) for v in used])
    fa, direction = main_directions(signal, np.where(dwi.is_b0, 0, dwi.bvals)[used], dwi.bvecs[used])
    return layout.scatter(fa, places), layout.scatter(direction, places)


def _rgb(fa: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return (255 * np.clip(np.abs(direction) * fa[..., None] * 1.25, 0, 1)).astype(np.uint8)


def colour_fa(preprocessed: Preprocessed) -> bytes | None:
    """FA coloured by principal direction in the world: red R-L, green A-P, blue S-I."""
    layout = Layout.rows(View.of(preprocessed.mask))
    found = _directions(preprocessed, layout)
    return None if found is None else picture(layout, _rgb(*found), hue=True)


def fibre_sticks(preprocessed: Preprocessed) -> bytes | None:
    """Principal directions as sticks over FA on three planes."""
    view = View.of(preprocessed.mask)
    layout = Layout.trio(view)
    found = _directions(preprocessed, layout)
    if found is None:
        return None
    fa, direction = found
    local = direction @ view.axes
    segments, colours = [], []
    for tile in layout.tiles:
        across, up = ACROSS[tile.plane]
        rows, columns = np.nonzero(fa[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] > 0.18)
        rows, columns = rows + tile.y, columns + tile.x
        half = 0.48 * np.stack([local[rows, columns, across], -local[rows, columns, up]], -1)
        centre = np.stack([columns + 0.5, rows + 0.5], -1)
        segments.append(np.stack([centre - half, centre + half], 1))
        colours.append(np.clip(np.abs(direction[rows, columns]) * 1.1 + 0.08, 0, 1))
    base = colour(fa, (0, 2.2))
    return picture(layout, base, sticks=(np.concatenate(segments), np.concatenate(colours)), hue=True)


def contrast(quality: Quality, mask: Volume) -> bytes | None:
    """Contrast to noise and temporal signal to noise, axial slices; None where neither was measured."""
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
        rgb[rows] = colour(canvas[rows], limits, "viridis")
        bars.append(Bar("viridis", limits, name.split()[0]))
    return picture(layout, rgb, bars=bars)
