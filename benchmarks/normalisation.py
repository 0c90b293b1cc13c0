"""Nonlinear registration beside its peers: `python benchmarks/normalisation.py OUT --labels FOLDER`.

Makes T1w-like brains from pairs of label maps of real heads, gives both images, the brain mask of the fixed one and
one affine matrix to every program, each in a process of its own, carries the labels of the moving head over by the
displacement each wrote, and prints overlap, folding, time and memory as a Markdown table. The affine is greedy's and
the same for all; the time it took is not in the table.

Needs picsl_greedy and antspyx. The label maps are those that SynthSeg was trained on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

PAIRS = ("01-02", "03-04", "05-06", "07-08")  # fixed-moving
MARGIN_MM = 10.0  # around the brain, in the images that all programs get
NOISE = 2.5
CSF = (4, 5, 14, 15, 24, 43, 44)
MEANS = {  # of a T1w image, white matter 110
    2: 110, 41: 110, 3: 70, 42: 70, 7: 104, 46: 104, 8: 72, 47: 72, 10: 91, 49: 91, 11: 77, 50: 77, 12: 83, 51: 83,
    13: 99, 52: 99, 16: 98, 17: 71, 53: 71, 18: 69, 54: 69, 26: 74, 58: 74, 28: 95, 60: 95, **dict.fromkeys(CSF, 24),
}  # fmt: skip
GROUPS = {
    "subcortical": (10, 11, 12, 13, 17, 18, 26, 49, 50, 51, 52, 53, 54, 58),
    "cortex": (3, 42),
    "WM": (2, 41),
    "all": tuple(MEANS),
}


def synthesise(labels: Path, out: Path, name: str, voxel: float, seed: int) -> None:
    """`name`.nii, a T1w-like brain, its labels and its mask, cropped.

    Every head has contrast, texture, bias and noise of its own.
    """
    rng = np.random.default_rng(seed)
    image = nib.load(labels)
    atlas = np.asarray(image.dataobj).astype(np.int16)
    atlas[atlas >= 500] = 0  # outside the brain
    inside = np.argwhere(atlas)
    low = np.maximum(inside.min(axis=0) - round(MARGIN_MM), 0)
    high = np.minimum(inside.max(axis=0) + round(MARGIN_MM) + 1, atlas.shape)
    atlas = atlas[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    affine = image.affine @ nib.affines.from_matvec(np.eye(3), low)
    table = np.zeros(atlas.max() + 1)
    for label in np.unique(atlas[atlas > 0]):
        table[label] = MEANS.get(int(label), 60) * (1 + 0.03 * rng.normal())
    data = table[atlas] * (1 + 0.015 * _smooth_field(rng, atlas.shape, 2.0) * (atlas > 0))
    data = ndimage.gaussian_filter(data, max(0.5, 0.45 * voxel))  # partial volumes
    data *= 1 + 0.08 * _smooth_field(rng, atlas.shape, 30.0)
    data = np.hypot(data + rng.normal(0, NOISE, atlas.shape), rng.normal(0, NOISE, atlas.shape)) * (atlas > 0)
    step = round(voxel)
    some = (slice(None, None, step),) * 3
    affine = affine @ np.diag([step, step, step, 1])
    nib.save(nib.Nifti1Image(data[some].astype(np.float32), affine), out / f"{name}.nii")
    nib.save(nib.Nifti1Image(atlas[some], affine), out / f"{name}_labels.nii")
    nib.save(nib.Nifti1Image((atlas[some] > 0).astype(np.uint8), affine), out / f"{name}_mask.nii")


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Smooth noise of standard deviation 1."""
    coarse = max(1.0, sigma / 3)
    small = rng.normal(size=[int(n / coarse) + 3 for n in shape])
    field = ndimage.zoom(ndimage.gaussian_filter(small, sigma / coarse), coarse, order=1)
    field = field[tuple(slice(n) for n in shape)]
    return (field - field.mean()) / field.std()


def greedy_affine(folder: Path) -> None:
    """The affine that every program starts from: affine.mat, RAS+ mm, fixed to moving points."""
    from picsl_greedy import GreedyFloat3D

    GreedyFloat3D().execute(
        f"-threads 1 -a -dof 12 -m NCC 2x2x2 -ia-image-centers -n 100x50x0 -seed 1 -gm {folder}/fixed_mask.nii "
        f"-i {folder}/fixed.nii {folder}/moving.nii -o {folder}/affine.mat"
    )


def dsiprep(folder: Path) -> None:
    """As the anatomy stage calls it."""
    import torch

    from dsiprep.io.nifti import read_volume
    from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic

    torch.set_num_threads(1)
    fixed, moving = read_volume(folder / "fixed.nii"), read_volume(folder / "moving.nii")
    finest = float(fixed.grid.voxel_sizes.max())
    mask = read_volume(folder / "fixed_mask.nii")
    fit = register_diffeomorphic(moving, fixed, np.loadtxt(folder / "affine.mat"), fixed_mask=mask, finest_mm=finest)
    for name, field in (("warp", fit.forward), ("inverse", fit.inverse)):
        lps = np.moveaxis(field.data.numpy(), 0, -1)[..., None, :] * np.float32([-1, -1, 1])
        warp = nib.Nifti1Image(lps, field.grid.affine)
        warp.header.set_intent("vector")
        nib.save(warp, folder / f"dsiprep_{name}.nii")


def greedy(folder: Path) -> None:
    """The settings of its documentation, in single precision; its field is not rounded."""
    from picsl_greedy import GreedyFloat3D

    GreedyFloat3D().execute(
        f"-threads 1 -m NCC 2x2x2 -n 100x50x10 -wp 0 -gm {folder}/fixed_mask.nii "
        f"-i {folder}/fixed.nii {folder}/moving.nii -it {folder}/affine.mat "
        f"-o {folder}/greedy_warp.nii -oinv {folder}/greedy_inverse.nii"
    )


