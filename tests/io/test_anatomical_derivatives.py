"""Anatomical transforms applied by ANTs and SimpleITK: same images as dsiprep, and consistent inverses.

A synthetic head is registered to a deformed one on oblique, anisotropic, left- and right-handed grids, so that fields,
matrices, grids and their order in the files all matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine
from dsiprep.io.derivatives import write_anatomy
from dsiprep.io.nifti import write_image
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_displacement
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.settings import AnatomySettings
from dsiprep.stages import anatomy as stage
from helpers.grids import make_grid
from helpers.report_subject import make_subject

ants = pytest.importorskip("ants")

LPS = np.array([-1.0, -1, 1])
RADII = np.array([33.0, 42, 31])
CENTRE = np.array([3.0, -5, 8])  # of all grids of `make_grid`
POSE = rigid_matrix(np.array([0.2, -0.1, 0.15, 4, -3, 5]))  # ACPC points to scanner points
LINEAR = rigid_matrix(np.array([0.05, -0.04, 0.06, 2, 1, -2])) @ np.diag(
    [1.04, 0.97, 1.02, 1]
)  # template points to ACPC points
SPACE = "MNI152NLin2009cAsym"
GRIDS = [("oblique", "LAS", "RAS"), ("LAS", "RAS", "oblique"), ("PSR", "oblique", "LAS")]


def head(points: np.ndarray) -> np.ndarray:
    """Intensity at ACPC points (..., 3): a smooth ball with folds, 0 far outside."""
    scaled = (points - CENTRE) / RADII
    radius = np.linalg.norm(scaled, axis=-1)
    folds = np.sin(points[..., 0] / 3.5) * np.cos(points[..., 1] / 4) + np.sin(points[..., 2] / 3.7 + 1)
    return 1000 * (1 + 0.25 * folds) / (1 + np.exp((radius - 1) * 14))


def deformed(points: np.ndarray) -> np.ndarray:
    """Nonlinear deformation of template points, applied before `LINEAR`: up to 4 mm, vanishing far outside."""
    offset = points - CENTRE
    return points + 4 * np.sin(offset[..., [1, 2, 0]] / 14) * np.exp(-((offset / 32) ** 2).sum(-1, keepdims=True))


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def points_of(grid: Grid) -> np.ndarray:
    """World coordinates of the voxels, (i, j, k, 3)."""
    return grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))


def volume(values: np.ndarray, grid: Grid) -> Volume:
    return Volume(torch.from_numpy(np.ascontiguousarray(values, np.float32)), grid)


@dataclass
class Written:
    """Anatomical files of a subject, and the results from which they were written."""

    folder: Path
    anatomy: Anatomy
    native: Volume
    template: Template

    def file(self, ending: str) -> str:
        return str(next(self.folder.rglob(f"*{ending}")))


@pytest.fixture(scope="module", params=GRIDS, ids="-".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    acpc, standard, scanner = request.param
    subject = make_subject()
    grid = make_grid(acpc, (52, 60, 38), (2.0, 1.9, 2.6))
    target = make_grid(standard, (44, 62, 45), (2.3, 1.9, 2.1))
    scan = make_grid(scanner, (48, 50, 60), (2.2, 2.4, 2.0))
    image = volume(head(points_of(grid)), grid)
    brain = volume(head(transformed(LINEAR, deformed(points_of(target)))), target)
    mask = volume(brain.data.numpy() > 500, target)
    template = Template(SPACE, brain, mask, torch.zeros(3, *target.shape), "test")
    acpc_to_template, template_to_acpc = stage._normalise(image, template, mask, LINEAR, AnatomySettings())
    anatomy = replace(
        subject.anatomy,
        image=image,
        mask=volume(image.data.numpy() > 500, grid),
        tissue=None,
        anat_to_acpc=Affine(POSE, "anat", "ACPC"),
        acpc_to_template=acpc_to_template,
        template_to_acpc=template_to_acpc,
        template=SPACE,
        orig_to_anat=(Affine(np.linalg.inv(POSE), "orig", "anat"),),
    )
    folder = tmp_path_factory.mktemp("anat")
    unit: Unit = replace(subject.unit, t1w=(Path("sub-01_T1w.nii.gz"),))
    write_anatomy(anatomy, unit, folder, AnatomySettings(), template)
    native = volume(head(transformed(np.linalg.inv(POSE), points_of(scan))), scan)
    write_image(folder / "native.nii.gz", native.data, scan)
    write_image(folder / "template.nii.gz", brain.data, target)
    return Written(folder, anatomy, native, template)


def by_ants(fixed: str, moving: str, transform: str) -> np.ndarray:
    images = [ants.image_read(path) for path in (fixed, moving)]
    return ants.apply_transforms(*images, transformlist=[transform], interpolator="linear").numpy()


def by_simpleitk(fixed: str, moving: str, transform: str) -> np.ndarray:
    images = [sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving)]
    result = sitk.Resample(images[1], images[0], sitk.ReadTransform(transform), sitk.sitkLinear, 0.0)
    return sitk.GetArrayFromImage(result).transpose(2, 1, 0)


def relative_difference(first: np.ndarray, second: np.ndarray, inside: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference inside a mask, as a fraction of the range of `reference`."""
    return float(np.abs(first - second)[inside].max() / np.ptp(reference))


