"""The displacement from MNI152NLin2009cAsym to 2009aSym: `python benchmarks/template_spaces.py T1W [--syn] [--write]`.

T1W is the brain of MNI152NLin2009cAsym, for example TemplateFlow's `res-02_desc-brain_T1w`. The 2009aSym template that
nilearn ships is registered to it, and the displacement is reduced to 3 mm. Prints, for the identity, the registration,
what is stored and (with --syn) ANTs' SyN through antspyx: the correlation of the two brains, the Dice of CSF, GM and WM
(2009aSym's priors against three intensity classes of 2009cAsym, found without priors), the mean distance in the brain
to SyN, the range of the Jacobian determinant, and the round trip. With --write, replaces the file in the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import DisplacementField
from dsiprep.io.bundled_template import DEFAULT_GRID, DISPLACEMENT, bundled_template
from dsiprep.io.nifti import read_volume
from dsiprep.ops.image.displacement_field import compose, invert, jacobian_determinant
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic

STORED_MM = 3.0
SMOOTHING_MM = 1.05  # standard deviation, before the displacement is sampled at 3 mm
UNIT_MM = 0.02
MARGIN = 3  # voxels around the brain in which the images are compared


def brain_of(image: Volume) -> np.ndarray:
    """The brain, filled, from an image that is zero outside."""
    return ndimage.binary_fill_holes(image.numpy() > 0.1 * float(image.data.max()))


def store(field: DisplacementField) -> dict[str, np.ndarray]:
    """The displacement at 3 mm, as integers."""
    affine = np.diag([STORED_MM, STORED_MM, STORED_MM, 1])
    affine[:3, 3] = field.grid.affine[:3, 3]
    i, j, k = (int(np.ceil(n / STORED_MM)) + 1 for n in field.grid.shape)
    smooth = torch.from_numpy(np.stack([ndimage.gaussian_filter(u, SMOOTHING_MM) for u in field.data.numpy()]))
    coarse = resample_onto(smooth, field.grid, Grid((i, j, k), affine))
    return {
        "displacement": np.rint(coarse.numpy() / UNIT_MM).astype(np.int16),
        "unit_mm": np.float64(UNIT_MM),
        "affine": affine,
    }


def restore(stored: dict[str, np.ndarray]) -> DisplacementField:
    """As `dsiprep.io.bundled_template` reads it, on the grid of the template."""
    data = torch.from_numpy(stored["displacement"].astype(np.float32) * float(stored["unit_mm"]))
    i, j, k = data.shape[1:]
    return DisplacementField(resample_onto(data, Grid((i, j, k), stored["affine"]), DEFAULT_GRID), DEFAULT_GRID)


def syn(fixed: Volume, moving: Volume) -> DisplacementField:
    """ANTs' SyN with the same images."""
    import ants

    def image(volume: Volume) -> ants.ANTsImage:
        spacing, origin = volume.grid.voxel_sizes.tolist(), (volume.grid.affine[:3, 3] * [-1, -1, 1]).tolist()
        direction = np.diag([-1.0, -1, 1])
        return ants.from_numpy(np.ascontiguousarray(volume.numpy()), origin, spacing, direction)

    result = ants.registration(
        image(fixed), image(moving), "SyNOnly", initial_transform="Identity", syn_metric="CC", syn_sampling=2,
        reg_iterations=(60, 40, 0),
    )  # fmt: skip
    warp = next(name for name in result["fwdtransforms"] if name.endswith(".nii.gz"))
    components = np.moveaxis(ants.image_read(warp).numpy(), -1, 0) * np.array([-1, -1, 1])[:, None, None, None]
    return DisplacementField(torch.from_numpy(components.astype(np.float32)), fixed.grid)


def intensity_classes(values: np.ndarray) -> np.ndarray:
    """CSF, GM and WM as 0, 1 and 2, by k-means of the intensities."""
    centres = np.percentile(values, [5, 45, 85])
    for _ in range(50):
        labels = np.abs(values[:, None] - centres).argmin(axis=1)
        centres = np.array([values[labels == k].mean() for k in range(3)])
    return labels


def row(field: DisplacementField, fixed: Volume, bundled: Template, peer: DisplacementField | None) -> str:
    """One line of the table."""
    brain = brain_of(fixed)
    assert bundled.tissue is not None
    images = torch.cat([bundled.brain.data[None], bundled.tissue])
    warped = resample_onto(images, bundled.brain.grid, fixed.grid, displacement=field.data).numpy()[:, brain]
    values = fixed.numpy()[brain]
    labels, priors = intensity_classes(values), warped[1:].argmax(axis=0)
    dice = [2 * ((labels == k) & (priors == k)).sum() / ((labels == k).sum() + (priors == k).sum()) for k in range(3)]
    inside = torch.from_numpy(brain)
    away = "" if peer is None else f"{float((field.data - peer.data).norm(dim=0)[inside].mean()):.2f}"
    jacobian = jacobian_determinant(field)[inside]
    round_trip = compose(field, invert(field)).data.norm(dim=0)[inside]
    dices = " / ".join(f"{d:.3f}" for d in dice)
    correlation = np.corrcoef(warped[0], values)[0, 1]
    bounds = f"{float(jacobian.min()):.2f} to {float(jacobian.max()):.2f}"
    return f"{correlation:.3f} | {dices} | {away} | {bounds} | {float(round_trip.mean()):.3f}"


def main() -> None:
    """Register, reduce, measure, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("t1w", type=Path)
    parser.add_argument("--syn", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    given, bundled = read_volume(options.t1w), bundled_template()
    fixed = Volume(resample_onto(given.data[None], given.grid, DEFAULT_GRID)[0], DEFAULT_GRID)
    near = ndimage.binary_dilation(brain_of(fixed), iterations=MARGIN)
    mask = Volume(torch.from_numpy(near.astype(np.float32)), DEFAULT_GRID)
    fit = register_diffeomorphic(bundled.brain, fixed, np.eye(4), fixed_mask=mask, finest_mm=1.0)
    stored = store(fit.forward)
    peer = syn(fixed, bundled.brain) if options.syn else None
    fields = {"identity": DisplacementField(torch.zeros_like(fit.forward.data), DEFAULT_GRID)}
    fields |= {"registration": fit.forward, "stored at 3 mm": restore(stored)} | ({"SyN": peer} if peer else {})
    print(
        "| displacement | correlation | Dice CSF / GM / WM | mm to SyN | Jacobian | round trip mm |\n"
        + "|---" * 6
        + "|"
    )
    for name, field in fields.items():
        print(f"| {name} | {row(field, fixed, bundled, peer)} |", flush=True)
    if options.write:
        np.savez_compressed(DISPLACEMENT, **stored)
        print(f"{DISPLACEMENT}: {DISPLACEMENT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