def syn(folder: Path) -> None:
    """antspyx's default SyN (mutual information), less its affine."""
    _ants(folder, "syn", "SyNOnly")


def synquick(folder: Path) -> None:
    """antsRegistrationSyNQuick.sh, less its rigid and affine stages."""
    _ants(folder, "synquick", "antsRegistrationSyNQuick[so]")


def _ants(folder: Path, name: str, kind: str) -> None:
    import ants

    flip = np.diag([-1.0, -1, 1, 1])
    matrix = flip @ np.loadtxt(folder / "affine.mat") @ flip
    start = ants.create_ants_transform(
        transform_type="AffineTransform", dimension=3, matrix=matrix[:3, :3], translation=matrix[:3, 3]
    )
    ants.write_transform(start, str(folder / "affine_itk.mat"))
    fixed, moving = (ants.image_read(str(folder / f"{n}.nii")) for n in ("fixed", "moving"))
    found = ants.registration(
        fixed,
        moving,
        kind,
        mask=ants.image_read(str(folder / "fixed_mask.nii")),
        initial_transform=str(folder / "affine_itk.mat"),
        outprefix=str(folder / f"{name}_"),
    )
    for role, key in (("warp", "fwdtransforms"), ("inverse", "invtransforms")):
        path = next(p for p in found[key] if p.endswith("arp.nii.gz"))
        warp = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(warp.dataobj, np.float32), warp.affine), folder / f"{name}_{role}.nii")


ENGINES: dict[str, Callable[[Path], None]] = {"dsiprep": dsiprep, "greedy": greedy, "syn": syn, "synquick": synquick}


def run(engine: str, folder: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in GB of one program on one thread, reading and writing included."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    command = [sys.executable, __file__, str(folder), "--run", engine]
    with (folder / f"{engine}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict.fromkeys(names, "1")
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{engine} failed; see {folder / engine}.log")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def scores(engine: str, folder: Path) -> list[float]:
    """Mean Dice of each group of structures; least Jacobian determinant; 99.9th percentile of the round trip, mm."""
    fixed, moving = (nib.load(folder / f"{n}_labels.nii") for n in ("fixed", "moving"))
    labels, others = np.asarray(fixed.dataobj), np.asarray(moving.dataobj)
    voxels = np.indices(labels.shape, np.float32)
    u = field_in_voxels(folder / f"{engine}_warp.nii", fixed.affine)
    affine = np.linalg.inv(moving.affine) @ np.loadtxt(folder / "affine.mat") @ fixed.affine
    points = np.tensordot(affine[:3, :3], voxels + u, 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    carried = ndimage.map_coordinates(others, points, order=0, mode="constant")
    found = {label: _dice(labels == label, carried == label) for label in MEANS}
    inside = labels > 0
    slopes = np.stack([np.stack(np.gradient(u[a]), axis=-1) for a in range(3)], axis=-2)[inside]
    v = field_in_voxels(folder / f"{engine}_inverse.nii", fixed.affine)
    there = voxels + v
    around = v + np.stack([ndimage.map_coordinates(c, there, order=1, mode="nearest") for c in u])
    trip = np.linalg.norm(around[:, inside], axis=0) * np.linalg.norm(fixed.affine[:3, 0])
    dice = [float(np.mean([found[label] for label in group])) for group in GROUPS.values()]
    return [*dice, float(np.linalg.det(slopes + np.eye(3)).min()), float(np.percentile(trip, 99.9))]


def field_in_voxels(path: Path, affine: np.ndarray) -> np.ndarray:
    """A warp file's LPS mm as voxels of the fixed image, (3, i, j, k)."""
    data = np.asarray(nib.load(path).dataobj, np.float32)[:, :, :, 0] * np.float32([-1, -1, 1])
    return np.moveaxis(data @ np.linalg.inv(affine[:3, :3]).T.astype(np.float32), -1, 0)


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float(np.sum(first & second)) / max(float(first.sum() + second.sum()), 1.0)


def main() -> None:
    """Synthesise, run, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", type=Path, help="folder with head_NN.nii.gz, FreeSurfer labels at 1 mm")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="fixed-moving")
    parser.add_argument("--voxel", type=float, default=1.0, choices=(1.0, 2.0))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=tuple(ENGINES))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.run:
        (greedy_affine if o.run == "affine" else ENGINES[o.run])(o.out)
        return
    print("| pair | program | CPU s | GB | " + " | ".join(GROUPS) + " | least Jacobian | round trip mm |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: dict[str, list[list[float]]] = {}
    for pair in o.pairs:
        folder = o.out / f"{pair}_{o.voxel:g}mm"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "affine.mat").exists():
            for name, head in zip(("fixed", "moving"), pair.split("-"), strict=True):
                synthesise(o.labels / f"head_{head}.nii.gz", folder, name, o.voxel, int(head))
            run("affine", folder)
        for engine in o.engines:
            rows.setdefault(engine, []).append([*run(engine, folder), *scores(engine, folder)])
            print(f"| {pair} | {engine} | " + " | ".join(f"{v:.3f}" for v in rows[engine][-1]) + " |", flush=True)
    for engine, found in rows.items():
        means = np.mean(found, axis=0)
        worst = [np.min(found, axis=0)[-2], np.max(found, axis=0)[-1]]
        print(
            f"| mean (worst of the last two) | {engine} | "
            + " | ".join(f"{v:.3f}" for v in (*means[:-2], *worst))
            + " |"
        )


if __name__ == "__main__":
    main()
