"""Whether the front-to-back line of the template is level in ACPC space: `python benchmarks/acpc.py HEAD [--count N]`.

HEAD is a T1w of a whole head. It is turned and moved by known rigid transforms with SimpleITK, which shares nothing
with dsiprep, and brought to ACPC space by `dsiprep.stages.anatomy`. With `--in-template` HEAD lies in MNI space, so
that where its commissures have to come to lie is known: a point of the template must come back to its own place.
Without it, what is measured is how far the answer depends on the pose: the reference is what is found for the head as
it is. The points are the template's origin (by convention at the anterior commissure), the point 28 mm behind it, and
one 60 mm above; the line through the first two gives pitch and yaw, the third roll.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.io.templates import load_template
from dsiprep.settings import AnatomySettings
from dsiprep.stages.anatomy import process_anatomy

FRONT, BACK, TOP = np.array([[0.0, 0, 0], [0, -28, 0], [0, 0, 60]])
FLIP = np.diag([-1.0, -1, 1])


def volume(image: sitk.Image) -> Volume:
    """As dsiprep holds it: axes as in the file, RAS+."""
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = FLIP @ directions * image.GetSpacing()
    affine[:3, 3] = FLIP @ image.GetOrigin()
    data = sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32)
    i, j, k = data.shape
    return Volume(torch.from_numpy(np.ascontiguousarray(data)), Grid((i, j, k), affine))


def turned(image: sitk.Image, degrees: np.ndarray, shift: np.ndarray, noise: float, seed: int) -> sitk.Image:
    """The head turned about its middle and moved (degrees and mm, LPS), on the same grid, with noise."""
    pose = sitk.Euler3DTransform()
    pose.SetCenter(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    pose.SetRotation(*np.radians(degrees).tolist())
    pose.SetTranslation(shift.tolist())
    moved = sitk.Resample(image, image, pose.GetInverse(), sitk.sitkBSpline, 0.0)
    data = sitk.GetArrayFromImage(moved)
    rng = np.random.default_rng(seed)
    data = np.abs(data + rng.normal(0, noise * np.percentile(data, 95), data.shape)).astype(np.float32)
    made = sitk.GetImageFromArray(data)
    made.CopyInformation(moved)
    return made


def pose_of(degrees: np.ndarray, shift: np.ndarray, image: sitk.Image) -> np.ndarray:
    """Points of the head as it was to points of the moved one, RAS+ (4, 4)."""
    pose = sitk.Euler3DTransform()
    pose.SetCenter(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    pose.SetRotation(*np.radians(degrees).tolist())
    pose.SetTranslation(shift.tolist())
    matrix = np.eye(4)
    matrix[:3, :3] = FLIP @ np.array(pose.GetMatrix()).reshape(3, 3) @ FLIP
    matrix[:3, 3] = FLIP @ pose.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def landing(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """Of template points in ACPC space: the most that the line is off the axis (mm), pitch, yaw, roll (degrees)."""
    points = np.array([[*point, 1.0] for point in (FRONT, BACK, TOP)]) @ (np.linalg.inv(found) @ truth).T
    front, back, top = points[:, :3]
    line, up = front - back, top - front
    off = max(np.hypot(front[0], front[2]), np.hypot(back[0], back[2]))
    pitch, yaw = np.degrees(np.arctan2(line[2], line[1])), np.degrees(np.arctan2(line[0], line[1]))
    return [float(off), float(pitch), float(yaw), float(np.degrees(np.arctan2(up[0], up[2])))]


def find(image: sitk.Image, template: Template) -> np.ndarray:
    """Points of ACPC space to points of the image, by dsiprep."""
    settings = AnatomySettings(normalize=False, biascorrect="none")
    return process_anatomy((volume(image),), None, None, template, settings).anat_to_acpc.matrix


def main() -> None:
    """One row for each pose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head", type=Path)
    parser.add_argument("--in-template", action="store_true")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--degrees", type=float, default=20.0, help="largest turn about each axis")
    parser.add_argument("--mm", type=float, default=15.0, help="largest shift along each axis")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation over the 95th percentile")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    image = sitk.ReadImage(str(o.head), sitk.sitkFloat32)
    template = replace(load_template("MNI152NLin2009aSym"), tissue=None)  # nothing here needs the tissues
    still = np.eye(4) if o.in_template else find(image, template)
    rng = np.random.default_rng(o.seed)
    print("| turned by (deg) | off the line (mm) | pitch | yaw | roll (deg) |\n|---|---|---|---|---|")
    rows = []
    for number in range(o.count):
        degrees, shift = rng.uniform(-o.degrees, o.degrees, 3), rng.uniform(-o.mm, o.mm, 3)
        found = find(turned(image, degrees, shift, o.noise, number), template)
        rows.append(landing(found, pose_of(degrees, shift, image) @ still))
        print(f"| {degrees.round()} | " + " | ".join(f"{value:.2f}" for value in rows[-1]) + " |", flush=True)
    worst = np.abs(rows).max(axis=0)
    print("| largest | " + " | ".join(f"{value:.2f}" for value in worst) + " |")


if __name__ == "__main__":
    main()
