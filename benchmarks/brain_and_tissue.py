"""Dice of brain masks and tissues on heads of known truth: `python benchmarks/brain_and_tissue.py LABELS`.

LABELS is a folder of whole-head label maps (head_01.nii.gz ...) with FreeSurfer's labels in the brain and 500 to 530
outside of it. Each head becomes a T1w, a T2w and a b=0 image: brightness of each tissue drawn at random within what the
contrast allows, texture, a turn of up to 20 degrees, voxels of 0.8 to 2 mm, receive bias and Rician noise of 2 to 8 %.
In a b=0 image fat is suppressed, shape bent along the phase-encoding axis and signal lost near air; of every third
head it leaves the lower 25 mm of the brain out.

Brain, in truth: all of FreeSurfer's brain labels with the ventricles, and label 24, the CSF around them, out to the
inside of the skull. That is what SynthStrip calls brain unless it is told `--no-csf`, and what a b=0 image shows as one
bright body. Dural sinuses and vessels narrower than 5 mm between them belong to it (closing); strands along optic and
cranial nerves do not (opening), nor does the spinal canal below the lowest voxel of the brain's labels.
GM is cortex and deep grey matter; WM is white matter, lesions in it, brain stem and ventral diencephalon; CSF is all
else in the brain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid, Volume
from dsiprep.io.templates import load_template
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0, brain_mask_dwiref, brain_mask_t1w, brain_mask_t2w
from dsiprep.settings import AnatomySettings
from dsiprep.stages.anatomy import process_anatomy

WHITE = (2, 41, 7, 46, 16, 28, 60, 85, 25, 57, 77)
CORTEX = (3, 42, 8, 47, 17, 18, 53, 54, 26, 58)
DEEP = (10, 49, 11, 50, 12, 51, 13, 52)
FLUID = (4, 5, 14, 15, 43, 44, 72)
CHOROID = (31, 63, 136, 137, 163, 164)
VESSELS = (30, 62, 502, 514)
AROUND = 24
OUTSIDE = {"eye": 506, "soft": 507, "orbit": 508, "mucosa": 509, "skin": 511, "bone": 515, "marrow": 516}
CORD = (512, 530)  # spinal cord and optic nerves look like white matter, and are not brain
CLOSING_MM = OPENING_MM = 2.5
PACKAGED = "MNI152NLin2009aSym"  # the same template on every machine
# Within a tissue, fine and coarse. White matter of two people's T1w varied by 0.029 (1 mm) and 0.041 (2 mm) about its
# mean within 8 mm, noise included
TEXTURE = (0.03, 0.02)
CONTRASTS = ("T1w", "T2w", "b0")
# (least, most) of the brightness of each tissue; that of grey matter is 1
RANGES = {
    "T1w": {
        "white": (1.4, 1.7),
        "fluid": (0.25, 0.45),
        "vessels": (0.3, 1.5),
        "eye": (0.25, 0.4),
        "muscle": (0.8, 1.1),
        "fat": (1.5, 2.2),
        "mucosa": (0.8, 1.1),
        "bone": (0.1, 0.25),
        "marrow": (0.6, 1.6),
    },
    "T2w": {
        "white": (0.65, 0.85),
        "fluid": (1.8, 2.6),
        "vessels": (0.1, 0.6),
        "eye": (1.8, 2.6),
        "muscle": (0.25, 0.45),
        "fat": (0.7, 1.5),
        "mucosa": (1.0, 1.6),
        "bone": (0.05, 0.15),
        "marrow": (0.3, 0.9),
    },
    "b0": {
        "white": (0.7, 0.85),
        "fluid": (1.7, 2.6),
        "vessels": (0.1, 0.4),
        "eye": (1.6, 2.4),
        "muscle": (0.2, 0.4),
        "fat": (0.05, 0.25),
        "mucosa": (0.5, 1.0),
        "bone": (0.02, 0.08),
        "marrow": (0.05, 0.15),
    },
}


@dataclass(frozen=True, eq=False)
class Head:
    """Labels of a head, cropped to it, and what is brain in it."""

    labels: np.ndarray
    brain: np.ndarray
    grid: Grid


@dataclass(frozen=True, eq=False)
class Case:
    """An image and its truth on the same grid: brain, and 0 (none), 1 (CSF), 2 (GM), 3 (WM)."""

    image: Volume
    brain: np.ndarray
    tissue: np.ndarray
    words: str


def read_head(path: Path) -> Head:
    """A label map in RAS+, cropped to the head and 10 mm around it."""
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(np.int16)
    head = ndimage.binary_opening(labels > 0, iterations=2)
    box = tuple(
        slice(max(0, int(w[0]) - 10), int(w[-1]) + 11)
        for w in (np.flatnonzero(head.any(axis=tuple(b for b in range(3) if b != a))) for a in range(3))
    )
    affine = np.asarray(image.affine, float).copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    labels = np.ascontiguousarray(labels[box])
    return Head(labels, brain_of(labels), Grid(labels.shape, affine))


def brain_of(labels: np.ndarray) -> np.ndarray:
    """True where there is brain, by the convention above; labels at 1 mm, the third axis upwards."""
    inner = np.isin(labels, (*WHITE, *CORTEX, *DEEP, *FLUID, *CHOROID))
    lowest = int(np.argwhere(inner)[:, 2].min())
    body = inner | (labels == AROUND)
    body[:, :, :lowest] = False
    near = ndimage.distance_transform_edt(~body) <= CLOSING_MM
    body = ndimage.distance_transform_edt(near) > CLOSING_MM
    pieces, _ = ndimage.label(ndimage.distance_transform_edt(body) > OPENING_MM)
    core = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    body = ndimage.binary_fill_holes(ndimage.distance_transform_edt(~core) <= OPENING_MM) | inner
    body[:, :, :lowest] = False
    return np.asarray(body)


def _noise(rng: np.random.Generator, grid: Grid, sigma_mm: float) -> np.ndarray:
    """Noise smoothed over `sigma_mm`, unit variance, made on a coarse grid."""
    coarse = grid.at_spacing(max(1.0, sigma_mm / 2))
    made = ndimage.gaussian_filter(rng.standard_normal(coarse.shape, np.float32), sigma_mm / coarse.voxel_sizes)
    return resample_onto(torch.from_numpy(made / made.std())[None], coarse, grid)[0].numpy()


def paint(head: Head, contrast: str, rng: np.random.Generator) -> np.ndarray:
    """The head's brightness without bias and noise, float32 on its own grid."""
    level = {name: rng.uniform(*limits) for name, limits in RANGES[contrast].items()}
    white, wander = level["white"], rng.uniform(0.96, 1.04, 4)
    table = np.zeros(600, np.float32)
    table[list(WHITE)] = table[list(CORD)] = white
    table[[16, 28, 60]] = 0.9 * white + 0.1
    table[[25, 57, 77]] = 0.5 * white + 0.5
    table[list(CORTEX)] = 1
    table[[8, 47]] = wander[0]
    table[[11, 50, 12, 51]] = wander[1] * (0.75 + 0.25 * white)
    table[[10, 49]], table[[13, 52]] = wander[2] * (0.55 + 0.45 * white), wander[3] * (0.25 + 0.75 * white)
    table[[AROUND, *FLUID]] = level["fluid"]
    table[list(CHOROID)] = 0.5 * level["fluid"] + 0.5
    table[list(VESSELS)] = level["vessels"]
    for name in ("eye", "mucosa", "bone", "marrow"):
        table[OUTSIDE[name]] = level[name]
    table[[OUTSIDE["soft"], OUTSIDE["orbit"]]], table[OUTSIDE["skin"]] = level["muscle"], level["fat"]
    painted = table[head.labels]
    fatty = np.clip(2 * _noise(rng, head.grid, 4.0), 0, 1) * (head.labels == OUTSIDE["soft"])
    painted += fatty * (level["fat"] - level["muscle"])
    fine = 1 + TEXTURE[0] * _noise(rng, head.grid, 1.2) + TEXTURE[1] * _noise(rng, head.grid, 6.0)
    return painted * fine.astype(np.float32)


