"""The anatomy stage on synthetic heads made from the packaged template, with known pose and tissue."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain
from dsiprep.errors import InputError
from dsiprep.io.templates import load_template
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration.head_size import scale_matrix, scale_volume
from dsiprep.settings import AnatomySettings, CoregisterSettings
from dsiprep.stages import anatomy
from dsiprep.stages.anatomy import process_anatomy
from dsiprep.stages.coregister import coregister

POSE = rigid_matrix(np.array([0.22, -0.06, 0.12, 8.0, -14.0, 22.0]))  # points of ACPC to points of the scanner


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.sum(first & second) / (first.sum() + second.sum())


@pytest.fixture(scope="module")
def template() -> Template:
    """The packaged template at 3 mm."""
    full = load_template("MNI152NLin2009aSym")

    def coarse(data: torch.Tensor) -> torch.Tensor:
        return resample_to_spacing(Volume(data, full.brain.grid), 3.0).data

    grid = full.brain.grid.at_spacing(3.0)
    mask = (coarse(full.mask.data) > 0.5).float()
    tissue = torch.stack([coarse(t) for t in full.tissue]) * mask
    return Template(full.name, Volume(coarse(full.brain.data) * mask, grid), Volume(mask, grid), tissue, "test")


def _scanner_grid(mm: float, axes: str) -> Grid:
    shape = tuple(round(length / mm) for length in (190, 230, 220))
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = POSE[:3, 3] - (95, 125, 110) + np.array([0, -10.0, 10.0])
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    orientations = [nib.orientations.axcodes2ornt(codes) for codes in ("RAS", axes)]
    reoriented = image.as_reoriented(nib.orientations.ornt_transform(*orientations))
    return Grid(reoriented.shape, reoriented.affine)


def _acpc_to_template(points: np.ndarray) -> np.ndarray:
    """Points of the subject in ACPC space to points of the template: scaled by 4 %, and deformed by up to 4 mm."""
    deformation = 4 * np.sin(points[..., [1, 2, 0]] / 25.0) * np.exp(-((points / 55.0) ** 2).sum(-1, keepdims=True))
    return points * 1.04 + deformation


def _subject(grid: Grid, weights: tuple[float, float, float], scalp: float) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A head in scanner coordinates: image, brain mask, and tissue labels (0 to 2) inside the brain."""
    full = load_template("MNI152NLin2009aSym")
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    inverse = np.linalg.inv(POSE)
    template_points = _acpc_to_template(world @ inverse[:3, :3].T + inverse[:3, 3])
    voxels = torch.from_numpy(np.moveaxis(full.brain.grid.to_voxels(template_points), -1, 0).astype(np.float32))
    identity = Grid(grid.shape, np.eye(4))
    displacement = voxels - torch.from_numpy(np.indices(grid.shape).astype(np.float32))
    tissue = resample_onto(full.tissue, Grid(full.brain.grid.shape, np.eye(4)), identity, displacement=displacement)
    brain = tissue.sum(0).numpy() > 0.5
    distance = ndimage.distance_transform_edt(~brain, sampling=grid.voxel_sizes)
    data = np.tensordot(np.array(weights), tissue.numpy(), 1) + np.where((distance > 8) & (distance < 15), scalp, 0)
    data *= np.exp(0.003 * (world[..., 1] - POSE[1, 3]))
    rng = np.random.default_rng(0)
    data = np.abs(data + rng.normal(0, 2, data.shape)).astype(np.float32)
    return Volume(torch.from_numpy(data), grid), brain, tissue.argmax(0).numpy()


@pytest.fixture(scope="module")
def head():
    return _subject(_scanner_grid(2.0, "PSR"), (28, 68, 108), 120)


@pytest.fixture(scope="module")
def result(head, template):
    return process_anatomy((head[0],), None, None, template, AnatomySettings())