@pytest.mark.parametrize("apply", [by_ants, by_simpleitk])
def test_composite_transforms_reproduce_warped_images(written: Written, apply: Callable[..., np.ndarray]) -> None:
    acpc, template = written.file("space-ACPC_desc-preproc_T1w.nii.gz"), written.file("template.nii.gz")
    ours = nib.load(written.file(f"space-{SPACE}_desc-preproc_T1w.nii.gz")).get_fdata()
    theirs = apply(template, acpc, written.file(f"from-ACPC_to-{SPACE}_mode-image_xfm.h5"))
    inside = written.template.mask.numpy() > 0.5
    assert inside.sum() > 10_000
    assert relative_difference(theirs, ours, inside, ours) < 0.005
    truth = written.template.brain.numpy()
    assert np.abs(ours - truth)[inside].mean() < 0.35 * np.abs(_linear_only(written) - truth)[inside].mean()

    grid, chain = written.anatomy.image.grid, written.anatomy.template_to_acpc
    assert chain is not None
    brain = written.template.brain
    ours = resample_onto(brain.data[None], brain.grid, grid, displacement=chain_displacement(chain, grid))[0].numpy()
    theirs = apply(acpc, template, written.file(f"from-{SPACE}_to-ACPC_mode-image_xfm.h5"))
    assert relative_difference(theirs, ours, written.anatomy.mask.numpy() > 0.5, ours) < 0.005


def _linear_only(written: Written) -> np.ndarray:
    image, grid = written.anatomy.image, written.template.brain.grid
    return resample_onto(image.data[None], image.grid, grid, LINEAR)[0].numpy()


@pytest.mark.parametrize("apply", [by_ants, by_simpleitk])
def test_linear_transforms_reproduce_resampled_images(written: Written, apply: Callable[..., np.ndarray]) -> None:
    acpc, native = written.file("space-ACPC_desc-preproc_T1w.nii.gz"), written.file("native.nii.gz")
    image, scan = written.anatomy.image, written.native
    for name, source, target, matrix in (
        ("from-anat_to-ACPC_mode-image_xfm.mat", scan, image, POSE),
        ("from-ACPC_to-anat_mode-image_xfm.mat", image, scan, np.linalg.inv(POSE)),
        ("from-orig_to-anat_mode-image_xfm.txt", image, scan, np.linalg.inv(POSE)),
    ):
        files = (acpc, native) if target is image else (native, acpc)
        ours = resample_onto(source.data[None], source.grid, target.grid, matrix)[0].numpy()
        inside = target.numpy() > 500
        assert relative_difference(apply(*files, written.file(name)), ours, inside, ours) < 0.005
        assert relative_difference(ours, target.numpy(), inside, ours) < 0.15  # interpolation error of the fine folds
        unmoved = resample_onto(source.data[None], source.grid, target.grid)[0].numpy()
        assert relative_difference(ours, unmoved, inside, ours) > 0.3


def test_inverse_composes_to_identity(written: Written) -> None:
    """Apply both files with SimpleITK, at and between brain voxels."""
    forward, inverse = (
        sitk.ReadTransform(written.file(f"from-{a}_to-{b}_mode-image_xfm.h5"))
        for a, b in (("ACPC", SPACE), (SPACE, "ACPC"))
    )
    rng = np.random.default_rng(0)
    for mask, first, second in (
        (written.template.mask, forward, inverse),
        (written.anatomy.mask, inverse, forward),
    ):
        voxels = np.argwhere(mask.numpy() > 0.5)
        voxels = voxels[rng.choice(len(voxels), 4000, replace=False)]
        points = mask.grid.to_world(voxels + rng.uniform(-0.5, 0.5, voxels.shape)) * LPS
        back = np.array([second.TransformPoint(first.TransformPoint(p.tolist())) for p in points])
        error = np.linalg.norm(back - points, axis=1)
        assert error.max() < 0.1
        assert error.mean() < 0.01  # 0.014 with an inverse that is exact at voxels but not fitted between them