def _pose(head: Head, rng: np.random.Generator) -> np.ndarray:
    """Points of the scanner to points of the head: a turn of up to 20 degrees about the middle of the brain."""
    middle = head.grid.to_world(np.argwhere(head.brain).mean(0))
    axis = rng.standard_normal(3)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.deg2rad(rng.uniform(0, 20)) * axis / np.linalg.norm(axis)).as_matrix()
    matrix[:3, 3] = middle  # the middle of the brain is the origin of the scanner
    return matrix


def _field_of_view(head: Head, pose: np.ndarray, contrast: str, size: float, cut: bool) -> Grid:
    """The whole head; of a b=0 image, what 12 mm above and below the brain leave of it."""
    inverse = np.linalg.inv(pose)

    def reach(what: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = head.grid.to_world(np.argwhere(what)[::50]) @ inverse[:3, :3].T + inverse[:3, 3]
        return points.min(0) - 12, points.max(0) + 12

    low, high = reach(head.labels > 0)
    if contrast == "b0":
        brain_low, brain_high = reach(head.brain)
        low[2], high[2] = brain_low[2] + (37 if cut else 0), brain_high[2]
    shape = np.ceil((high - low) / size).astype(int)
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = low
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _bend(head: Head, grid: Grid, pose: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Displacement of a b=0 image along j in mm, and how near air each voxel is, 0 to 1; both on `grid`."""
    inside = ndimage.binary_fill_holes(head.labels > 0)
    air = ndimage.gaussian_filter((inside & (head.labels == 0)).astype(np.float32), 8)
    near = resample_onto(torch.from_numpy(air / air.max())[None], head.grid, grid, pose)[0].numpy()
    along = 2.0 * _noise(rng, grid, 18.0) + rng.uniform(4, 10) * near * rng.choice((-1, 1))
    return along, near


def make_case(head: Head, number: int, contrast: str) -> Case:
    """The image of one head in one contrast; the same numbers give the same image."""
    rng = np.random.default_rng([number, CONTRASTS.index(contrast)])
    painted, pose = paint(head, contrast, rng), _pose(head, rng)
    size = rng.uniform(0.8, 2.0)
    cut = contrast == "b0" and number % 3 == 0
    grid = _field_of_view(head, pose, contrast, size, cut)
    blur = 0.35 + np.sqrt(max(size**2 - 1, 0)) / 2.355
    along, near = _bend(head, grid, pose, rng) if contrast == "b0" else (None, None)
    # (3, i, j, k) in the head's world, along the scanner's j
    bend = None if along is None else torch.from_numpy(pose[:3, 1, None, None, None].astype(np.float32) * along)

    def brought(data: np.ndarray) -> np.ndarray:
        smooth = torch.from_numpy(ndimage.gaussian_filter(data.astype(np.float32), blur))
        return resample_onto(smooth[None], head.grid, grid, pose, bend)[0].numpy()

    groups = (head.brain, np.isin(head.labels, (*CORTEX, *DEEP)), np.isin(head.labels, WHITE))
    whole, grey, white = (brought(group) for group in groups)
    tissue = 1 + np.stack([whole - grey - white, grey, white]).argmax(0)
    image = brought(painted)
    if along is not None and near is not None:
        image *= (1 - 0.6 * near) * np.clip(1 + np.gradient(along, size, axis=1), 0.3, 3)
    bias, noise = rng.uniform(0.1, 0.25), rng.uniform(0.02, 0.08)
    image *= np.exp(bias * _noise(rng, grid, 45.0))
    sigma = noise * max(RANGES[contrast]["white"][0], 1.0)
    image = np.abs(image + sigma * (rng.standard_normal(grid.shape) + 1j * rng.standard_normal(grid.shape)))
    words = f"{size:.1f} mm, noise {100 * noise:.0f} %{', cut' if cut else ''}"
    volume = Volume(torch.from_numpy((1000 * image).astype(np.float32)), grid)
    return Case(volume, whole > 0.5, np.where(whole > 0.5, tissue, 0), words)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Twice the overlap over the sum of both."""
    return float(2 * np.sum(first & second) / max(np.sum(first) + np.sum(second), 1))


def mask_row(case: Case, contrast: str) -> dict[str, float]:
    """Dice of the masks that serve this contrast, and CPU seconds of the better one."""
    find = {"T1w": brain_mask_t1w, "T2w": brain_mask_t2w, "b0": brain_mask_dwiref}[contrast]
    start = time.process_time()
    found = find(case.image).numpy() > 0.5
    row = {"brain": dice(found, case.brain), "CPU s": time.process_time() - start}
    if contrast == "b0":
        row["fast"] = dice(brain_mask_b0(case.image).numpy() > 0.5, case.brain)
    return row


def tissue_row(case: Case, contrast: str) -> dict[str, float]:
    """Dice of the tissues that the whole anatomical stage finds, compared on its own grid."""
    start = time.process_time()
    settings = replace(AnatomySettings(), finest_mm=2.0, modality=contrast)
    found = process_anatomy((case.image,), None, None, load_template(PACKAGED, contrast), settings)
    seconds = time.process_time() - start
    grid, pose = found.mask.grid, found.anat_to_acpc.matrix
    shares = np.stack([case.tissue == value for value in range(4)]).astype(np.float32)
    truth = resample_onto(torch.from_numpy(shares), case.image.grid, grid, pose).numpy().argmax(0)
    best = np.where(found.mask.numpy() > 0.5, 1 + found.tissue.argmax(0).numpy(), 0)
    row = {name: dice(best == value, truth == value) for value, name in enumerate(("CSF", "GM", "WM"), 1)}
    return {**row, "CPU s": seconds}


def doubt_row(case: Case, contrast: str) -> dict[str, float]:
    """Whether a mask is doubted (1 or 0) that is found, and others with errors as masks have them."""
    settings = replace(AnatomySettings(), modality=contrast, normalize=False)
    found = {"T1w": brain_mask_t1w, "T2w": brain_mask_t2w}[contrast](case.image).numpy() > 0.5
    outside = ndimage.distance_transform_edt(~found, sampling=case.image.grid.voxel_sizes)
    inside = ndimage.distance_transform_edt(found, sampling=case.image.grid.voxel_sizes)
    height = np.argwhere(found)[:, 2]
    lower = np.arange(found.shape[2]) < np.percentile(height, 80)
    masks = {
        "found": found,
        "4 mm too large": outside <= 4,
        "4 mm too small": inside > 4,
        "top fifth lost": found & lower,
    }
    row = {}
    for name, mask in masks.items():
        given = Volume(torch.from_numpy(mask.astype(np.float32)), case.image.grid)
        notes = process_anatomy((case.image,), None, None, load_template(PACKAGED, contrast), settings, given).notes
        row[name] = float(any("agree only" in note for note in notes))
    return row


def report(rows: dict[str, list[dict[str, float]]]) -> None:
    """Mean and worst of each column, as a Markdown table."""
    print("\n| images | n | figure | mean | worst |\n|---|---|---|---|---|")
    for name, of_name in rows.items():
        for key in of_name[0] if of_name else ():
            values = np.array([row[key] for row in of_name])
            worst = values.max() if key == "CPU s" else values.min()
            digits = 1 if key == "CPU s" else 3
            print(f"| {name} | {len(values)} | {key} | {values.mean():.{digits}f} | {worst:.{digits}f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("labels", type=Path, help="folder of head_NN.nii.gz")
    parser.add_argument("--heads", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--contrasts", nargs="+", choices=CONTRASTS, default=list(CONTRASTS), help="b0 has masks alone")
    parser.add_argument("--tissue", action="store_true", help="tissues (of T1w, or --contrasts T2w) instead of masks")
    parser.add_argument("--doubts", action="store_true", help="which masks, right and wrong, the stage doubts")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows: dict[str, list[dict[str, float]]] = {}
    measure = tissue_row if chosen.tissue else doubt_row if chosen.doubts else mask_row
    for number in chosen.heads:
        head = read_head(chosen.labels / f"head_{number:02d}.nii.gz")
        for contrast in chosen.contrasts:
            case = make_case(head, number, contrast)
            row = measure(case, contrast)
            rows.setdefault(contrast, []).append(row)
            print(number, contrast, case.words, {k: round(v, 3) for k, v in row.items()}, flush=True)
    report(rows)


if __name__ == "__main__":
    main()