def _pose_error(matrix: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Rotation error in degrees, and translation error in mm at the anterior commissure."""
    turn = Rotation.from_matrix(matrix[:3, :3].T @ truth[:3, :3]).magnitude()
    return float(np.degrees(turn)), float(np.linalg.norm(matrix[:3, 3] - truth[:3, 3]))


def test_acpc_pose_is_rigid_and_accurate(result):
    matrix = result.anat_to_acpc.matrix
    degrees, millimetres = _pose_error(matrix, POSE)
    assert degrees < 2
    assert millimetres < 1.5
    assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert (result.anat_to_acpc.source, result.anat_to_acpc.target) == ("anat", "ACPC")


def test_output_grid_is_lps_and_contains_the_head(result, head):
    grid = result.image.grid
    assert nib.aff2axcodes(grid.affine) == ("L", "P", "S")
    assert np.allclose(grid.voxel_sizes, 2.0)
    bright = np.argwhere(head[0].numpy() > 40)
    world = head[0].grid.to_world(bright)
    inverse = np.linalg.inv(result.anat_to_acpc.matrix)
    voxels = grid.to_voxels(world @ inverse[:3, :3].T + inverse[:3, 3])
    assert voxels.min() >= 0
    assert np.all(voxels.max(0) <= np.array(grid.shape) - 1)


def test_mask_and_tissue_match_the_truth(result, head):
    _, brain, labels = head
    pose, native = result.anat_to_acpc.matrix, head[0].grid
    tissues = [(brain & (labels == t)).astype(np.float32) for t in range(3)]
    truth = resample_onto(torch.from_numpy(np.stack(tissues)), native, result.image.grid, pose).numpy()
    inside = truth.sum(0) > 0.5
    mask = result.mask.numpy() > 0.5
    assert set(np.unique(result.mask.numpy())) == {0.0, 1.0}
    assert _dice(mask, inside) > 0.95
    tissue = result.tissue.argmax(0).numpy()
    both = mask & inside  # the mask is tested above; compare tissue only where both masks agree
    scores = [_dice((tissue == t) & both, (truth.argmax(0) == t) & both) for t in range(3)]
    assert scores[0] > 0.7
    assert scores[1] > 0.85
    assert scores[2] > 0.85


def test_template_chains_are_accurate_and_inverse(result, template):
    assert result.template == result.acpc_to_template.target == "MNI152NLin2009aSym"
    assert result.acpc_to_template.source == "ACPC"
    rng = np.random.default_rng(0)
    inside = np.argwhere(ndimage.binary_erosion(template.mask.numpy() > 0.5, iterations=3))
    points = template.brain.grid.to_world(inside[rng.choice(len(inside), 400)])
    there = chain_points(result.acpc_to_template, points)
    assert np.abs(chain_points(result.template_to_acpc, there) - points).mean() < 0.2
    truth = _acpc_to_template(there)
    error = np.linalg.norm(truth - points, axis=1)
    linear = np.linalg.norm(_acpc_to_template(points / 1.04) - points, axis=1)
    assert error.mean() < 1.5
    assert error.mean() < 0.6 * linear.mean()


def test_normalisation_field_has_the_requested_voxel_size(head, template):
    brain = Volume(template.brain.data * 0.9, template.brain.grid)
    forward, _ = anatomy._normalise(brain, template, template.mask, np.eye(4), AnatomySettings(finest_mm=6.0))
    np.testing.assert_allclose(forward.steps[0].grid.voxel_sizes, 6.0, rtol=0.05)


def test_warped_brain_correlates_with_the_template(result, template):
    assert result.warped.grid.matches(template.brain.grid)
    inside = template.mask.numpy() > 0.5
    correlation = np.corrcoef(result.warped.numpy()[inside], template.brain.numpy()[inside])[0, 1]
    assert correlation > 0.9
    assert result.notes == ()
    assert len(result.orig_to_anat) == 1


def test_two_images_without_normalisation(head, template):
    """The second image is the first one moved, with noise; the average stays in the space of the first."""
    image = head[0]
    moved = rigid_matrix(np.array([0.03, 0, -0.04, 3, -2, 1.0]))
    grid = Grid(image.grid.shape, moved @ image.grid.affine)
    noise = np.random.default_rng(5).normal(0, 2, grid.shape).astype(np.float32)
    second = Volume((image.data + torch.from_numpy(noise)) * 3, grid)
    settings = AnatomySettings(normalize=False, biascorrect="none")
    result = process_anatomy((image, second), None, None, template, settings)
    degrees, millimetres = _pose_error(result.anat_to_acpc.matrix, POSE)
    assert degrees < 2
    assert millimetres < 1.5
    assert result.acpc_to_template is None
    assert result.template_to_acpc is None
    assert result.warped is None
    assert result.tissue is not None
    assert any("2 structural images" in note for note in result.notes)
    first, other = result.orig_to_anat  # points of the average to points of each image
    np.testing.assert_array_equal(first.matrix, np.eye(4))
    degrees, millimetres = _pose_error(other.matrix, moved)
    assert degrees < 0.2
    assert millimetres < 0.2
    first_only = resample_onto(image.data[None], image.grid, result.image.grid, result.anat_to_acpc.matrix, cubic=True)[
        0
    ]
    inside = result.mask.numpy() > 0.5
    assert np.corrcoef(first_only.numpy()[inside], result.image.numpy()[inside])[0, 1] > 0.99


@pytest.mark.parametrize("given", ["no images", "modality none"])
def test_dwiref_replaces_a_missing_structural_image(head, template, given):
    volume, _, _ = _subject(_scanner_grid(3.0, "LAS"), (200, 90, 65), 12)
    images = (head[0],) if given == "modality none" else ()
    result = process_anatomy(images, volume, None, template, AnatomySettings(modality="none" if images else "T1w"))
    degrees, millimetres = _pose_error(result.anat_to_acpc.matrix, POSE)
    assert degrees < 3
    assert millimetres < 4
    assert result.modality == "none"
    assert result.tissue is None
    assert result.acpc_to_template is None
    assert np.allclose(result.image.grid.voxel_sizes, 3.0)
    assert nib.aff2axcodes(result.image.grid.affine) == ("L", "P", "S")
    assert any("No structural image was used" in note for note in result.notes)


def test_missing_images_raise_an_error(template):
    with pytest.raises(InputError, match="neither a structural image nor a b=0 reference"):
        process_anatomy((), None, None, template, AnatomySettings())


def test_small_head_gives_the_same_result_as_a_human_one(head, template):
    """The head, its mask, its b=0 reference and the template scaled by 1/20, through anatomy and coregistration."""
    scale = 0.05
    image, brain, _ = head
    small_template = replace(
        template, name="Mouse", brain=scale_volume(template.brain, scale), mask=scale_volume(template.mask, scale)
    )
    mask = Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)
    settings = AnatomySettings(normalize=False, biascorrect="none")
    result = process_anatomy(
        (scale_volume(image, scale),), None, None, small_template, settings, scale_volume(mask, scale)
    )
    np.testing.assert_allclose(result.image.grid.voxel_sizes, 2.0 * scale, rtol=1e-6)
    degrees, millimetres = _pose_error(result.anat_to_acpc.matrix, scale_matrix(POSE, scale))
    assert degrees < 2
    assert millimetres < 1.5 * scale
    dwiref, dwiref_brain, _ = _subject(_scanner_grid(3.0, "LAS"), (200, 90, 65), 12)
    dwiref_mask = scale_volume(Volume(torch.from_numpy(dwiref_brain.astype(np.float32)), dwiref.grid), scale)
    coregistration = coregister(scale_volume(dwiref, scale), dwiref_mask, result, CoregisterSettings())
    degrees, millimetres = _pose_error(coregistration.dwiref_to_acpc.matrix, result.anat_to_acpc.matrix)
    assert degrees < 1
    assert millimetres < 1.0 * scale
    with pytest.raises(InputError, match="--anat-mask"):
        process_anatomy((scale_volume(image, scale),), None, None, small_template, settings)


def test_t2w_with_user_mask(template):
    """T2w contrast, with CSF brightest and white matter darkest; the user mask is used unchanged."""
    image, brain, _ = _subject(_scanner_grid(3.0, "RAS"), (200, 100, 70), 40)
    mask = Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)
    settings = AnatomySettings(modality="T2w", normalize=False, biascorrect="none")
    result = process_anatomy((image,), None, None, template, settings, mask)
    degrees, millimetres = _pose_error(result.anat_to_acpc.matrix, POSE)
    assert degrees < 2
    assert millimetres < 1.5
    assert result.modality == "T2w"
    assert result.notes == ()
    mask_volume = float(result.mask.data.sum()) * np.prod(result.mask.grid.voxel_sizes)
    assert abs(mask_volume / (brain.sum() * 27.0) - 1) < 0.02


def test_template_without_priors_gives_no_tissue(head, template):
    no_priors = replace(template, tissue=None, note="Another template is used.")
    result = process_anatomy((head[0],), None, None, no_priors, AnatomySettings(biascorrect="none", finest_mm=8.0))
    assert result.tissue is None
    assert result.acpc_to_template is not None
    assert any("has no tissue priors" in note for note in result.notes)
    assert "Another template is used." in result.notes


def test_external_steps_replace_native_ones(head, template):
    """Their results are used unchanged, and they receive the expected arguments."""
    native, brain, _ = head
    received = {}

    def normalise(image, target, region, initial, settings):
        received.update(image=image, initial=initial, region=region)
        affine = Affine(initial, "ACPC", target.name)
        return Chain((affine,), "ACPC", target.name), Chain((affine.inverse(),), target.name, "ACPC")

    def tissue(image, mask, priors):
        received["priors"] = priors
        return torch.full((3, *image.grid.shape), 1 / 3) * mask.data, Volume(7 * mask.data, image.grid)

    def brain_mask(image):
        received["native"] = image
        return Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)

    settings = AnatomySettings(biascorrect="none")
    result = process_anatomy(
        (native,), None, None, template, settings, steps=anatomy.ExternalSteps(brain_mask, tissue, normalise)
    )
    assert received["native"].grid.matches(native.grid)
    assert np.isclose(result.mask.numpy().sum(), brain.sum(), rtol=0.02)  # both have voxels of 2 mm
    assert torch.equal(result.labels.data, 7 * result.mask.data)
    assert float(result.tissue.max()) < 0.34
    assert np.array_equal(result.acpc_to_template.steps[0].matrix, received["initial"])
    assert torch.equal(received["image"].data, result.image.data * result.mask.data)
    assert received["priors"].shape == (3, *result.image.grid.shape)
    assert float(received["priors"].sum(0).max()) > 0.9
    assert float(received["region"].data.sum()) > float(template.mask.data.sum())
